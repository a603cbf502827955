"""Solvers of benchopt's bilevel benchmark, from a checkout of it, on our problem.

Only their own compiled loop is run, and it is blocked on the device; benchopt's clock
stops when the loop is dispatched.
"""

import importlib
import sys

import jax
from bilevel import (
    BLOCK,
    BLOCKS,
    RATE,
    ROUNDS,
    STEP,
    TERMS,
    Data,
    arguments,
    lower,
    upper,
)

SETTINGS = {
    "SOBA": ("soba", {}),
    "SABA": ("saba", {"mode_init_memory": "zero"}),
    "stocBiO": ("stocbio", {"n_inner_steps": ROUNDS, "n_shia_steps": TERMS}),
    "MRBO": ("mrbo", {"n_shia_steps": TERMS, "eta": RATE}),
}


def loss(objective, data):
    """An objective as they call it: (inner variable, outer variable, start, size)."""
    rows = Data(data.inputs.reshape(BLOCKS * BLOCK, -1), data.targets.reshape(-1))

    def value(y, x, start=0, batch_size=BLOCK):
        samples = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size), rows
        )
        return objective(x, y, samples)

    return value


def solver(path, name, dtype):
    """One of their solvers, its objective set but nothing run."""
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    file, settings = SETTINGS[name]
    made = importlib.import_module(f"solvers.{file}").Solver.get_instance(
        step_size=STEP,
        outer_ratio=1.0,
        batch_size=BLOCK,
        random_state=1,
        **settings,
    )
    made.run_once = lambda *_: None  # its warm-up
    x, y, above, below = arguments(dtype)
    f, g = loss(upper, above), loss(lower, below)
    made.set_objective(
        f_inner=g,
        f_outer=f,
        n_inner_samples=BLOCK * BLOCKS,
        n_outer_samples=BLOCK * BLOCKS,
        inner_var0=y,
        outer_var0=x,
        f_inner_fb=g,
        f_outer_fb=f,
    )
    return made


def call(path, name, dtype, steps):
    """A blocked call of ``steps`` iterations, and what tells (x, y) where it stands."""
    made = solver(path, name, dtype)
    kept = [made.init()]

    def go_on():
        now = kept[0]
        # SABA keeps its memory apart, gives it first and takes it last.
        args = (now[1], now[0]) if isinstance(now, tuple) else (now,)
        kept[0] = jax.block_until_ready(made.one_epoch(*args, steps))

    def point():
        now = kept[0][1] if isinstance(kept[0], tuple) else kept[0]
        return now["outer_var"], now["inner_var"]

    return go_on, point
