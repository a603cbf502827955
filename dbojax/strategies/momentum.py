"""Averages of directions that travel as well."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Channel, State, Strategy, Tree
from dbojax.strategies.common import check_channel, check_strategy, no_mask


class GossipedAverageState(NamedTuple):
    """Average, and the memories of its channel and of the strategy it feeds."""

    average: Tree  # (n, ...)
    channel: State
    strategy: State


def gossiped_average(strategy: Strategy, channel: Channel, weight: float) -> Strategy:
    r"""Feed a strategy with a moving average of the directions that the nodes mix.

    .. math:: R \leftarrow (1 - \theta) W R + \theta D

    It is no tracker: where directions differ, averages differ too, less so for a
    smaller :math:`\theta`.

    Args:
        strategy: moves along the average.
        channel: how ``R`` travels; what leaves is the average of the last update, so it
            shares a packet with what the strategy sends.
        weight: theta in (0, 1]; 1 gives the strategy itself.

    Returns:
        A strategy with one more message; the average starts at zero.

    Raises:
        ValueError: if ``weight`` is not in (0, 1].
        TypeError: if a part is of another kind.

    Examples:
        >>> channel = dbo.channels.exact(dbo.mixing.averaging(2))
        >>> plain = dbo.strategies.diffusion_cta(channel, optax.sgd(1.0))
        >>> move, v = gossiped_average(plain, channel, 0.5), jnp.zeros(2)
        >>> d, state = jnp.array([0.0, 4.0]), move.init(v)
        >>> for _ in range(2):
        ...     v, state, traffic = move.update(jax.random.key(0), v, d, state)
        ...     print(state.average.tolist(), traffic.rounds)
        [0.0, 2.0] 1
        [0.5, 2.5] 1

    References:
        The estimators of Gossip-DSBO, Yang, Zhang and Wang (2022), arXiv:2206.10870, as
        recalled.
    """
    check_strategy(strategy, "gossiped_average(strategy)")
    check_channel(channel, "channel")
    if isinstance(weight, numbers.Real) and not 0 < weight <= 1:
        raise ValueError(f"`gossiped_average` needs 0 < weight <= 1, got {weight}.")

    def init(v):
        zeros = jax.tree.map(jnp.zeros_like, trees.wide(v))
        return GossipedAverageState(zeros, channel.init(zeros), strategy.init(v))

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        no_mask(mask, "A gossiped average", "all mix what they hold")
        key_average, key_move = jax.random.split(key)
        mixed, channel_state, sent = channel.send(
            key_average, state.average, state.channel
        )
        average = trees.averaged(weight, mixed, direction)
        along = trees.cast(average, direction)
        v, memory, traffic = strategy.update(key_move, v, along, state.strategy)
        return v, GossipedAverageState(average, channel_state, memory), sent | traffic

    return Strategy(init, update, strategy.lift)
