"""Methods that correct the bias of diffusion by a dual variable per node.

The dual adds up by how much each node has disagreed with its neighbours; at rest it
cancels the part of a node's direction that the others do not share. One exchange per
update, half of what gradient tracking sends.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Channel, State, Strategy, Tree
from dbojax.strategies.common import add, check_parts, lift_of, local_step, no_mask


class DualState(NamedTuple):
    """The dual, and the memories of the parts."""

    dual: Tree  # (n, ...); its node mean is zero
    channel: State
    optimizer: State


def extra(
    channel: Channel,
    optimizer: optax.GradientTransformation,
    dual_gain: float = 0.5,
) -> Strategy:
    r"""EXTRA: diffusion whose bias a dual takes away.

    .. math::
        V^{k+1} = W V^k - \alpha D^k - P^k, \qquad
        P^{k+1} = P^k + \kappa (V^k - W V^k)

    From :math:`P^0 = 0` and with :math:`\kappa = 1/2` this is the published
    :math:`V^{k+1} = V^k + W V^k - \tfrac12 (I + W) V^{k-1} - \alpha (D^k - D^{k-1})`.

    Args:
        channel: how ``V`` travels between neighbours, over symmetric weights.
        optimizer: local step along ``D``, linear in it, e.g. ``optax.sgd(0.1)``: the
            nodes settle where their steps cancel, which for Adam is elsewhere.
        dual_gain: kappa. Over a channel with reference points the dual must move
            slower than the copies catch up: 1/2 works for compressors that leave out
            little, 0.02 to 0.1 for the biased ones that keep a fifth or a sign. Over a
            network that changes take 0.1 as well: 1/2 diverges where links come and go
            as in random matchings, and shorter steps do not help.

    Returns:
        A strategy with one exchange per update.

    Raises:
        ValueError: if the weights are not symmetric, ``dual_gain`` is not positive, or
            the channel gives nodes an estimate, as a server's does.
        TypeError: if a part is of another kind.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(4))
        >>> move = extra(dbo.channels.exact(dbo.mixing.mixer(w)), optax.sgd(0.3))
        >>> goals = jnp.array([[0.0], [1.0], [2.0], [9.0]])
        >>> def step(_, carry):
        ...     v, state = carry
        ...     return move.update(jax.random.key(0), v, v - goals, state)[:2]
        >>> start = jnp.zeros((4, 1))
        >>> v, _ = jax.lax.fori_loop(0, 200, step, (start, move.init(start)))
        >>> bool(jnp.allclose(v, 3.0, atol=1e-4))
        True

    References:
        Shi, Ling, Wu and Yin (2015), EXTRA, arXiv:1404.6264; the primal-dual form, and
        the gain, are ours.
    """
    exchange = _checked(channel, optimizer, dual_gain, "extra")

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        _all_nodes(mask, "EXTRA")
        delta, opt_state = local_step(optimizer, direction, state.optimizer, v)
        flow, memory, traffic = exchange(key, v, state.channel)
        step = jax.tree.map(jnp.subtract, delta, state.dual)
        moved = add(v, jax.tree.map(jnp.add, flow, step))
        dual = _grown(state.dual, dual_gain, flow)
        return moved, DualState(dual, memory, opt_state), traffic

    return Strategy(_init(channel, optimizer), update, lift_of(channel))


def exact_diffusion(
    channel: Channel,
    optimizer: optax.GradientTransformation,
    dual_gain: float = 0.5,
) -> Strategy:
    r"""Exact diffusion, also known as D²: adapt, correct, combine.

    .. math::
        \Phi = V - \alpha D - P, \qquad V \leftarrow \tfrac12 (\Phi + W \Phi), \qquad
        P \leftarrow P + \kappa (\Phi - W \Phi)

    From :math:`P = 0` and with :math:`\kappa = 1/2` this is the published
    :math:`\Psi^+ = V - \alpha D`, :math:`\Phi = \Psi^+ + V - \Psi`,
    :math:`V \leftarrow \tfrac12 (I + W) \Phi`.

    Args, return value and errors as for :func:`extra`.

    Examples:
        >>> mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(4)))
        >>> move = exact_diffusion(dbo.channels.exact(mix), optax.sgd(0.3))
        >>> v, d = jnp.ones((4, 2)), jnp.array([[1.0, -1.0]] * 2 + [[-1.0, 1.0]] * 2)
        >>> moved, state, traffic = move.update(jax.random.key(0), v, d, move.init(v))
        >>> bool(jnp.allclose(dbo.node_mean(moved), 1.0)), traffic.rounds
        (True, 1)

    References:
        Yuan, Ying, Zhao and Sayed (2019), exact diffusion, arXiv:1702.05122; Tang,
        Lian, Yan, Zhang and Liu (2018), D², arXiv:1803.07068. The gain is ours.
    """
    exchange = _checked(channel, optimizer, dual_gain, "exact_diffusion")

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        _all_nodes(mask, "Exact diffusion")
        return _corrected(exchange, optimizer, dual_gain, key, v, direction, state)

    return Strategy(_init(channel, optimizer), update, lift_of(channel))


class LateState(NamedTuple):
    """A dual that starts one update late."""

    late: DualState
    started: jax.Array  # bool


def nids(
    channel: Channel,
    optimizer: optax.GradientTransformation,
    dual_gain: float = 0.5,
) -> Strategy:
    r"""NIDS with one step size: exact diffusion after a first step on one's own.

    .. math::
        V^1 = V^0 - \alpha D^0, \qquad
        V^{k+1} = \tfrac12 (I + W) \big(2 V^k - V^{k-1} - \alpha (D^k - D^{k-1})\big)

    Traffic counts an exchange in every update, also in the first, which has none.

    Args, return value and errors as for :func:`extra`.

    Examples:
        >>> mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(4)))
        >>> move = nids(dbo.channels.exact(mix), optax.sgd(0.5))
        >>> v, d = jnp.zeros((4, 1)), jnp.array([[1.0], [0.0], [0.0], [0.0]])
        >>> first, _, _ = move.update(jax.random.key(0), v, d, move.init(v))
        >>> first[:, 0].tolist()
        [-0.5, 0.0, 0.0, 0.0]

    References:
        Li, Shi and Yan (2019), NIDS, arXiv:1704.07807.
    """
    exchange = _checked(channel, optimizer, dual_gain, "nids")
    start = _init(channel, optimizer)

    def init(v):
        return LateState(start(v), jnp.zeros((), bool))

    def update(key, v, direction, state, mask=None):
        trees.check_like(direction, v, "direction", "v")
        _all_nodes(mask, "NIDS")
        old, started = state
        mixed, new, traffic = _corrected(
            exchange, optimizer, dual_gain, key, v, direction, old
        )
        delta, _ = local_step(optimizer, direction, old.optimizer, v)

        def chosen(late, now):
            return jax.tree.map(lambda a, b: jnp.where(started, a, b), late, now)

        moved = chosen(mixed, add(v, delta))
        # The first step alone leaves dual and channel as they are.
        new = chosen(new, old)._replace(optimizer=new.optimizer)
        return moved, LateState(new, jnp.ones_like(started)), traffic

    return Strategy(init, update, lift_of(channel))


def _corrected(exchange, optimizer, dual_gain, key, v, direction, state):
    delta, opt_state = local_step(optimizer, direction, state.optimizer, v)
    target = jax.tree.map(jnp.subtract, add(v, delta), state.dual)
    flow, memory, traffic = exchange(key, target, state.channel)
    moved = jax.tree.map(lambda a, b: a + b / 2, target, flow)
    dual = _grown(state.dual, dual_gain, flow)
    return moved, DualState(dual, memory, opt_state), traffic


def _init(channel, optimizer):
    def init(v):
        zeros = jax.tree.map(jnp.zeros_like, v)
        return DualState(zeros, channel.init(v), jax.vmap(optimizer.init)(v))

    return init


def _grown(dual, gain, flow):
    """What flows in is taken from the dual, so that duals add up to zero."""
    return jax.tree.map(lambda p, f: p - trees.times(gain, f), dual, flow)


def _all_nodes(mask, name):
    no_mask(mask, name, "the duals of those present would no longer add up to zero")


def _checked(channel, optimizer, dual_gain, name):
    check_parts(channel, optimizer)
    trees.check_positive(dual_gain, f"{name}(dual_gain)")
    if channel.flow is None:
        raise ValueError(
            f"`{name}` needs a channel between neighbours, where what one gains others "
            "give, else its duals do not add up to zero and it settles elsewhere. "
            "Write `dbo.channels.exact(mix)` or `dbo.channels.reference_point(mix, "
            "compressor, gamma)`; with a server use "
            "`dbo.strategies.allreduce(channel, optimizer)`. A channel of your own "
            "needs its `flow`."
        )
    graphs = [part for part in (channel.mix, channel.network) if part is not None]
    if not all(graph.symmetric for graph in graphs):
        raise ValueError(
            f"`{name}` needs symmetric weights, and those of this channel are not. "
            "Write `dbo.topology.metropolis(a | a.T)`, or use "
            "`dbo.strategies.gradient_tracking(channel, optimizer)`, which any "
            "doubly stochastic matrix suits."
        )
    return channel.flow
