"""Mixing matrices that take turns."""

from __future__ import annotations

import numbers

import numpy as np

from dbojax.base import is_connected


def one_peer_exponential(n: int) -> np.ndarray:
    r"""Each node hears one other: in turn those 1, 2, 4, 8, ... places ahead.

    .. math:: W_t = \tfrac12 (I + P^{2^t}), \qquad 0 \le t < \lceil\log_2 n\rceil

    with the cyclic shift ``P``. One message per node and exchange; for a power of two
    of nodes a whole turn is the exact average.

    Args:
        n: number of nodes.

    Returns:
        Doubly stochastic matrices ``(T, n, n)`` for ``dbo.networks.sequence``; dense,
        1.6 GB for 4096 nodes.

    Raises:
        ValueError: if ``n`` is below one.

    Examples:
        >>> first, second, third = one_peer_exponential(8)
        >>> bool(np.allclose(third @ second @ first, 1 / 8))
        True

    References:
        Assran, Loizou, Ballas and Rabbat (2019), arXiv:1811.10792; the exact average:
        Ying, Yuan, Chen, Hu, Pan and Yin (2021), arXiv:2110.13363.
    """
    if not isinstance(n, numbers.Integral) or n < 1:
        raise ValueError(f"`one_peer_exponential` needs n >= 1 nodes, got n={n!r}.")
    turns = max(1, int(n - 1).bit_length())
    own = np.eye(n)
    # Rolled to the left: row i holds its one at i + 2**t.
    return np.stack([(own + np.roll(own, 2**t, axis=1)) / 2 for t in range(turns)])


def random_matchings(adjacency: np.ndarray, steps: int, seed: int) -> np.ndarray:
    r"""Random pairs of neighbours average with each other; the others stay alone.

    .. math:: w_{ij} = w_{ji} = w_{ii} = w_{jj} = \tfrac12 \text{ for each pair } (i, j)

    Edges are taken in random order as long as both ends are free, so that no further
    pair would fit.

    Args:
        adjacency: boolean ``(n, n)``, symmetric.
        steps: how many matrices.
        seed: start of the draws; the same seed gives the same matrices.

    Returns:
        Symmetric doubly stochastic matrices ``(steps, n, n)``, dense, for
        ``dbo.networks.sequence``; all edges of all steps together connect the graph.

    Raises:
        ValueError: if the graph is directed or not connected, ``steps`` is below one,
            or no draw of a hundred connects the nodes.

    Examples:
        >>> w = random_matchings(dbo.topology.ring(6), steps=8, seed=0)
        >>> bool((w == w.swapaxes(1, 2)).all()), int((w > 0).sum(axis=2).max())
        (True, 2)
    """
    heard: np.ndarray = np.asarray(adjacency, dtype=bool)
    if heard.ndim != 2 or not np.array_equal(heard, heard.T):
        raise ValueError(
            "`random_matchings` needs the symmetric adjacency matrix of an undirected "
            f"graph, e.g. `dbo.topology.ring(10)`; got shape {heard.shape}. "
            "Symmetrise a directed one with `a | a.T`."
        )
    if not is_connected(heard):
        raise ValueError(
            "`random_matchings` needs a connected graph, and this one falls apart. Add "
            "edges, or draw another."
        )
    if not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"`random_matchings` needs steps >= 1, got steps={steps!r}.")
    rng = np.random.default_rng(seed)
    edges = np.argwhere(np.triu(heard, 1))
    for _ in range(100):
        drawn = [_matching(rng.permutation(edges)) for _ in range(steps)]
        w = np.stack([_averages(len(heard), pairs) for pairs in drawn])
        if is_connected(w.sum(axis=0)):
            return w
    raise ValueError(
        f"A hundred draws of {steps} matchings of this graph left some nodes apart: "
        f"raise `steps` above {steps}; a node of degree k needs at least k."
    )


def _matching(edges):
    """As many of the edges, in their order, as have no node in common."""
    taken, pairs = set(), []
    for i, j in edges.tolist():
        if not {i, j} & taken:
            taken |= {i, j}
            pairs.append((i, j))
    return pairs


def _averages(n, pairs):
    w = np.eye(n)
    for i, j in pairs:
        w[np.ix_([i, j], [i, j])] = 0.5
    return w
