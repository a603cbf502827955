"""What `dbo.run` costs beside one bare compiled scan of the same steps.

    python benchmarks/run_overhead.py

Both sides do the same steps with the same keys and the same metrics; the bare scan is
one donated program over all steps, the run is cut into chunks of `every`. They take
turns, each is blocked on the device, and compile time is apart: the run's own record of
it is taken off its wall clock, so that checks, copies and history are all paid for.
"""

from environment import ensure

ensure([])

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from report import header, quartiles

import dbojax as dbo


def tiny(n: int, d: int, rounds: int):
    """C²DFB with dense messages on small quadratics: (method, start, batch)."""
    task = dbo.tasks.quadratic(n=n, dx=d, dy=d)
    ring = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(n)))
    wire = dbo.channels.exact(ring, gamma=0.6)
    method = dbo.algorithms.c2dfb(
        task.problem,
        outer=wire,
        inner=wire,
        inner_steps=rounds,
        upper_step=0.05,
        lower_step=0.05,
    )
    start = dbo.replicate(task.x0, n), dbo.replicate(task.y0, n)
    return method, method.init(*start), task.batch


def bare(method, state, batch, key, steps: int):
    """The floor: one donated scan, compiled beforehand."""

    @functools.partial(jax.jit, donate_argnums=0)
    def program(state, batch, key):
        step_key, _ = jax.random.split(key)

        def body(state, t):
            return method.step(jax.random.fold_in(step_key, t), state, batch)

        return jax.lax.scan(body, state, jnp.arange(steps, dtype=jnp.int32))

    batch = jax.tree.map(jnp.asarray, batch)
    compiled = program.lower(state, batch, key).compile()

    def once():
        own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(own, batch, key))
        return time.perf_counter() - start, out

    return once


def chunked(method, state, batch, key, steps: int, every: int):
    def once():
        start = time.perf_counter()
        final, history = dbo.run(method, key, state, batch, steps, every=every)
        wall = time.perf_counter() - start
        chunks = history["seconds"][-1]
        return wall - history.compile_seconds, (final, history), chunks

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--dim", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()

    key = jax.random.key(0)
    method, state, batch = tiny(args.nodes, args.dim, args.rounds)
    floor = bare(method, state, batch, key, args.steps)
    ours = chunked(method, state, batch, key, args.steps, args.every)
    floor(), ours()
    floors, walls, inside, compiles = [], [], [], []
    for _ in range(args.repeats):
        seconds, (expected, _) = floor()
        floors.append(seconds)
        seconds, (final, history), chunks = ours()
        walls.append(seconds)
        inside.append(chunks)
        compiles.append(history.compile_seconds)
    gap = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), final, expected)

    print(f"{header()}.")
    print(f"{args.steps} steps, every={args.every}, {args.repeats} repeats, {args}")
    print(f"largest gap of the final states: {max(jax.tree.leaves(gap)):.1e}")
    micro = 1e6 / args.steps
    print(f"bare scan, us/step:           {quartiles(np.array(floors) * micro)}")
    print(f"run, wall - compile, us/step: {quartiles(np.array(walls) * micro)}")
    print(f"run, its programs, us/step:   {quartiles(np.array(inside) * micro)}")
    print(f"run, compile, s:              {quartiles(compiles)}")
    print(f"ratio run / bare scan:        {quartiles(np.divide(walls, floors))}")
    print(f"ratio programs / bare scan:   {quartiles(np.divide(inside, floors))}")


if __name__ == "__main__":
    main()
