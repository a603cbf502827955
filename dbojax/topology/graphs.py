"""Who hears whom."""

from __future__ import annotations

from typing import Any

import numpy as np

from dbojax.base import is_connected


def _circulant(n: int, offsets: set[int], name: str) -> np.ndarray:
    if n < 1:
        raise ValueError(f"`{name}` needs at least one node, got n={n}.")
    nodes = np.arange(n)
    distance = (nodes[None] - nodes[:, None]) % n
    kept = np.array(sorted({offset % n for offset in offsets} - {0}), dtype=int)
    return np.isin(distance, kept)


def ring(n: int, hops: int = 1) -> np.ndarray:
    """Cycle in which each node hears all nodes up to ``hops`` places away.

    Args:
        n: number of nodes.
        hops: reach on either side; 2 gives the 2-hop ring.

    Returns:
        Adjacency, boolean ``(n, n)``.

    Raises:
        ValueError: if ``n`` or ``hops`` is below one.

    Examples:
        >>> ring(10, hops=2).sum(axis=1).tolist() == [4] * 10
        True
    """
    if hops < 1:
        raise ValueError(f"`ring` needs hops >= 1, got hops={hops}.")
    return _circulant(
        n, {sign * k for k in range(1, hops + 1) for sign in (1, -1)}, "ring"
    )


def torus(rows: int, columns: int) -> np.ndarray:
    """Two-dimensional grid closed on itself: four neighbours each.

    Args:
        rows: nodes along one side.
        columns: nodes along the other.

    Returns:
        Adjacency, boolean ``(rows * columns, rows * columns)``, row-major nodes.

    Examples:
        >>> torus(3, 4).sum(axis=1).tolist() == [4] * 12
        True
    """
    vertical = np.kron(ring(rows), np.eye(columns, dtype=bool))
    return vertical | np.kron(np.eye(rows, dtype=bool), ring(columns))


def star(n: int) -> np.ndarray:
    """Node 0 in the middle of all others; boolean ``(n, n)``."""
    adjacency = _circulant(n, set(), "star")
    adjacency[0, 1:] = adjacency[1:, 0] = True
    return adjacency


def complete(n: int) -> np.ndarray:
    """Every node hears every other; boolean ``(n, n)``."""
    return _circulant(n, set(range(1, n)), "complete")


def hypercube(n: int) -> np.ndarray:
    """Nodes whose binary numbers differ in one digit are neighbours.

    Raises:
        ValueError: if ``n`` is not a power of two.

    Examples:
        >>> hypercube(8).sum(axis=1).tolist() == [3] * 8
        True
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"`hypercube` needs a power of two of nodes, got n={n}.")
    differing = np.bitwise_xor.outer(np.arange(n), np.arange(n))
    return (differing > 0) & (differing & (differing - 1) == 0)


def exponential(n: int) -> np.ndarray:
    """Directed circulant: each node hears those 1, 2, 4, 8, ... places ahead.

    Its weights come from :func:`uniform`, which is doubly stochastic here because
    all nodes have the same in- and out-degree.

    Examples:
        >>> a = exponential(8)
        >>> bool(np.array_equal(a, a.T)), a.sum(axis=0).tolist() == [3] * 8
        (False, True)
    """
    return _circulant(
        n, {2**k for k in range(max(n - 1, 0).bit_length())}, "exponential"
    )


def erdos_renyi(n: int, p: float, seed: int) -> np.ndarray:
    """Random graph with edge probability ``p``, redrawn until it is connected.

    Args:
        n: number of nodes.
        p: probability of each undirected edge.
        seed: start of the draws; the same seed gives the same graph.

    Returns:
        Adjacency, boolean ``(n, n)``, symmetric and connected.

    Raises:
        ValueError: if ``p`` is not in (0, 1], or a thousand draws stay unconnected.
    """
    if not 0 < p <= 1:
        raise ValueError(f"`erdos_renyi` needs a probability 0 < p <= 1, got p={p}.")
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        upper = np.triu(rng.random((n, n)) < p, 1)
        if is_connected(upper | upper.T):
            return upper | upper.T
    raise ValueError(
        f"A thousand graphs with n={n}, p={p} were all unconnected: raise `p` above "
        f"log(n)/n = {np.log(n) / n:.2g}."
    )


def from_networkx(graph: Any) -> np.ndarray:
    """Adjacency of any networkx graph, nodes in its own order; weights are dropped.

    A directed edge from ``j`` to ``i`` means that ``i`` hears ``j``.
    """
    import networkx

    adjacency = networkx.to_numpy_array(graph, weight="").T > 0
    np.fill_diagonal(adjacency, False)
    return adjacency
