"""Inner solvers that go on from one estimate to the next, for an episode."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Problem, State, Tree
from dbojax.hypergradients.inner import Inner, check_count, schedule, stepper


def window(
    inner: Inner,
    key: jax.Array,
    state: State,
    x: Tree,
    y: Tree,
    batch: Tree,
    age: jax.Array,
) -> State:
    """All steps of an inner solver, from where the last estimate left it.

    Args:
        inner: the solver.
        key: of this estimate.
        state: where the last estimate ended.
        x: upper variable.
        y: where an episode starts.
        batch: what the lower level sees; step t of ``Rounds`` is step t of the window.
        age: estimates since the episode began; at 0 the solver starts anew.

    Returns:
        The state after the steps.
    """
    key_start, key_steps = jax.random.split(key)
    state = jax.lax.cond(age == 0, lambda: inner.start(key_start, x, y), lambda: state)
    steps, own = schedule(batch, 0, inner.steps)
    body = stepper(inner, key_steps, x, batch)
    # The solver counts its steps through the episode, for schedules of its own.
    return jax.lax.scan(body, state, (steps + age * inner.steps, own))[0]


def blank(inner: Inner, x: Tree, y: Tree) -> State:
    """A state of the solver that only holds the place of one."""
    x, y = (jax.tree.map(jnp.asarray, v) for v in (x, y))
    state = jax.eval_shape(lambda x, y: inner.start(jax.random.key(0), x, y), x, y)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)


def aged(age: jax.Array, episode: int, ok: jax.Array) -> jax.Array:
    """The age of the next estimate; what is not finite is not carried on."""
    return jnp.where(ok, (age + 1) % episode, 0)


def split(state: State) -> tuple[State, State]:
    """What has tangents in a state, and the rest (counters, keys); None elsewhere."""

    def floating(a):
        return jnp.issubdtype(a.dtype, jnp.floating)

    floats = jax.tree.map(lambda a: a if floating(a) else None, state)
    rest = jax.tree.map(lambda a: None if floating(a) else a, state)
    return floats, rest


def merge(floats: State, rest: State) -> State:
    """Undo :func:`split`."""

    def choose(a, b):
        return b if a is None else a

    return jax.tree.map(choose, floats, rest, is_leaf=lambda a: a is None)


def stacked(tree: Tree, count: int) -> Tree:
    """The same value many times, in front."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), tree)


def in_chunks(tree: Tree, chunk: int) -> Tree:
    """Leaves (b, ...) as (b / chunk, chunk, ...)."""
    return jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), tree)


def out_of_chunks(tree: Tree) -> Tree:
    """Undo :func:`in_chunks`."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def check_parts(
    problem: Problem, inner: Inner, numbers: dict[str, Any], name: str
) -> None:
    """Refuse parts of another kind, and numbers that are not whole and positive."""
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_type(inner, Inner, "inner", "dbo.hypergradients.descent(...)")
    for what, number in numbers.items():
        check_count(number, what, name)
