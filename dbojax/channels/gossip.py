"""Channels between neighbours: everyone moves towards the average it hears of."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Channel, Compressor, Mix, State, Traffic, Tree
from dbojax.channels.common import (
    check_contraction,
    check_gamma,
    check_mix,
    compressed,
    no_mask,
)

_BLOCKS = 64  # exchanges after which a running sum has been mixed anew, about


def exact(mix: Mix, gamma: float = 1.0) -> Channel:
    r"""Send the values themselves and move towards the neighbours' average.

    .. math:: v_i \leftarrow v_i + \gamma \sum_j w_{ij} (v_j - v_i)

    Args:
        mix: multiplies by the mixing matrix.
        gamma: consensus step in (0, 1]; 1 returns ``W v``.

    Returns:
        A channel without memory; a message is one node's dense value.

    Raises:
        ValueError: if ``gamma`` is not in (0, 1].
        TypeError: if an argument is of another kind.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(4))
        >>> channel = exact(dbo.mixing.mixer(w), gamma=0.5)
        >>> v = jnp.array([[0.0], [4.0], [0.0], [0.0]])
        >>> held, _, traffic = channel.send(jax.random.key(0), v, channel.init(v))
        >>> float(held.mean()) == float(v.mean()), traffic.rounds
        (True, 1)
    """
    check_mix(mix, "exact")
    check_gamma(gamma, "exact")

    def init(known):
        trees.check_nodes(known, mix.weights.shape[0], "known")
        return ()

    def send(key, v, state, mask=None):
        del key
        no_mask(mask, "exact")
        if mix.towards is None or _is_one(gamma):
            held = _relax(v, v, mix.apply(v), gamma)
        else:
            held = mix.towards(v, gamma)
        return held, state, _traffic(mix, v)

    def flow(key, v, state, mask=None):
        del key
        no_mask(mask, "exact")
        return _scaled(gamma, _differences(mix, v)), state, _traffic(mix, v)

    averages = mix.averages and _is_one(gamma)
    return Channel(init, send, mix, averages, flow=flow if mix.flow else None)


class ReferencePointState(NamedTuple):
    """Public copies, and what a node keeps of those of its neighbours."""

    hat: Tree  # (n, ...)
    # W times `hat`, (n, ...), as a running sum, where all nodes share one memory; else
    # what each node holds of its neighbours and itself, (n, K, ...).
    heard: Tree
    compressor: State


def reference_point(mix: Mix, compressor: Compressor, gamma: float) -> Channel:
    r"""Send compressed differences to public copies, and mix the copies.

    Node :math:`i` keeps a copy :math:`\hat v_i` that its neighbours also hold. Each
    exchange does

    .. math::
        q_i = C(v_i - \hat v_i), \quad \hat v_i \leftarrow \hat v_i + q_i, \quad
        v_i \leftarrow v_i + \gamma \sum_j w_{ij} (\hat v_j - \hat v_i).

    A node holds its neighbours' copies only as the sum :math:`\sum_j w_{ij} \hat v_j`
    and adds the messages to it, so that a sparse message costs what it weighs. The
    rounding errors of such a sum stay for ever, and a tracker adds them up: in float32
    the mean of trackers drifts off at a steady rate. Where all nodes share one memory
    the copies are therefore mixed anew, all of them or, next to sparse messages, a
    random block of columns in each exchange. A strategy with duals, which would add up
    what is left of the errors, has all of them mixed anew each time. Where nodes are
    spread over devices (``dbo.devices.spread``), each keeps its neighbours' copies,
    ``(n, K, ...)`` in all, and mixes them anew in each exchange.

    Args:
        mix: multiplies by a mixing matrix that stays fixed.
        compressor: any contraction (its ``delta`` is known).
        gamma: consensus step in (0, 1]; smaller for stronger compression.

    Returns:
        A channel whose message is the compressor's payload.

    Raises:
        ValueError: if ``gamma`` is not in (0, 1], or the compressor declares no
            contraction.
        TypeError: if an argument is of another kind.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(4))
        >>> top = dbo.compressors.top_k(1)
        >>> channel = reference_point(dbo.mixing.mixer(w), top, gamma=0.5)
        >>> v = jax.random.normal(jax.random.key(1), (4, 8))
        >>> held, _, _ = channel.send(jax.random.key(0), v, channel.init(0 * v))
        >>> bool(jnp.allclose(dbo.node_mean(held), dbo.node_mean(v)))
        True

    References:
        Koloskova, Stich and Jaggi (2019), arXiv:1902.00340, CHOCO-Gossip. That paper
        writes omega for the contraction that is called delta here.
    """
    check_mix(mix, "reference_point")
    check_gamma(gamma, "reference_point")
    check_contraction(compressor, "reference_point")

    def init(known):
        trees.check_nodes(known, mix.weights.shape[0], "known")
        memory = mix.lift(compressor.init)(known)
        # The zeros of a tracker would be mixed by the compiler, for minutes if large.
        known_late = jax.lax.optimization_barrier(known)
        heard = mix.apply(known_late) if mix.local else mix.exchange(known_late)
        return ReferencePointState(known, heard, memory)

    def said(key, v, state, mask):
        no_mask(mask, "reference_point")
        difference = jax.tree.map(jnp.subtract, v, state.hat)
        return compressed(mix, compressor, key, difference, state.compressor)

    def send(key, v, state, mask=None):
        payload, memory = said(key, v, state, mask)
        if mix.local:
            hat, heard = _absorb(mix, compressor, key, payload, state.hat, state.heard)
            held = _relax(v, hat, heard, gamma)
        else:
            hat, heard, moved = with_copies(payload, state)
            held = jax.tree.map(lambda a, m: a + trees.times(gamma, m), v, moved)
        state = ReferencePointState(hat, heard, memory)
        return held, state, _traffic(mix, payload)

    def flow(key, v, state, mask=None):
        payload, memory = said(key, v, state, mask)
        if mix.local:
            hat = _added(mix, compressor, payload, state.hat)
            moved = _differences(mix, hat)
            heard = jax.tree.map(jnp.add, hat, moved)
        else:
            hat, heard, moved = with_copies(payload, state)
        state = ReferencePointState(hat, heard, memory)
        return _scaled(gamma, moved), state, _traffic(mix, payload)

    def with_copies(payload, state):
        hat = _added(mix, compressor, payload, state.hat)
        heard = _added(mix, compressor, mix.exchange(payload), state.heard, jax.vmap)
        return hat, heard, mix.lift(_apart)(heard, mix.weights, hat)

    return Channel(init, send, mix, flow=flow if mix.flow else None)


class ErrorFeedbackState(NamedTuple):
    """What earlier messages left out."""

    residual: Tree  # (n, ...)
    compressor: State


def error_feedback(mix: Mix, compressor: Compressor, gamma: float) -> Channel:
    r"""Send compressed values with the left-out part added next time.

    .. math::
        a_i = C(v_i + e_i), \quad e_i \leftarrow v_i + e_i - a_i, \quad
        v_i \leftarrow v_i + \gamma \sum_j w_{ij} (a_j - a_i)

    The naive way to compress gossip, kept as an ablation: a message carries the value
    and not its change, so its error does not vanish as the nodes settle.

    Args:
        mix: multiplies by the mixing matrix.
        compressor: any contraction (its ``delta`` is known).
        gamma: consensus step in (0, 1].

    Returns:
        A channel whose message is the compressor's payload.

    Raises:
        ValueError: if ``gamma`` is not in (0, 1], or the compressor declares no
            contraction.
        TypeError: if an argument is of another kind.
    """
    check_mix(mix, "error_feedback")
    check_gamma(gamma, "error_feedback")
    check_contraction(compressor, "error_feedback")

    def init(known):
        trees.check_nodes(known, mix.weights.shape[0], "known")
        zeros = jax.tree.map(jnp.zeros_like, known)
        return ErrorFeedbackState(zeros, mix.lift(compressor.init)(known))

    def said(key, v, state, mask):
        no_mask(mask, "error_feedback")
        target = jax.tree.map(jnp.add, v, state.residual)
        return target, *compressed(mix, compressor, key, target, state.compressor)

    def send(key, v, state, mask=None):
        target, payload, memory = said(key, v, state, mask)
        if mix.local and _scatters(mix, compressor, payload, v):
            # A sum that begins anew each time has no old errors to forget.
            residual = _added(mix, compressor, payload, target, scale=-1.0)
            moved = _moved(mix, compressor, payload, v)
            held = jax.tree.map(lambda a, m: a + trees.times(gamma, m), v, moved)
        else:
            zeros = jax.tree.map(jnp.zeros_like, v)
            sent, mixed = _absorb(mix, compressor, key, payload, zeros, zeros)
            residual = jax.tree.map(jnp.subtract, target, sent)
            held = _relax(v, sent, mixed, gamma)
        return held, ErrorFeedbackState(residual, memory), _traffic(mix, payload)

    def flow(key, v, state, mask=None):
        target, payload, memory = said(key, v, state, mask)
        zeros = jax.tree.map(jnp.zeros_like, v)
        sent = _added(mix, compressor, payload, zeros)
        residual = jax.tree.map(jnp.subtract, target, sent)
        state = ErrorFeedbackState(residual, memory)
        if mix.local:
            moved = _differences(mix, sent)
        else:
            moved = _differences(mix, payload, _decoder(compressor, v))
        return _scaled(gamma, moved), state, _traffic(mix, payload)

    return Channel(init, send, mix, flow=flow if mix.flow else None)


def _absorb(mix, compressor, key, payload, own, mixed):
    """Add the decoded payloads to ``own``, and their neighbours' average to ``mixed``.

    Sender and receivers decode the same payload, so all copies are bit-identical.
    """
    if not mix.local:
        average = mix.apply(payload, _decoder(compressor, own))
        own = _added(mix, compressor, payload, own)
        return own, jax.tree.map(jnp.add, mixed, average)
    if not _scatters(mix, compressor, payload, own):
        decoded = mix.lift(_decoder(compressor, own))(payload)
        own = jax.tree.map(jnp.add, own, decoded)
        return own, mix.apply(own)

    own = _added(mix, compressor, payload, own)
    mixed = _heard(mix, compressor, payload, mixed)
    return own, _refreshed(mix, key, own, mixed)


def _heard(mix, compressor, payload, into):
    """``into`` with what the neighbours say, message by message."""

    def add_all(messages, weights, into):
        def add_one(into, message):
            return compressor.add(*message, into), None

        return jax.lax.scan(add_one, into, (messages, weights))[0]

    return mix.lift(add_all)(mix.exchange(payload), mix.weights, into)


def _moved(mix, compressor, payload, like):
    """What the neighbours say on average, less what a node says itself."""
    zeros = jax.tree.map(jnp.zeros_like, like)
    own = _added(mix, compressor, payload, zeros, scale=-1.0)
    return _heard(mix, compressor, payload, own)


def _decoder(compressor, stacked):
    """One node's payload -> what it says."""
    like = trees.one_node(stacked)
    return lambda message: compressor.decompress(message, like)


