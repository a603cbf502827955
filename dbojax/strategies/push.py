"""Gradient push: tracking over graphs that go one way."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Channel, State, Strategy, Tree
from dbojax.strategies.common import add, lift_of, local_step, no_mask


class PushState(NamedTuple):
    """What became of the ones, the tracker on its way, and memories."""

    weight: jax.Array  # (n,), of mean one; positive unless it has run out
    tracker: Tree  # (n, ...), as it arrived; sums to the sum of `direction`
    direction: Tree  # (n, ...), the last one
    channel: State
    optimizer: State


def gradient_push(
    channel: Channel, optimizer: optax.GradientTransformation
) -> Strategy:
    r"""Track the mean direction where only columns of the weights sum to one.

    .. math::
        T \leftarrow T + D - D^-, \qquad
        (U, w, T) \leftarrow A \, (w V - \alpha T, w, T), \qquad V \leftarrow U / w

    with :math:`w = 1` and :math:`T = 0` at the start and one ``A`` for all three. Sums
    are all that ``A`` keeps; ``w``, which began as ones, tells how much of everything a
    node has come to hold, and ``U / w`` and ``T / w`` agree on the means. An optimizer
    gets ``T / w``, every node's estimate of the mean direction, and steps in ``V``: for
    ``optax.sgd`` this is the update above.

    A node that gives and hears nobody loses its ``w`` bit by bit, while its own
    directions enter ``T`` in full, so ``T / w`` grows, and after some hundred exchanges
    of hearing nobody ``w`` is zero and its values NaN: where links fail the graph needs
    some to spare, and where nodes leave the others must stay connected both ways.

    Args:
        channel: ``dbo.channels.push(network)``.
        optimizer: local step along ``T / w``.

    Returns:
        A strategy that sends ``U``, ``w`` and ``T`` in one packet per update.

    Raises:
        ValueError: if ``channel`` keeps values, where gradient tracking sends less.
        TypeError: if an argument is of another kind.

    Examples:
        >>> edges = dbo.topology.exponential(5)
        >>> edges[0, 1] = False
        >>> network = dbo.networks.fixed(dbo.topology.push_weights(edges))
        >>> move = gradient_push(dbo.channels.push(network), optax.sgd(0.1))
        >>> v, b, key = jnp.zeros(5), jnp.arange(5.0), jax.random.key(0)
        >>> state, update = move.init(v), jax.jit(move.update)
        >>> for _ in range(200):
        ...     v, state, _ = update(key, v, v - b, state)
        >>> bool(jnp.allclose(v, 2.0, atol=1e-4)), bool(jnp.ptp(state.weight) > 0.1)
        (True, True)

    References:
        Our formulation of Push-DIGing, Nedic, Olshevsky and Shi (2017),
        arXiv:1607.03218: the tracker leaves with the values, not one packet later. With
        stochastic gradients Assran, Loizou, Ballas and Rabbat (2019), arXiv:1811.10792.
    """
    trees.check_type(channel, Channel, "channel", "dbo.channels.push(network)")
    kind = optax.GradientTransformation
    trees.check_type(optimizer, kind, "optimizer", "optax.sgd(0.1)")
    if not channel.pushes:
        raise ValueError(
            "`gradient_push` is for a channel that keeps sums alone, "
            "`dbo.channels.push(network)`; this one keeps values. Over it use "
            "`dbo.strategies.gradient_tracking(channel, optimizer)`, which sends less."
        )

    def init(v):
        zeros = jax.tree.map(jnp.zeros_like, v)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(v))
        weight = jnp.ones(trees.num_nodes(v, "v"), dtype)
        memory = channel.init((v, weight, zeros))
        return PushState(weight, zeros, zeros, memory, jax.vmap(optimizer.init)(v))

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        no_mask(mask, "Gradient push", "what others hold of a sum is missing")
        change = jax.tree.map(jnp.subtract, direction, state.direction)
        tracker = add(state.tracker, change)
        mean = _scaled(1 / state.weight, tracker)
        delta, opt_state = local_step(optimizer, mean, state.optimizer, v)
        shares = _scaled(state.weight, add(v, delta))
        packet = (shares, state.weight, tracker)
        (shares, weight, tracker), memory, traffic = channel.send(
            key, packet, state.channel
        )
        state = PushState(weight, tracker, direction, memory, opt_state)
        return _scaled(1 / weight, shares), state, traffic

    return Strategy(init, update, lift_of(channel))


def _scaled(weight, tree):
    """Every node's row times its weight."""
    return jax.tree.map(lambda leaf: trees.column(weight, leaf) * leaf, tree)
