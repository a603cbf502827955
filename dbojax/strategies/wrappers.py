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


def moving_average(strategy: Strategy, weight: float) -> Strategy:
    r"""Feed a strategy with the average :math:`R \leftarrow (1 - \theta) R + \theta D`.

    Args:
        strategy: moves along the average.
        weight: theta in (0, 1]; 1 gives the strategy itself.

    Returns:
        A strategy with the same messages.

    Raises:
        ValueError: if ``weight`` is not in (0, 1].
        TypeError: if ``strategy`` is not one.
    """
    check_strategy(strategy, "moving_average(strategy)")
    if isinstance(weight, numbers.Real) and not 0 < weight <= 1:
        raise ValueError(f"`moving_average` needs 0 < weight <= 1, got {weight}.")

    def init(v):
        zeros = jax.tree.map(jnp.zeros_like, trees.wide(v))
        return AverageState(zeros, strategy.init(v))

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        average = trees.averaged(weight, state.average, direction)
        present = None if mask is None else mask.mask
        average = trees.where(present, average, state.average)
        sent = trees.cast(average, direction)
        v, memory, traffic = strategy.update(key, v, sent, state.strategy, mask)
        return v, AverageState(average, memory), traffic

    return Strategy(init, update)


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
