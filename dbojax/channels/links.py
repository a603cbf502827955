"""What the ends of a link remember, and one exchange of all workers with a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import (
    Channel,
    Compressor,
    Mix,
    Participation,
    State,
    Traffic,
    Tree,
)
from dbojax.channels.common import compressed


class LinkState(NamedTuple):
    """What both ends of a link remember; the uplink's senders have the node axis."""

    sender: Tree
    receiver: Tree
    compressor: State


class ServerState(NamedTuple):
    """Memories of a server channel."""

    up: LinkState
    down: LinkState


class Link(NamedTuple):
    """A compressor and the rules by which the ends of a link remember."""

    compressor: Compressor
    sender: Callable  # known -> memory
    receiver: Callable  # known -> memory
    target: Callable  # (v, memory) -> what the sender compresses
    keep: Callable  # (target, sent, memory) -> memory of the sender
    # (what all sent, the same over those present, memory) -> (estimate, memory)
    hear: Callable


# The star of imports keeps `compressors.identity` out of here.
EVERYTHING = Compressor(
    init=lambda v: (),
    compress=lambda key, v, state: (v, state),
    decompress=lambda payload, like: payload,
)


def plain(compressor: Compressor | None) -> Link:
    """Nobody remembers."""
    return Link(
        EVERYTHING if compressor is None else compressor,
        sender=lambda known: (),
        receiver=lambda known: (),
        target=lambda v, memory: v,
        keep=lambda target, sent, memory: memory,
        hear=lambda sent, present, memory: (present, memory),
    )


def residual(compressor: Compressor) -> Link:
    """The sender adds what earlier messages left out."""
    return plain(compressor)._replace(
        sender=lambda known: jax.tree.map(jnp.zeros_like, wide(known)),
        target=lambda v, memory: jax.tree.map(jnp.add, v, memory),
        keep=lambda target, sent, memory: jax.tree.map(jnp.subtract, target, sent),
    )


def differences(
    compressor: Compressor, rate: Callable[[Tree], float], gain: float | None
) -> Link:
    """Both ends move a memory by ``rate`` times what is sent.

    The estimate is the memory plus ``gain`` times what is sent, or, if None, the moved
    memory.
    """

    def moved(sent, memory):
        step = rate(sent)
        return jax.tree.map(lambda m, c: m + trees.times(step, c), memory, sent)

    def hear(sent, present, memory):
        after = moved(sent, memory)
        if gain is None:
            return after, after
        step: float = gain
        shifted = jax.tree.map(lambda m, c: m + trees.times(step, c), memory, present)
        return shifted, after

    return Link(
        compressor,
        sender=wide,
        receiver=wide,
        target=lambda v, memory: jax.tree.map(jnp.subtract, v, memory),
        keep=lambda target, sent, memory: moved(sent, memory),
        hear=hear,
    )


def markov(compressor) -> Link:
    """Both ends hold the memory itself, an unbiased compressor's shrunk moves."""
    return differences(compressor, rate_of(compressor), gain=None)


def rate_of(compressor) -> Callable[[Tree], float]:
    """``1 / (1 + omega)`` for an unbiased compressor, 1 for a contraction."""
    if compressor.omega is None:
        return lambda sent: 1.0
    return lambda sent: 1 / (1 + compressor.omega(trees.size(sent)))


def over_server(mix: Mix, up: Link, down: Link) -> Channel:
    """All workers send up one link each, and hear the same answer."""
    n, rows = mix.weights.shape[1], mix.weights.shape[0]

    def init(known):
        trees.check_nodes(known, rows, "known")
        mean = _first(mix.apply(known))
        return ServerState(
            _start(up, known, mean, mix.lift), _start(down, mean, mean, lambda f: f)
        )

    def send(key, v, state, mask=None):
        present = present_rows(mix, mask)
        share = n if mask is None else mask.count
        key_up, key_down = jax.random.split(key)
        target = up.target(v, state.up.sender)
        payload, memory = compressed(
            mix, up.compressor, key_up, target, state.up.compressor
        )
        own, mean = _heard(mix, up.compressor, payload, target, present)
        of_present = jax.tree.map(lambda leaf: trees.times(n / share, leaf), mean)
        estimate, receiver = up.hear(mean, of_present, state.up.receiver)
        # Only who takes part sends, and so remembers.
        sender, memory = trees.where(
            present,
            (mix.lift(up.keep)(target, own, state.up.sender), memory),
            (state.up.sender, state.up.compressor),
        )
        estimate = _cast(estimate, trees.one_node(v))
        held, answer, state_down = _answer(down, key_down, estimate, state.down)
        state = ServerState(LinkState(sender, receiver, memory), state_down)
        held = jax.tree.map(lambda a, b: jnp.broadcast_to(a[None], b.shape), held, v)
        return held, state, _traffic(payload, answer, n, share, down)

    return Channel(init, send, mix, averages=True)


def _start(link: Link, of_senders, of_receiver, lift) -> LinkState:
    sender = link.sender(of_senders)
    memory = lift(link.compressor.init)(link.target(of_senders, sender))
    return LinkState(sender, link.receiver(of_receiver), memory)


def _answer(down: Link, key, estimate, state: LinkState):
    """What all workers hold after the broadcast, its payload, and both memories."""
    target = down.target(estimate, state.sender)
    payload, memory = down.compressor.compress(key, target, state.compressor)
    sent = down.compressor.decompress(payload, target)
    held, receiver = down.hear(sent, sent, state.receiver)
    sender = down.keep(target, sent, state.sender)
    return _cast(held, estimate), payload, LinkState(sender, receiver, memory)


def _heard(mix, compressor, payload, target, present):
    """What each worker sent, decoded, and the sum over those present divided by n."""
    like = trees.one_node(target)

    def decode(message):
        return compressor.decompress(message, like)

    def decode_present(message):
        payload, here = message
        return jax.tree.map(lambda leaf: jnp.where(here, leaf, 0), decode(payload))

    own = mix.lift(decode)(payload)
    if mix.local:
        zeros = jax.tree.map(jnp.zeros_like, own)
        counted = trees.where(present, own, zeros)
        return own, _first(mix.apply(counted))
    if present is None:
        return own, _first(mix.apply(payload, decode))
    return own, _first(mix.apply((payload, present), decode_present))


def _traffic(payload, answer, n, share, down) -> Traffic:
    """Absent workers fetch a dense model when they return, but miss no difference."""
    up_bytes = trees.nbytes(trees.one_node(payload))
    down_bytes = trees.nbytes(answer)
    listeners = share if down.compressor is EVERYTHING else n
    total = up_bytes * share + down_bytes * listeners
    return Traffic(up_bytes, total, rounds=2, down=down_bytes)


def present_rows(mix, mask) -> jax.Array | None:
    """Which rows take part, (rows,), or None for all."""
    if mask is None:
        return None
    example = "dbo.participation(key, n, count)"
    trees.check_type(mask, Participation, "mask", example)
    n = mix.weights.shape[1]
    if mask.mask.shape != (n,):
        raise ValueError(
            f"`mask` must say of {n} workers who takes part; got shape "
            f"{mask.mask.shape}. Draw one with `dbo.participation(key, {n}, count)`."
        )
    return mask.mask[mix.nodes()]


def _first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def wide(tree):
    """Running memories keep their digits when the values are short floats.

    Copies, as no two memories may share a buffer: it could not be donated.
    """
    return jax.tree.map(
        lambda leaf: jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), tree
    )


def _cast(tree, like):
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)
