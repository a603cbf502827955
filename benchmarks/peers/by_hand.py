"""SOBA and SABA on a task of `objectives.py`, as one would write them in JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from bilevel import STEP, decay
from objectives import block


class State(NamedTuple):
    """x, y, z and the number of steps done."""

    x: jax.Array
    y: jax.Array
    z: jax.Array
    step: jax.Array
    tables: tuple = ()


def terms(task, state, above, below):
    """Gradients of f in x and y; of g in y, and both products with z."""
    f_x, f_y = jax.grad(task.upper, (0, 1))(state.x, state.y, above)

    def gradients(y):
        return jax.grad(task.lower, (0, 1))(state.x, y, below)

    (_, slope), (cross, hessian) = jax.jvp(gradients, (state.y,), (state.z,))
    return f_x, f_y, slope, hessian, cross


def moved(state, rate, f_x, f_y, slope, hessian, cross):
    return state._replace(
        x=state.x - rate * (f_x - cross),
        y=state.y - rate * slope,
        z=state.z - rate * (hessian - f_y),
        step=state.step + 1,
    )


def soba_start(task, x, y):
    del task
    return State(x, y, jnp.zeros_like(y), jnp.zeros((), jnp.int32))


def soba_step(task, key, state, above, below, drawn):
    del key
    found = terms(task, state, block(above, drawn[0]), block(below, drawn[1]))
    return moved(state, decay(state.step), *found), None


def saba_start(task, x, y):
    """Of each term a table by block, its mean, and what rounding keeps out of that."""
    tables = tuple(
        (
            jnp.zeros((task.blocks, *v.shape), v.dtype),
            jnp.zeros_like(v),
            jnp.zeros_like(v),
        )
        for v in (x, y, y, y, x)
    )
    return soba_start(task, x, y)._replace(tables=tables)


def refreshed(table, index, new):
    """The estimate of a term, and its table with what is new of one block."""
    rows, mean, rest = table
    change = new - rows[index]
    step = change / len(rows) + rest
    after = mean + step
    return mean + change, (rows.at[index].set(new), after, step - (after - mean))


def saba_step(task, key, state, above, below, drawn):
    del key
    found = terms(task, state, block(above, drawn[0]), block(below, drawn[1]))
    indices = drawn[0], drawn[0], drawn[1], drawn[1], drawn[1]
    pairs = [refreshed(*of) for of in zip(state.tables, indices, found, strict=True)]
    estimates, tables = zip(*pairs, strict=True)
    return moved(state, STEP, *estimates)._replace(tables=tables), None


SOLVERS = {"SOBA": (soba_start, soba_step), "SABA": (saba_start, saba_step)}