def _added(mix, compressor, payload, into, slots=lambda add: add, scale=1.0):
    """``into`` with the decoded payloads; ``slots`` maps over those of one node."""

    def add(message, into):
        if compressor.add is not None:
            return compressor.add(message, scale, into)
        sent = compressor.decompress(message, jax.eval_shape(lambda v: v, into))
        return jax.tree.map(jnp.add, into, sent)

    return mix.lift(slots(add))(payload, into)


def _apart(copies, weights, own):
    """Weighted sum of one node's copies less its own: (K, ...), (K,) -> (...)."""

    def total(copies, own):
        terms = (trees.times(weights[k], copies[k] - own) for k in range(len(copies)))
        return sum(terms, start=jnp.zeros_like(own))

    return jax.tree.map(total, copies, own)


def _refreshed(mix, key, own, mixed):
    """Mix a random block of columns anew, which forgets its rounding errors."""
    # Nodes fold in their own numbers, 0 to n - 1.
    key = jax.random.fold_in(key, mix.weights.shape[0])
    block = jax.random.randint(key, (), 0, _BLOCKS)

    def refresh(own, mixed):
        if not own.size:
            return mixed
        columns, into = (leaf.reshape(leaf.shape[0], -1) for leaf in (own, mixed))
        width = -(-columns.shape[1] // _BLOCKS)
        part = jax.lax.dynamic_slice_in_dim(columns, block * width, width, axis=1)
        part = mix.apply(part)
        into = jax.lax.dynamic_update_slice_in_dim(into, part, block * width, axis=1)
        return into.reshape(own.shape)

    return jax.tree.map(refresh, own, mixed)


def _scatters(mix, compressor, payload, own) -> bool:
    """Whether adding sparse messages one by one beats mixing the decoded ones.

    Measured on CPU with values and indices in the payload: even at k (degree + 1) of
    about a tenth of d, where ``trees.size(payload)`` is 2 k.
    """
    if compressor.add is None:
        return False
    slots = mix.weights.shape[1]
    return 5 * slots * trees.size(payload) <= trees.size(own)


def _relax(v, hat, mixed_hat, gamma):
    """``v + gamma (mixed_hat - hat)``; just ``mixed_hat`` where that is the same."""
    if hat is v and _is_one(gamma):
        return mixed_hat
    return jax.tree.map(
        lambda a, h, m: a + trees.times(gamma, m - h), v, hat, mixed_hat
    )


def _differences(mix, *what):
    assert mix.flow is not None  # else the channel has no `flow` either
    return mix.flow(*what)


def _scaled(gamma, tree):
    return jax.tree.map(lambda leaf: trees.times(gamma, leaf), tree)


def _is_one(gamma) -> bool:
    return isinstance(gamma, int | float) and gamma == 1


def _traffic(mix, payload) -> Traffic:
    message = trees.nbytes(trees.one_node(payload))
    return Traffic(message, message * mix.links, rounds=1)
