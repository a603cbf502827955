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
        return _relax(mix, v, v, gamma), state, _traffic(mix, v)

    def flow(key, v, state, mask=None):
        del key
        no_mask(mask, "exact")
        return _scaled(gamma, _differences(mix, v)), state, _traffic(mix, v)

    averages = mix.averages and _is_one(gamma)
    return Channel(init, send, mix, averages, flow=flow if mix.flow else None)


class ReferencePointState(NamedTuple):
    """Public copies, and what a node keeps of those of its neighbours."""

    hat: Tree  # (n, ...)
    # Where all nodes share one memory: W times `hat`, (n, ...), as a running sum, or ()
    # where `hat` is mixed anew in each exchange. Else what each node holds of its
    # neighbours and itself, (n, K, ...).
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
        if not mix.local:
            heard = mix.exchange(known_late)
        else:
            state = ReferencePointState(known, (), memory)
            payload, _ = jax.eval_shape(said, jax.random.key(0), known, state)
            keeps_sum = _scatters(mix, compressor, payload, known)
            heard = mix.apply(known_late) if keeps_sum else ()
        return ReferencePointState(known, heard, memory)

    def said(key, v, state, mask=None):
        no_mask(mask, "reference_point")
        difference = jax.tree.map(jnp.subtract, v, state.hat)
        return compressed(mix, compressor, key, difference, state.compressor)

    def send(key, v, state, mask=None):
        payload, memory = said(key, v, state, mask)
        if not mix.local:
            hat, heard, moved = with_copies(payload, state)
            held = jax.tree.map(lambda a, m: a + trees.times(gamma, m), v, moved)
        elif _scatters(mix, compressor, payload, v):
            hat, heard = _absorb(mix, compressor, key, payload, state.hat, state.heard)
            held = _relaxed(v, hat, heard, gamma)
        else:
            hat, heard = _added(mix, compressor, payload, state.hat), ()
            held = _relax(mix, v, hat, gamma)
        state = ReferencePointState(hat, heard, memory)
        return held, state, _traffic(mix, payload)

    def flow(key, v, state, mask=None):
        payload, memory = said(key, v, state, mask)
        if mix.local:
            hat = _added(mix, compressor, payload, state.hat)
            moved = _differences(mix, hat)
            sums = _scatters(mix, compressor, payload, v)
            heard = jax.tree.map(jnp.add, hat, moved) if sums else ()
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
        decode = _decoder(compressor, v)
        sent = mix.lift(decode)(payload)
        if mix.local:
            held = _relax(mix, v, sent, gamma)
        else:
            held = _relaxed(v, sent, mix.apply(payload, decode), gamma)
        residual = jax.tree.map(jnp.subtract, target, sent)
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
    """Add sparse payloads to ``own``, and their neighbours' average to ``mixed``."""

    def one_by_one(messages, weights, into):
        def add_one(into, message):
            return compressor.add(*message, into), None

        return jax.lax.scan(add_one, into, (messages, weights))[0]

    add_all = compressor.add_all or one_by_one
    own = _added(mix, compressor, payload, own)
    received = mix.exchange(payload)
    mixed = mix.lift(add_all)(received, mix.weights, mixed)
    return own, _refreshed(mix, key, own, mixed)


def _decoder(compressor, stacked):
    """One node's payload -> what it says."""
    like = trees.one_node(stacked)
    return lambda message: compressor.decompress(message, like)


def _added(mix, compressor, payload, into, slots=lambda add: add):
    """``into`` with the decoded payloads; ``slots`` maps over those of one node."""

    def add(message, into):
        if compressor.add is not None:
            return compressor.add(message, 1.0, into)
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

    Measured on CPU: even at k (degree + 1) of about a tenth of d, or a sixth where all
    messages of k entries are added in one pass; at half of that on few nodes, whose
    values a matrix product mixes.
    """
    if compressor.add is None:
        return False
    cost = 10 if compressor.add_all is None else 6
    if len(mix.weights) <= trees.FEW:
        cost *= 2
    leaves = jax.tree.leaves(payload)
    values = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # Where values travel as codes, it has as many indices.
    entries = max(trees.size(values), trees.size(payload) // 2)
    return cost * mix.weights.shape[1] * entries <= trees.size(own)


def _relax(mix, v, hat, gamma):
    """``v + gamma (W hat - hat)``."""
    if hat is v and _is_one(gamma):
        return mix.apply(v)
    if mix.towards is not None:
        return mix.towards(v, gamma, None if hat is v else hat)
    return _relaxed(v, hat, mix.apply(hat), gamma)


def _relaxed(v, hat, mixed_hat, gamma):
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
