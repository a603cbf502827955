"""All nodes step along the same average of their directions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Channel, Strategy, Tree
from dbojax.strategies.common import (
    MovedState,
    add,
    check_parts,
    lift_of,
    local_step,
)


def allreduce(
    channel: Channel,
    optimizer: optax.GradientTransformation,
    known: Tree | None = None,
) -> Strategy:
    r"""Average the directions, then step: :math:`V \leftarrow V - \alpha \bar D`.

    Args:
        channel: one that returns the mean, or one estimate of it, to every node, e.g.
            ``dbo.channels.exact(dbo.mixing.averaging(n))`` or one with a server.
        optimizer: local step along the average.
        known: directions, ``(n, ...)``, at which the channel's memories start, e.g. the
            first ones, sent once as they are, which traffic does not count; by default
            zero, which costs nothing.

    Returns:
        A strategy that keeps equal rows equal.

    Raises:
        ValueError: if the nodes would hold different values after an exchange: they
            never exchange what they step to, and would drift apart.

    Examples:
        >>> mean = dbo.channels.exact(dbo.mixing.averaging(4))
        >>> move, key = allreduce(mean, optax.sgd(1.0)), jax.random.key(0)
        >>> v, d = jnp.zeros((4, 2)), jax.random.normal(key, (4, 2))
        >>> moved, _, _ = move.update(key, v, d, move.init(v))
        >>> bool(jnp.allclose(moved, -dbo.node_mean(d)[None]))
        True
    """
    check_parts(channel, optimizer)
    if not channel.averages:
        raise ValueError(
            "`allreduce` exchanges directions and never values, so it needs a channel "
            "that gives all nodes the same, e.g. "
            "`dbo.channels.exact(dbo.mixing.averaging(n))` or `dbo.channels.server`; "
            "over this one the nodes would drift apart. Use "
            "`dbo.strategies.gradient_tracking(channel, optimizer)`."
        )

    def init(v):
        start = jax.tree.map(jnp.zeros_like, v) if known is None else known
        trees.check_like(start, v, "known", "v")
        return MovedState(channel.init(start), jax.vmap(optimizer.init)(v))

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        mean, memory, traffic = channel.send(key, direction, state.channel, mask)
        delta, opt_state = local_step(optimizer, mean, state.optimizer, v)
        return add(v, delta), MovedState(memory, opt_state), traffic

    return Strategy(init, update, lift_of(channel))
