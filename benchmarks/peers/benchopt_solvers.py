"""Solvers of benchopt's bilevel benchmark, from a checkout of it, on our arrays.

Only their own compiled loop is run, and it is blocked on the device; benchopt's clock
stops when the loop is dispatched.
"""

import importlib
import sys

import jax
from bilevel import RATE, ROUNDS, STEP, TERMS
from objectives import BLOCK

SETTINGS = {
    "SOBA": ("soba", {}),
    "SABA": ("saba", {"mode_init_memory": "zero"}),
    "stocBiO": ("stocbio", {"n_inner_steps": ROUNDS, "n_shia_steps": TERMS}),
    "MRBO": ("mrbo", {"n_shia_steps": TERMS, "eta": RATE}),
}


def dataset(name):
    """A file of theirs with objectives; None where the checkout lacks it."""
    try:
        return importlib.import_module(f"datasets.{name}")
    except ImportError:
        return None


def loss(task, objective, data):
    """An objective as they call it: (inner variable, outer variable, start, size)."""
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), data)
    if task.theirs and (file := dataset(task.theirs)):
        return file.get_function(*rows)

    def value(y, x, start=0, batch_size=BLOCK):
        samples = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size), rows
        )
        return objective(x, y, samples)

    return value


def solver(path, name, task, dtype):
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
    x, y, above, below = task.arguments(dtype)
    f, g = loss(task, task.upper, above), loss(task, task.lower, below)
    made.set_objective(
        f_inner=g,
        f_outer=f,
        n_inner_samples=BLOCK * task.blocks,
        n_outer_samples=BLOCK * task.blocks,
        inner_var0=y,
        outer_var0=x,
        f_inner_fb=g,
        f_outer_fb=f,
    )
    return made


def call(path, name, task, dtype):
    """A blocked call of some epochs, and what tells (x, y) where it stands."""
    made, steps = solver(path, name, task, dtype), task.epochs * task.blocks
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
