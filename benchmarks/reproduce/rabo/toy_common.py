"""What the scripts on the federated toy share: its problems, and what is watched."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")

import dbojax as dbo

CAPACITIES = (1.0, 0.75, 0.5, 0.25)


def stacked(tasks):
    """The data of several toys with an axis of runs in front, and their starts."""

    def stack(*leaves):
        return jnp.stack(leaves)

    batch = jax.tree.map(stack, *[task.batch for task in tasks])
    x = jnp.stack([task.x0[None] for task in tasks])
    y = jnp.stack([task.y0[None] for task in tasks])
    return SimpleNamespace(batch=batch, x=x, y=y, runs=len(tasks))


def squared_hypergradient(personal, batch, x):
    """Of the problem that the method solves, at the server's x: one run's number."""
    found = dbo.tasks.solve_federated_toy(batch, personal).hypergradient(x[0])
    return jnp.vdot(found, found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def watched(method, personal, rounds, every, key, state, batch, data):
    """Squares of the true hypergradient every so often, and the least coverage.

    ``batch`` goes to the method and ``data``, which is free of noise, to the judge.
    """
    square = jax.vmap(functools.partial(squared_hypergradient, personal))

    def one(state, turn):
        state, metrics = method.step(jax.random.fold_in(key, turn), state, batch)
        return state, metrics.coverage

    def some(state, first):
        before = square(data, state.x)
        state, coverage = jax.lax.scan(one, state, first + jnp.arange(every))
        least = jax.tree.map(lambda c: jnp.min(c, 0), coverage)
        return state, (before, least)

    turns = jnp.arange(0, rounds, every)
    state, (squares, coverage) = jax.lax.scan(some, state, turns)
    last = square(data, state.x)
    squares = jnp.concatenate([squares, last[None]])
    return squares, jax.tree.map(jnp.min, coverage)


def spread(values, form="{:.1e}"):
    """Median and range, as a cell of a table."""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{form.format(middle)} [{form.format(low)}, {form.format(high)}]"
