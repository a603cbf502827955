"""Gradient tracking: every node follows an estimate of the mean direction."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Channel, State, Strategy, Tree
from dbojax.strategies.common import (
    add,
    check_channel,
    check_parts,
    lift_of,
    local_step,
    no_mask,
)


class TrackingState(NamedTuple):
    """Tracker, the direction it last saw, and the memories of its parts."""

    tracker: Tree  # (n, ...); its node mean equals that of `direction`
    direction: Tree  # (n, ...)
    channel: State
    tracker_channel: State
    optimizer: State


def gradient_tracking(
    channel: Channel,
    optimizer: optax.GradientTransformation,
    tracker_channel: Channel | None = None,
) -> Strategy:
    r"""Move along a tracker of the mean direction (DIGing, non-ATC).

    .. math::
        T \leftarrow W T + D - D^-, \qquad V \leftarrow W V - \alpha T

    The mean of ``T`` equals the mean of ``D`` after every update, whatever the channel
    compresses, so the nodes agree on the optimum of the average.

    Args:
        channel: how ``V`` travels.
        optimizer: local step along ``T``.
        tracker_channel: how ``T`` travels; default as ``V``.

    Returns:
        A strategy with two messages in one packet per update; memories start at zero.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(4))
        >>> channel = dbo.channels.exact(dbo.mixing.mixer(w))
        >>> move, key = gradient_tracking(channel, optax.sgd(0.1)), jax.random.key(0)
        >>> v, d = jnp.zeros((4, 2)), jax.random.normal(key, (4, 2))
        >>> _, state, _ = move.update(key, v, d, move.init(v))
        >>> bool(jnp.allclose(dbo.node_mean(state.tracker), dbo.node_mean(d)))
        True

    References:
        Nedic, Olshevsky and Shi (2017), DIGing; with reference-point channels the
        compressed tracking of BEER, Zhao et al. (2022), arXiv:2201.13320.
    """
    return _tracking(
        channel,
        optimizer,
        tracker_channel,
        combine_tracker_last=False,
        combine_last=False,
    )


def gradient_tracking_semi_atc(
    channel: Channel,
    optimizer: optax.GradientTransformation,
    tracker_channel: Channel | None = None,
) -> Strategy:
    r"""Gradient tracking that combines after the step.

    .. math::
        T \leftarrow W T + D - D^-, \qquad V \leftarrow W (V - \alpha T)

    Args and return value as for :func:`gradient_tracking`.
    """
    return _tracking(
        channel,
        optimizer,
        tracker_channel,
        combine_tracker_last=False,
        combine_last=True,
    )


def gradient_tracking_atc(
    channel: Channel,
    optimizer: optax.GradientTransformation,
    tracker_channel: Channel | None = None,
) -> Strategy:
    r"""Gradient tracking that combines last on both lines (Aug-DGM).

    .. math::
        T \leftarrow W (T + D - D^-), \qquad V \leftarrow W (V - \alpha T)

    ``V`` leaves only after ``T`` has arrived, so an update takes two rounds. Args and
    return value as for :func:`gradient_tracking`.
    """
    return _tracking(
        channel,
        optimizer,
        tracker_channel,
        combine_tracker_last=True,
        combine_last=True,
    )


def _tracking(
    channel, optimizer, tracker_channel, combine_tracker_last, combine_last
) -> Strategy:
    carrier = channel if tracker_channel is None else tracker_channel
    check_parts(channel, optimizer)
    check_channel(carrier, "tracker_channel")

    def init(v):
        zeros = jax.tree.map(jnp.zeros_like, v)
        opt_state = jax.vmap(optimizer.init)(v)
        return TrackingState(
            zeros, zeros, channel.init(v), carrier.init(zeros), opt_state
        )

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        why = "a mean over some of the trackers is not the mean direction"
        no_mask(mask, "Gradient tracking", why)
        key_v, key_tracker = jax.random.split(key)
        change = jax.tree.map(jnp.subtract, direction, state.direction)
        tracker = state.tracker
        tracker = add(tracker, change) if combine_tracker_last else tracker
        tracker, carried, sent_tracker = carrier.send(
            key_tracker, tracker, state.tracker_channel
        )
        tracker = tracker if combine_tracker_last else add(tracker, change)
        delta, opt_state = local_step(optimizer, tracker, state.optimizer, v)
        v = add(v, delta) if combine_last else v
        v, memory, sent = channel.send(key_v, v, state.channel)
        v = v if combine_last else add(v, delta)
        # Only the ATC tracker needs the new direction before it can leave; any other
        # was known one update earlier and shares a packet with V.
        traffic = sent_tracker + sent if combine_tracker_last else sent_tracker | sent
        state = TrackingState(tracker, direction, memory, carried, opt_state)
        return v, state, traffic

    return Strategy(init, update, lift_of(channel))
