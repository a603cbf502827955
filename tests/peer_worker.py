"""One of two processes of a run, of which the second is killed on its way.

Arguments: rank, port, checkpoint, result. The first process writes down what it saw.
"""

import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from runner_methods import noisy, start

import dbojax as dbo
from dbojax.runner import checkpoints

X = np.arange(24.0).reshape(8, 3) / 10
STEPS, EVERY, DEADLY = 12, 4, 12


def rows_of(place):
    """State, data that a sampler closes over, and the sampler."""
    state, data = (
        start(jnp.asarray(X)),
        place(np.cos(np.arange(168.0).reshape(8, 3, 7))),
    )
    state = state._replace(x=place(X), y=place(X - 1))

    def sampler(key, step):
        chosen = jax.random.randint(key, (8,), 0, 7) + step % 2
        return jax.vmap(lambda rows, i: rows[:, i % 7])(data, chosen)

    return state, sampler


def main(rank, port, checkpoint, result):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("nodes",), axis_types=auto)
    rows = jax.NamedSharding(mesh, jax.P("nodes"))
    state, sampler = rows_of(
        lambda array: jax.make_array_from_callback(
            array.shape, rows, lambda index: array[index]
        )
    )
    state = state._replace(key=dbo.devices.place(state.key, mesh, 8))
    opened, seen = [], {"digest": checkpoints.digest(state)}
    part = checkpoints._part
    checkpoints._part = lambda stack, path, name, total: (
        opened.append(name) or part(stack, path, name, total)
    )

    def evaluate(state):
        step = int(state.count)
        if rank and step == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"step_now": step}

    def go(key, evaluate=evaluate):
        return dbo.run(
            noisy(),
            jax.random.key(key),
            state,
            sampler,
            STEPS,
            every=EVERY,
            evaluate=evaluate,
            checkpoint=checkpoint,
            resume="auto",
            progress=dbo.devices.is_first(),
        )

    try:
        go(rank)
    except ValueError as error:
        seen["disagree"] = str(error)
    try:
        go(7, evaluate if rank else None)
    except ValueError as error:
        seen["evaluate"] = str(error)
    try:
        go(7)
    except dbo.runner.PeerLostError as error:
        seen["lost"] = str(error)
        seen["step"] = checkpoints.load(checkpoint, like=state).meta["step"]
        seen["opened"] = opened
    with open(result, "w") as file:
        json.dump(seen, file)
    # The other one is not there any more to end in order.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
