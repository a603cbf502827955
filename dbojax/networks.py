"""Graphs that change from exchange to exchange, lose messages or go one way.

A network is a table of all links that there ever are, and weights on them that depend
on a key and on a count of the exchanges, which every channel keeps for itself. A link
that is down takes nothing along: its weight goes back to the node that sent over it, so
that no column of ``W`` ever loses or wins.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dbojax import trees
from dbojax.base import Network, is_connected, weight_tolerance


def fixed(w: np.ndarray) -> Network:
    r"""The same weights in every exchange, on a graph that may be directed.

    .. math:: v_i \leftarrow \sum_j w_{ij} v_j, \qquad \sum_i w_{ij} = 1

    Args:
        w: ``(n, n)``, doubly stochastic as from ``dbo.topology.metropolis``, or with
            columns alone that sum to one, as from ``dbo.topology.push_weights``.

    Returns:
        A network for ``dbo.channels.changing``, for ``changing_reference_point`` if
        ``w`` is symmetric, or for ``push``.

    Raises:
        ValueError: if ``w`` is not square, finite and non-negative with a positive
            diagonal, a column does not sum to one, or the graph is not connected.
        TypeError: if ``w`` is traced or no matrix.

    Examples:
        >>> network = fixed(dbo.topology.metropolis(dbo.topology.ring(5)))
        >>> network.nodes.shape, network.links, network.symmetric
        ((5, 3), 10, True)
        >>> fixed(dbo.topology.push_weights(dbo.topology.exponential(5))).doubly
        True
    """
    return _network([_matrix(w, "fixed")], "fixed")


def sequence(ws: np.ndarray | Iterable[np.ndarray]) -> Network:
    r"""Weights that take turns, :math:`W_0, W_1, \dots, W_{T-1}, W_0, \dots`.

    Args:
        ws: ``(T, n, n)``, each as for :func:`fixed`, e.g.
            ``dbo.topology.one_peer_exponential(n)``. A single one need not connect the
            nodes if all together do.

    Returns:
        A network whose exchange number ``t`` has the weights ``ws[t % T]``.

    Raises:
        ValueError: as for :func:`fixed`, or if there are no matrices or of different
            sizes.

    Examples:
        >>> turns = sequence(dbo.topology.one_peer_exponential(4))
        >>> channel = dbo.channels.changing(turns)
        >>> v = jnp.array([0.0, 0.0, 0.0, 4.0])
        >>> state, key = channel.init(v), jax.random.key(0)
        >>> for _ in range(2):
        ...     v, state, traffic = channel.send(key, v, state)
        >>> v.tolist(), traffic.total // traffic.message
        ([1.0, 1.0, 1.0, 1.0], 4)
    """
    if isinstance(ws, tuple) and hasattr(ws, "_fields"):
        _matrix(ws, "sequence")
    return _network([_matrix(w, "sequence") for w in ws], "sequence")


def lossy(network: Network, rate: float) -> Network:
    r"""Lose each link with this probability, by itself and in each exchange anew.

    .. math:: w_{ij} \leftarrow 0, \quad w_{jj} \leftarrow w_{jj} + w_{ij}

    where the message from ``j`` to ``i`` is lost: its sender keeps what it would have
    given away. Where the network is symmetric a link fails both ways at once, so that
    it stays symmetric and doubly stochastic, and both ends know by hearing nothing. On
    any other network each direction fails by itself, rows no longer sum to one, and it
    takes an acknowledgement until the sender knows. Values that a strategy sends in one
    packet over channels of their own, as V and its tracker, are lost by themselves.

    Args:
        network: what there is without losses.
        rate: probability in [0, 1).

    Returns:
        A network that counts lost messages as sent.

    Raises:
        ValueError: if ``rate`` is not in [0, 1).
        TypeError: if ``network`` is not one, or ``rate`` no number.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(6))
        >>> network = lossy(fixed(w), 0.2)
        >>> drawn = jax.jit(network.weights)(jax.random.key(0), 0)
        >>> bool(jnp.allclose(drawn.sum(axis=1), 1)), network.doubly
        (True, True)
    """
    _check_network(network, "lossy")
    if not isinstance(rate, numbers.Real | np.ndarray | jax.Array):
        raise TypeError(f"`lossy` needs a probability 0 <= rate < 1, got {rate!r}.")
    if isinstance(rate, numbers.Real) and not 0 <= rate < 1:
        raise ValueError(f"`lossy` needs a probability 0 <= rate < 1, got {rate}.")
    me = _me(network)
    first, second = jnp.asarray(network.nodes), jnp.asarray(me)
    if network.symmetric:
        first, second = jnp.minimum(first, second), jnp.maximum(first, second)

    def weights(key, step):
        key_links, key_network = jax.random.split(key)
        keys = trees.pair_keys(key_links, first, second)
        lost = jax.vmap(jax.vmap(jax.random.uniform))(keys) < rate
        return _without(network, lost, network.weights(key_network, step))

    return network._replace(weights=weights, doubly=network.symmetric)


def away(network: Network, nodes: Sequence[int], start: int, stop: int) -> Network:
    """Take some nodes off the network for a while; they go on by themselves.

    All their links are down, both ways, in the exchanges ``start <= step < stop``, and
    weights return to their senders as in :func:`lossy`. Every channel counts its own
    exchanges: in a method with K inner rounds per step those of y pass K times as fast.

    Args:
        network: what there is while all take part.
        nodes: who leaves.
        start: first exchange without them, from 0.
        stop: first exchange with them again.

    Returns:
        A network with the same links, which stay counted.

    Raises:
        ValueError: if ``nodes`` are not numbers of nodes of the network, or ``start``
            is negative or behind ``stop``.
        TypeError: if ``network`` is not one.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(4))
        >>> network, key = away(fixed(w), [2], start=5, stop=9), jax.random.key(0)
        >>> [float(network.weights(key, step)[2, 0]) < 1 for step in (4, 5, 8, 9)]
        [True, False, False, True]
    """
    _check_network(network, "away")
    n = len(network.nodes)
    gone = np.zeros(n, bool)
    absent = np.asarray(nodes)
    if absent.size and absent.dtype.kind not in "iu":
        raise ValueError(
            f"`away` needs the numbers of nodes, e.g. [1, 4]; got {nodes}. Of a mask "
            "take `np.flatnonzero(mask)`."
        )
    absent = absent.astype(int)
    if absent.size and not 0 <= absent.min() <= absent.max() < n:
        raise ValueError(f"`away` needs nodes from 0 to {n - 1}; got {nodes}.")
    gone[absent] = True
    numbered = isinstance(start, numbers.Real) and isinstance(stop, numbers.Real)
    if numbered and not 0 <= start <= stop:
        raise ValueError(
            f"`away` needs 0 <= start <= stop; got start={start}, stop={stop}."
        )
    down = gone[:, None] | gone[network.nodes]

    def weights(key, step):
        now = (start <= step) & (step < stop)
        return _without(network, down & now, network.weights(key, step))

    return network._replace(weights=weights, doubly=network.symmetric)


def _without(network, down, weights):
    """Weights without the links in the slots where ``down``; senders keep them."""
    nodes, reverse = network.nodes, network.reverse
    lost = jnp.where(down & (nodes != _me(network)), weights, 0)
    # What i gives to those in its slots stands there, in the slots of i.
    back = lost[nodes, reverse].sum(axis=1)
    return (weights - lost).at[:, 0].add(back)


def _me(network):
    """The number of each node in all its slots: (n, K)."""
    numbers_ = np.arange(len(network.nodes), dtype=np.int32)[:, None]
    return np.broadcast_to(numbers_, network.nodes.shape)


def _matrix(w, name) -> np.ndarray:
    """Refuse what is not there to be looked at, or is a finished part."""
    if isinstance(w, Tracer):
        raise TypeError(
            f"`{name}` looks at the entries of its matrices, so they cannot be traced. "
            "For a sweep over graphs write `dbo.channels.exact(dbo.mixing.dense(w))`."
        )
    if isinstance(w, tuple) and hasattr(w, "_fields"):
        raise TypeError(
            f"`{name}` takes matrices of weights, e.g. `dbo.topology.metropolis("
            f"adjacency)`; got a {type(w).__name__}."
        )
    return np.asarray(w)


class _Table(NamedTuple):
    nodes: np.ndarray
    reverse: np.ndarray


def _table(heard: np.ndarray) -> _Table:
    """Slots of a relation without loops, both ways, those heard first."""
    n, linked = len(heard), heard | heard.T
    own, other = np.nonzero(linked)
    order = np.lexsort((other, ~heard[own, other], own))
    own, other = own[order], other[order]
    degrees = linked.sum(axis=1)
    slot = 1 + np.arange(len(own)) - np.repeat(np.cumsum(degrees) - degrees, degrees)
    slots = 1 + int(degrees.max(initial=0))
    nodes = np.tile(np.arange(n, dtype=np.int32)[:, None], slots)
    reverse = np.tile(np.arange(slots, dtype=np.int32), (n, 1))
    nodes[own, slot] = other
    pairs, mirrored = own * n + other, other * n + own
    sorted_ = np.argsort(pairs)
    reverse[own, slot] = slot[sorted_[np.searchsorted(pairs[sorted_], mirrored)]]
    return _Table(nodes, reverse)


def _network(ws, name) -> Network:
    if not ws:
        raise ValueError(
            f"`{name}` needs at least one matrix, e.g. "
            "`dbo.topology.one_peer_exponential(8)`; got none."
        )
    tolerance = max(map(weight_tolerance, ws))
    ws = [_checked(w, tolerance, name) for w in ws]
    if len({w.shape for w in ws}) > 1:
        raise ValueError(
            f"`{name}` needs matrices for the same nodes; got shapes "
            f"{sorted({w.shape for w in ws})}."
        )
    ever = np.asarray(sum(ws)) > 0
    if not is_connected(ever):
        raise ValueError(
            f"The graph of this `{name}` is not strongly connected, all its exchanges "
            "together: some nodes never hear of others, so no method can agree. Add "
            "edges, or draw another graph."
        )
    np.fill_diagonal(ever, False)
    table, heard = _table(ever), 1 + int(ever.sum(axis=1).max())
    links = max(int(np.count_nonzero(w)) - len(w) for w in ws)
    symmetric = all(np.abs(w - w.T).max() <= tolerance for w in ws)
    # To the last bit, so that what one end gives the other gets.
    ws = [(w + w.T) / 2 if symmetric else w for w in ws]
    doubly = all(np.abs(w.sum(axis=1) - 1).max() <= tolerance for w in ws)
    slots = np.stack([_in_slots(w, table.nodes) for w in ws])
    turns = jnp.asarray(slots)

    def weights(key, step):
        del key
        return turns[0] if len(ws) == 1 else turns[step % len(ws)]

    return Network(
        *table,
        weights,
        links,
        heard,
        symmetric,
        doubly,
        slots > 0,
        _total(table.nodes[:, :heard]),
        _swap(table.nodes[:, 1:], table.reverse[:, 1:] - 1),
        jax.vmap,
    )


def _total(nodes):
    def total(v, weights, step, apart=False, decode=None):
        del step  # weights are zero where nothing is heard

        def one(leaf):
            less = leaf if apart else None
            return trees.gathered(leaf, nodes, weights, less=less)

        v = v if decode is None else jax.vmap(decode)(v)
        return jax.tree.map(trees.island(one), v)

    return total


def _swap(nodes, reverse):
    def swap(tree, step=None):
        del step
        return jax.tree.map(lambda leaf: leaf[nodes, reverse], tree)

    return swap


def _in_slots(w, nodes):
    weights = np.take_along_axis(w, nodes, axis=1)
    own = nodes == np.arange(len(w))[:, None]
    own[:, 0] = False
    return np.where(own, 0.0, weights)


def _checked(w, tolerance, name):
    w = np.asarray(w, dtype=np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not w.size:
        raise ValueError(
            f"`{name}` needs square matrices (n, n), e.g. "
            f"`dbo.topology.push_weights(adjacency)`; got shape {w.shape}."
        )
    if not np.isfinite(w).all() or w.min() < 0:
        raise ValueError(
            f"The weights of `{name}` must be finite and not negative; the least is "
            f"{w.min()}."
        )
    if (worst := np.abs(w.sum(axis=0) - 1).max()) > tolerance:
        raise ValueError(
            f"Every column of `{name}` must sum to one, else what nodes hold together "
            f"is lost; one is off by {worst:.3g}. Write "
            "`dbo.topology.push_weights(adjacency)`, or `w.T` if rows sum to one."
        )
    if not w.diagonal().all():
        raise ValueError(
            f"In `{name}` every node must keep a part of its own, w_ii > 0, else it "
            "has nothing left when all it hears is lost. Write `dbo.topology.lazy(w)`."
        )
    return w


def _check_network(network, name):
    example = "dbo.networks.fixed(w)"
    trees.check_type(network, Network, f"{name}(network)", example)
