"""Channels over networks: weights that change, messages that get lost."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees
from dbojax.base import Channel, Clock, Compressor, Network, State, Traffic, Tree
from dbojax.channels.common import check_contraction, check_gamma, no_mask, sender


def changing(network: Network, gamma: float = 1.0) -> Channel:
    r"""Send the values themselves over a graph that changes or loses messages.

    .. math:: v_i \leftarrow v_i + \gamma \sum_j w_{ij}(t) (v_j - v_i)

    The mean is kept whatever gets lost, and equal values stay equal.

    Args:
        network: doubly stochastic in every exchange, e.g.
            ``dbo.networks.lossy(dbo.networks.fixed(w), 0.2)`` with a symmetric ``w``.
        gamma: consensus step in (0, 1]; 1 returns ``W_t v``.

    Returns:
        A channel that counts its exchanges; a message is one node's dense value.

    Raises:
        ValueError: if ``gamma`` is not in (0, 1], or only the columns of the network's
            matrices sum to one.
        TypeError: if an argument is of another kind.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(4))
        >>> channel = changing(dbo.networks.lossy(dbo.networks.fixed(w), 0.5))
        >>> v, key = jnp.array([0.0, 4.0, 0.0, 0.0]), jax.random.key(0)
        >>> held, _, _ = jax.jit(channel.send)(key, v, channel.init(v))
        >>> bool(jnp.allclose(held.mean(), v.mean()))
        True
    """
    _check_network(network, "changing")
    check_gamma(gamma, "changing")
    if not network.doubly:
        raise ValueError(
            "`changing` needs a network whose rows sum to one in every exchange, else "
            "equal values do not stay equal; this one is directed, or loses messages "
            "one way. Use `dbo.channels.push(network)` with "
            "`dbo.strategies.gradient_push`, or a symmetric `w`."
        )

    def flow(key, v, state, mask=None):
        no_mask(mask, "changing")
        weights = _heard(network, _drawn(network, key, state))
        # Differences: rounded rows, as those of short floats, keep equal values.
        apart = network.total(v, weights, state.step, apart=True)
        moved = jax.tree.map(lambda leaf: trees.times(gamma, leaf), apart)
        return moved, _after(state), _traffic(network, v)

    return Channel(_counter(network), sender(flow), network=network, flow=flow)


def push(network: Network) -> Channel:
    r"""Hand out shares of what each node has: sums are kept, values are not.

    .. math:: v_i \leftarrow \sum_j a_{ij}(t) v_j, \qquad \sum_i a_{ij}(t) = 1

    A node that many send to ends up with more than its share. Push-sum sends ones
    along and divides by what becomes of them.

    Args:
        network: any; it may be directed and change, e.g.
            ``dbo.networks.fixed(dbo.topology.push_weights(adjacency))``.

    Returns:
        A channel for ``dbo.strategies.gradient_push``, which no other strategy takes.

    Raises:
        TypeError: if ``network`` is not one.

    Examples:
        >>> edges = dbo.topology.exponential(5)
        >>> edges[0, 1] = False
        >>> channel = push(dbo.networks.fixed(dbo.topology.push_weights(edges)))
        >>> held, key = (jnp.arange(5.0), jnp.ones(5)), jax.random.key(0)
        >>> state, send = channel.init(held), jax.jit(channel.send)
        >>> for _ in range(50):
        ...     held, state, _ = send(key, held, state)
        >>> bool(jnp.allclose(held[0] / held[1], 2.0)), bool(jnp.allclose(held[0], 2.0))
        (True, False)

    References:
        Kempe, Dobra and Gehrke (2003), push-sum.
    """
    _check_network(network, "push")

    def send(key, v, state, mask=None):
        no_mask(mask, "push")
        weights = _heard(network, _drawn(network, key, state))
        # In short floats the shares of a value would not add up to it.
        moved = trees.cast(network.total(v, weights, state.step, decode=trees.wide), v)
        return moved, _after(state), _traffic(network, v)

    return Channel(_counter(network), send, pushes=True, network=network)


class LinkCopiesState(NamedTuple):
    """What the ends of a link know of each other; (n, K - 1, ...), without oneself."""

    told: Tree  # what the node in a slot knows of this one
    heard: Tree  # what this one knows of the node in a slot
    compressor: State  # for what it sends there
    clock: Clock


def changing_reference_point(
    network: Network, compressor: Compressor, gamma: float
) -> Channel:
    r"""Send compressed differences to copies that belong to single links.

    Over the link from ``j`` to ``i`` both ends keep a copy :math:`\hat v_{ij}` of what
    ``i`` knows of ``j``. An exchange does, on the links that are up,

    .. math::
        \hat v_{ij} \leftarrow \hat v_{ij} + C(v_j - \hat v_{ij}), \qquad
        v_i \leftarrow v_i + \gamma \sum_j w_{ij}(t) (\hat v_{ij} - \hat v_{ji}),

    and leaves the copies of all others as they are. What ``i`` gains ``j`` gives, so
    the mean is kept exactly whatever gets lost. The one copy per node of
    ``dbo.channels.reference_point`` would have to reach all neighbours or none.

    A link that fails does so both ways, so a node that hears nothing knows that nothing
    arrived. Memory: a node keeps two copies for every link, 2 degree values, where
    ``reference_point`` keeps two in all; stacked, all nodes keep as many as the one
    with the most neighbours, which on a star is n times too much.

    Args:
        network: symmetric, e.g. ``dbo.networks.lossy(dbo.networks.fixed(w), 0.2)``.
        compressor: any contraction (its ``delta`` is known).
        gamma: consensus step in (0, 1]; smaller for stronger compression.

    Returns:
        A channel whose message is the compressor's payload, another on each link.

    Raises:
        ValueError: if the network is not symmetric, ``gamma`` is not in (0, 1], or the
            compressor declares no contraction.
        TypeError: if an argument is of another kind.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(4))
        >>> network = dbo.networks.lossy(dbo.networks.fixed(w), 0.2)
        >>> top = dbo.compressors.top_k(1)
        >>> channel = changing_reference_point(network, top, gamma=0.5)
        >>> v = jax.random.normal(jax.random.key(1), (4, 8))
        >>> state, send = channel.init(0 * v), jax.jit(channel.send)
        >>> held, _, _ = send(jax.random.key(0), v, state)
        >>> bool(jnp.allclose(dbo.node_mean(held), dbo.node_mean(v), atol=1e-6))
        True

    References:
        Our formulation of reference points, arXiv:1902.00340, for links that fail.
    """
    name = "changing_reference_point"
    _check_network(network, name)
    check_gamma(gamma, name)
    check_contraction(compressor, name)
    if not network.symmetric:
        raise ValueError(
            f"`{name}` needs a symmetric network, where what one end of a link gains "
            "the other gives, e.g. of `dbo.topology.metropolis(adjacency)`; over this "
            "one the mean would drift. Use `dbo.channels.push(network)` with "
            "`dbo.strategies.gradient_push`."
        )
    others = network.nodes[:, 1:]
    own = np.broadcast_to(np.arange(len(others))[:, None], others.shape)

    def on_links(f):
        return network.lift(jax.vmap(f))

    def init(known):
        trees.check_nodes(known, len(others), "known")
        told = jax.tree.map(lambda leaf: leaf[own], known)
        memory = on_links(compressor.init)(told)
        return LinkCopiesState(told, network.swap(told), memory, _midnight())

    def flow(key, v, state, mask=None):
        no_mask(mask, name)
        weights = _drawn(network, key, state.clock)[:, 1:]
        keys = trees.pair_keys(jax.random.split(key)[1], own, others)
        news = jax.tree.map(lambda a, c: a[:, None] - c, v, state.told)
        payload, memory = on_links(compressor.compress)(keys, news, state.compressor)
        back, up = network.swap(payload, state.clock.step), weights > 0
        arrive = on_links(partial(_arrive, compressor))
        told, heard = arrive(up, payload, state.told), arrive(up, back, state.heard)
        memory = on_links(_chosen)(up, memory, state.compressor)

        def moves(heard, told):
            return trees.times(gamma, trees.over_slots(weights, heard - told))

        state = LinkCopiesState(told, heard, memory, _after(state.clock))
        message = trees.nbytes(trees.one_node(trees.one_node(payload)))
        traffic = Traffic(message, message * network.links, rounds=1)
        return jax.tree.map(moves, heard, told), state, traffic

    return Channel(init, sender(flow), network=network, flow=flow)


def _chosen(up, tree, otherwise):
    return jax.tree.map(partial(jnp.where, up), tree, otherwise)


def _arrive(compressor, up, message, copy):
    """The copy at an end of one link, with what came over it if it is up."""
    if compressor.add is not None:
        nothing = jax.tree.map(jnp.zeros_like, message)
        return compressor.add(_chosen(up, message, nothing), 1.0, copy)
    sent = compressor.decompress(message, jax.eval_shape(lambda v: v, copy))
    return _chosen(up, jax.tree.map(jnp.add, copy, sent), copy)


def _drawn(network, key, clock):
    """Weights of this exchange: all channels draw alike from the same key."""
    return network.weights(jax.random.split(key)[0], clock.step)


def _heard(network, weights):
    """In the slots that ever have one."""
    return weights[:, : network.heard]


def _counter(network):
    def init(known):
        trees.check_nodes(known, len(network.nodes), "known")
        return _midnight()

    return init


def _midnight():
    return Clock(jnp.zeros((), jnp.int32))


def _after(clock):
    return Clock(clock.step + 1)


def _traffic(network, v) -> Traffic:
    message = trees.nbytes(trees.one_node(v))
    return Traffic(message, message * network.links, rounds=1)


def _check_network(network, name):
    trees.check_type(network, Network, f"{name}(network)", "dbo.networks.fixed(w)")
