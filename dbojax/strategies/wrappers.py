"""Strategies around another strategy."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import State, Strategy, Tree
from dbojax.strategies.common import check_strategy


class AverageState(NamedTuple):
    """Moving average of the directions, and the memory of the strategy it feeds."""

    average: Tree  # (n, ...), at least float32
    strategy: State
    # (n,) bool, which nodes have seen a direction; None where that makes no difference.
    started: jax.Array | None = None


def moving_average(
    strategy: Strategy, weight: float, from_first: bool = False
) -> Strategy:
    r"""Feed a strategy with the average :math:`R \leftarrow (1 - \theta) R + \theta D`.

    Args:
        strategy: moves along the average.
        weight: theta in (0, 1]; 1 gives the strategy itself.
        from_first: the average starts as the first direction, so that early ones are
            not short; by default it starts at zero.

    Returns:
        A strategy with the same messages.

    Raises:
        ValueError: if ``weight`` is not in (0, 1].
        TypeError: if ``strategy`` is not one.

    Examples:
        >>> mean = dbo.channels.exact(dbo.mixing.averaging(2))
        >>> plain, v = dbo.strategies.allreduce(mean, optax.sgd(1.0)), jnp.zeros(2)
        >>> for from_first in (False, True):
        ...     move = moving_average(plain, 0.25, from_first)
        ...     moved, _, _ = move.update(jax.random.key(0), v, v + 8, move.init(v))
        ...     print(moved.tolist())
        [-2.0, -2.0]
        [-8.0, -8.0]
    """
    check_strategy(strategy, "moving_average(strategy)")
    if isinstance(weight, numbers.Real) and not 0 < weight <= 1:
        raise ValueError(f"`moving_average` needs 0 < weight <= 1, got {weight}.")

    def init(v):
        zeros = jax.tree.map(jnp.zeros_like, trees.wide(v))
        none = jnp.zeros(trees.num_nodes(v), bool) if from_first else None
        return AverageState(zeros, strategy.init(v), none)

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        average = trees.averaged(weight, state.average, direction)
        average = trees.where(state.started, average, trees.wide(direction))
        present = None if mask is None else mask.mask
        average = trees.where(present, average, state.average)
        started = state.started
        if started is not None:
            started = started | (True if mask is None else mask.mask)
        sent = trees.cast(average, direction)
        v, memory, traffic = strategy.update(key, v, sent, state.strategy, mask)
        return v, AverageState(average, memory, started), traffic

    return Strategy(init, update, strategy.lift)


def projected(strategy: Strategy, project: Callable[[Tree], Tree]) -> Strategy:
    """Project each node's value after every update.

    Args:
        strategy: moves the value.
        project: acts on one node's tree, e.g. ``dbo.strategies.ball(10.0)``.

    Returns:
        A strategy with the same messages.

    Examples:
        >>> mean = dbo.channels.exact(dbo.mixing.averaging(2))
        >>> plain = dbo.strategies.allreduce(mean, optax.sgd(1.0))
        >>> move = projected(plain, ball(1.0))
        >>> v = jnp.zeros((2, 2))
        >>> moved, _, _ = move.update(jax.random.key(0), v, v - 3.0, move.init(v))
        >>> bool(jnp.allclose(jnp.linalg.norm(moved, axis=1), 1.0))
        True
    """
    check_strategy(strategy, "projected(strategy)")

    def update(key, v, direction, state, mask=None):
        v, state, traffic = strategy.update(key, v, direction, state, mask)
        return jax.vmap(project)(v), state, traffic

    return strategy._replace(update=update)


def ball(radius: float) -> Callable[[Tree], Tree]:
    r"""Scale a tree that is longer than ``radius`` back to it.

    .. math:: \min\{1, \rho / \|v\|\}\, v

    Args:
        radius: :math:`\rho > 0`; infinity leaves everything as it is.

    Raises:
        ValueError: if ``radius`` is not positive.
    """
    if isinstance(radius, numbers.Real) and not radius > 0:
        raise ValueError(f"`ball` needs a radius > 0, got {radius}.")

    def project(v):
        length = trees.norm(v)
        # Where nothing is to be done nothing is rounded.
        factor = jnp.where(length > radius, radius / length, 1.0)
        return jax.tree.map(lambda leaf: trees.times(factor, leaf), v)

    return project
