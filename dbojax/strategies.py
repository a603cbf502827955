"""How one decentralised variable moves along local directions and reaches consensus.

Rows are nodes, ``D`` the stacked directions, ``W V`` one exchange over a channel, and
``-alpha T`` an optax transform that every node applies to its own row of ``T``, e.g.
``optax.sgd(alpha)``.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Channel, State, Strategy, Tree


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


class DiffusionState(NamedTuple):
    """Memories of the parts."""

    channel: State
    optimizer: State


def _diffusion(channel, optimizer, adapt_first) -> Strategy:
    _check_parts(channel, optimizer)

    def init(v):
        return DiffusionState(channel.init(v), jax.vmap(optimizer.init)(v))

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        _no_mask(mask, "Diffusion", "each takes its own step")
        delta, opt_state = _local_step(optimizer, direction, state.optimizer, v)
        v = _add(v, delta) if adapt_first else v
        v, memory, traffic = channel.send(key, v, state.channel)
        v = v if adapt_first else _add(v, delta)
        return v, DiffusionState(memory, opt_state), traffic

    return Strategy(init, update)


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
    _check_parts(channel, optimizer)
    _check_channel(carrier, "tracker_channel")

    def init(v):
        zeros = jax.tree.map(jnp.zeros_like, v)
        opt_state = jax.vmap(optimizer.init)(v)
        return TrackingState(
            zeros, zeros, channel.init(v), carrier.init(zeros), opt_state
        )

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        why = "a mean over some of the trackers is not the mean direction"
        _no_mask(mask, "Gradient tracking", why)
        key_v, key_tracker = jax.random.split(key)
        change = jax.tree.map(jnp.subtract, direction, state.direction)
        tracker = state.tracker
        tracker = _add(tracker, change) if combine_tracker_last else tracker
        tracker, carried, sent_tracker = carrier.send(
            key_tracker, tracker, state.tracker_channel
        )
        tracker = tracker if combine_tracker_last else _add(tracker, change)
        delta, opt_state = _local_step(optimizer, tracker, state.optimizer, v)
        v = _add(v, delta) if combine_last else v
        v, memory, sent = channel.send(key_v, v, state.channel)
        v = v if combine_last else _add(v, delta)
        # Only the ATC tracker needs the new direction before it can leave; any other
        # was known one update earlier and shares a packet with V.
        traffic = sent_tracker + sent if combine_tracker_last else sent_tracker | sent
        state = TrackingState(tracker, direction, memory, carried, opt_state)
        return v, state, traffic

    return Strategy(init, update)


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
    _check_parts(channel, optimizer)
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
        return DiffusionState(channel.init(start), jax.vmap(optimizer.init)(v))

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        mean, memory, traffic = channel.send(key, direction, state.channel, mask)
        delta, opt_state = _local_step(optimizer, mean, state.optimizer, v)
        return _add(v, delta), DiffusionState(memory, opt_state), traffic

    return Strategy(init, update)


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
    _check_strategy(strategy, "moving_average(strategy)")
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
        >>> move = projected(allreduce(mean, optax.sgd(1.0)), ball(1.0))
        >>> v = jnp.zeros((2, 2))
        >>> moved, _, _ = move.update(jax.random.key(0), v, v - 3.0, move.init(v))
        >>> bool(jnp.allclose(jnp.linalg.norm(moved, axis=1), 1.0))
        True
    """
    _check_strategy(strategy, "projected(strategy)")

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


def _no_mask(mask, name, why):
    if mask is not None:
        raise ValueError(
            f"{name} needs all nodes in every round: {why}. Leave `mask`, or "
            "`participants` of `compose`, out, or use "
            "`dbo.strategies.allreduce(channel, optimizer)`."
        )


def _check_strategy(strategy, name):
    example = "dbo.strategies.allreduce(channel, optax.sgd(0.1))"
    trees.check_type(strategy, Strategy, name, example)


def _check_channel(channel, name):
    trees.check_type(channel, Channel, name, "dbo.channels.exact(mix)")


def _check_parts(channel, optimizer):
    _check_channel(channel, "channel")
    kind = optax.GradientTransformation
    trees.check_type(optimizer, kind, "optimizer", "optax.sgd(0.1)")


def _add(v, change):
    # A step size may be a float64 scalar; the variable keeps its dtype.
    return jax.tree.map(lambda a, b: (a + b).astype(a.dtype), v, change)


def _local_step(optimizer, direction, opt_state, v):
    return jax.vmap(optimizer.update)(direction, opt_state, v)
