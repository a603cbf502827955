"""What a benchmark or a test needs to know of a problem with data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dbojax.base import Batch, Problem, Tree
from dbojax.trees import node_mean

Sampler = Callable[[jax.Array, Any], Tree]  # (key, step) -> a stacked batch


class ClosedForm(NamedTuple):
    """The exact answers of a problem that can be solved by hand."""

    solution: Callable[[jax.Array], jax.Array]  # x -> y*(x), (dy,)
    value: Callable[[jax.Array], jax.Array]  # x -> Psi(x) = mean_i f_i(x, y*(x))
    hypergradient: Callable[[jax.Array], jax.Array]  # x -> grad Psi(x), (dx,)
    x_star: jax.Array  # the minimiser of Psi, (dx,)


class Task(NamedTuple):
    """A bilevel problem, its data, where to start and how to judge.

    ``problem.upper`` is called with one node's share of ``batch.upper`` and
    ``problem.lower`` with one of ``batch.lower``.
    """

    problem: Problem
    x0: Tree  # one node's start; stack it with `dbo.replicate(task.x0, task.n)`
    y0: Tree
    batch: Batch  # all data, node axis first
    sampler: Callable[[int], Sampler]  # batch_size -> sampler(key, step) -> Batch
    evaluate: Callable[[Any], dict[str, jax.Array]]  # needs stacked `.x` and `.y`
    n: int  # number of nodes
    exact: ClosedForm | None = None
    # (x, y, batch, held) -> scores of one value of each variable, for programs that
    # hold many tasks at once; `evaluate` closes over its data.
    judge: Callable[[Tree, Tree, Batch, Tree], dict[str, jax.Array]] | None = None
    held: Tree = None  # what no node trains on


def at_mean(measure: Callable[[Tree, Tree], dict]) -> Callable[[Any], dict]:
    """Judge a state at the node means of its ``x`` and ``y``, compiled once.

    Args:
        measure: ``(x, y) -> dict`` of scalars, on one value of each variable.

    Returns:
        ``evaluate(state) -> dict``; under ``jax.vmap`` it takes a state with a
        further leading axis, one row per seed.

    Examples:
        >>> evaluate = at_mean(lambda x, y: {"x": x, "y": y})
        >>> from types import SimpleNamespace
        >>> state = SimpleNamespace(x=jnp.array([0.0, 2.0]), y=jnp.array([1.0, 5.0]))
        >>> {name: float(value) for name, value in evaluate(state).items()}
        {'x': 1.0, 'y': 3.0}
    """

    @jax.jit
    def measured(x, y):
        return measure(node_mean(x), node_mean(y))

    return lambda state: measured(state.x, state.y)
