"""One process of a run; process 1 is killed in its third chunk, once.

dbojax launch -n 2 --devices 2 --restarts 1 tests/fault_worker.py FOLDER
"""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from runner_methods import metrics, noise

import dbojax as dbo

NODES, STEPS, EVERY = 4, 20, 5


def walk(mesh, batch_at, **checkpoint):
    """Noisy gossip towards batches that the host makes."""
    weights = dbo.topology.metropolis(dbo.topology.ring(NODES))
    mix = dbo.devices.spread(dbo.mixing.mixer(weights), mesh)

    def step(key, state, batch):
        x = mix.apply(state) - 0.1 * (state - batch) + noise(key, state.shape)
        return x, metrics(jnp.sum(x), x, x)

    start = dbo.devices.place(np.arange(12.0).reshape(NODES, 3), mesh)
    method, batches = dbo.Algorithm(lambda x, y: x, step), dbo.from_host(batch_at)
    key = jax.random.key(2)
    return dbo.run(method, key, start, batches, STEPS, every=EVERY, **checkpoint)


def batch_at(step):
    return np.full((NODES, 3), np.sin(step))


def killed(folder, step):
    """Note the step; die at one of them, if it is the first time."""
    marks = folder / "steps"
    with open(marks, "a", encoding="utf-8") as file:
        file.write(f"{step} ")
    if step == 2 * EVERY + 1 and marks.read_text("ascii").split().count(str(step)) < 2:
        os.kill(os.getpid(), signal.SIGKILL)


def main(folder):
    def fetch(step):
        if not dbo.devices.is_first():
            killed(folder, step)
        return batch_at(step)

    mesh, path = dbo.devices.mesh(NODES), folder / "run.npz"
    state, history = walk(mesh, fetch, checkpoint=path, resume="auto")
    state = process_allgather(state, tiled=True)
    if dbo.devices.is_first():
        np.savez(folder / "end.npz", state=state, **history)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    dbo.devices.start()
    main(Path(sys.argv[1]))
