"""Consensus without a memory of others: the plain methods, biased at constant steps."""

from __future__ import annotations

import jax
import optax

from dbojax import trees
from dbojax.base import Channel, Strategy
from dbojax.strategies.common import (
    MovedState,
    add,
    check_parts,
    lift_of,
    local_step,
    no_mask,
)


def diffusion_cta(
    channel: Channel, optimizer: optax.GradientTransformation
) -> Strategy:
    r"""Combine, then adapt: :math:`V \leftarrow W V - \alpha D`.

    With a constant step it stops :math:`O(\alpha)` away from the optimum when the
    nodes' directions differ.

    Args:
        channel: how ``V`` travels.
        optimizer: local step, e.g. ``optax.sgd(0.1)``.

    Returns:
        A strategy with one exchange per update.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(4))
        >>> channel = dbo.channels.exact(dbo.mixing.mixer(w))
        >>> move = diffusion_cta(channel, optax.sgd(0.1))
        >>> v = dbo.replicate(jnp.ones(3), 4)
        >>> moved, _, _ = move.update(jax.random.key(0), v, v, move.init(v))
        >>> bool(jnp.allclose(moved, 0.9 * v))
        True

    References:
        Chen and Sayed (2012), diffusion adaptation.
    """
    return _diffusion(channel, optimizer, adapt_first=False)


def diffusion_atc(
    channel: Channel, optimizer: optax.GradientTransformation
) -> Strategy:
    r"""Adapt, then combine: :math:`V \leftarrow W (V - \alpha D)`.

    Args, return value and bias as for :func:`diffusion_cta`.
    """
    return _diffusion(channel, optimizer, adapt_first=True)


def _diffusion(channel, optimizer, adapt_first) -> Strategy:
    check_parts(channel, optimizer)

    def init(v):
        return MovedState(channel.init(v), jax.vmap(optimizer.init)(v))

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        no_mask(mask, "Diffusion", "each takes its own step")
        delta, opt_state = local_step(optimizer, direction, state.optimizer, v)
        v = add(v, delta) if adapt_first else v
        v, memory, traffic = channel.send(key, v, state.channel)
        v = v if adapt_first else add(v, delta)
        return v, MovedState(memory, opt_state), traffic

    return Strategy(init, update, lift_of(channel))
