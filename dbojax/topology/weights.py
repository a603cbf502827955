"""What each node makes of what it hears: weights on a graph."""

from __future__ import annotations

import numpy as np

from dbojax.base import check_mixing_matrix as check
from dbojax.base import is_connected


def _square(adjacency: np.ndarray, weights: str) -> np.ndarray:
    shape = np.shape(adjacency)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            f"`{weights}` weights need an adjacency matrix (n, n), e.g. "
            f"`dbo.topology.ring(10)`; got shape {shape}."
        )
    return np.asarray(adjacency) != 0


def _undirected(adjacency: np.ndarray, weights: str) -> np.ndarray:
    adjacency = _square(adjacency, weights)
    if not np.array_equal(adjacency, adjacency.T):
        raise ValueError(
            f"`{weights}` weights need an undirected graph, but this adjacency is not "
            "symmetric. For a directed graph with equal degrees use "
            "`dbo.topology.uniform`, or symmetrise it with `a | a.T`."
        )
    return adjacency & ~np.eye(len(adjacency), dtype=bool)


def metropolis(adjacency: np.ndarray) -> np.ndarray:
    r"""Metropolis weights, doubly stochastic on any undirected graph.

    .. math:: w_{ij} = 1 / (1 + \max(\deg_i, \deg_j)), \quad w_{ii} = 1 - \sum_j w_{ij}

    Args:
        adjacency: boolean ``(n, n)``, symmetric.

    Returns:
        Mixing matrix ``(n, n)``; 1/3 everywhere on a ring.

    Raises:
        ValueError: if the graph is directed or not connected.

    Examples:
        >>> w = metropolis(dbo.topology.ring(10))
        >>> round(spectral_gap(w), 4)
        0.1273

    References:
        Xiao and Boyd (2004), Fast linear iterations for distributed averaging.
    """
    adjacency = _undirected(adjacency, "metropolis")
    degree = adjacency.sum(axis=1)
    w = adjacency / (1.0 + np.maximum.outer(degree, degree))
    return check(w + np.diag(1 - w.sum(axis=1)))


def laplacian(adjacency: np.ndarray, step: float | None = None) -> np.ndarray:
    r"""Constant edge weights, :math:`W = I - \epsilon L` with the graph Laplacian.

    Args:
        adjacency: boolean ``(n, n)``, symmetric.
        step: epsilon; default ``1 / (1 + max degree)``.

    Raises:
        ValueError: if the graph is directed or not connected, or ``step`` is so large
            that a weight turns negative.
    """
    adjacency = _undirected(adjacency, "laplacian")
    degree = adjacency.sum(axis=1)
    step = 1 / (1 + degree.max(initial=0)) if step is None else step
    return check(np.eye(len(degree)) - step * (np.diag(degree) - adjacency))


def uniform(adjacency: np.ndarray) -> np.ndarray:
    """Equal weights ``1 / (1 + degree)`` on a graph with equal in- and out-degrees.

    Raises:
        ValueError: if the degrees differ: dividing each row by its own degree is not
            doubly stochastic and drifts away from the mean.
    """
    adjacency = _square(adjacency, "uniform")
    degrees = np.concatenate([adjacency.sum(axis=0), adjacency.sum(axis=1)])
    if np.ptp(degrees) > 0:
        raise ValueError(
            "`uniform` weights need equal degrees at all nodes, got degrees from "
            f"{degrees.min()} to {degrees.max()}. Use `dbo.topology.metropolis`."
        )
    return check((adjacency + np.eye(len(adjacency))) / (1.0 + degrees[0]))


def push_weights(adjacency: np.ndarray) -> np.ndarray:
    r"""Equal shares for those who hear a node, and for itself: for push-sum.

    .. math:: a_{ij} = 1 / (1 + \deg^{out}_j) \text{ if i hears j or is j}

    Only columns sum to one, and a node needs to know no more than how many hear it.

    Args:
        adjacency: boolean ``(n, n)``, directed, with a path from every node to every
            other.

    Returns:
        Column-stochastic ``(n, n)``, for ``dbo.networks.fixed``.

    Raises:
        ValueError: if the graph is not strongly connected.

    Examples:
        >>> a = push_weights(dbo.topology.star(3))
        >>> a.sum(axis=0).tolist(), a[0].tolist()
        ([1.0, 1.0, 1.0], [0.3333333333333333, 0.5, 0.5])
    """
    adjacency = _square(adjacency, "push_weights") & ~np.eye(len(adjacency), dtype=bool)
    if not is_connected(adjacency):
        raise ValueError(
            "`push_weights` needs a path from every node to every other along directed "
            "edges; here some never hear of others. Add edges, e.g. a directed cycle."
        )
    return (adjacency + np.eye(len(adjacency))) / (1.0 + adjacency.sum(axis=0))


def lazy(w: np.ndarray, keep: float = 0.5) -> np.ndarray:
    """Mix less: ``keep * I + (1 - keep) * W``; at 1/2 no eigenvalue is negative."""
    if not 0 <= keep < 1:
        raise ValueError(f"`lazy` needs 0 <= keep < 1, got keep={keep}.")
    return keep * np.eye(len(w)) + (1 - keep) * np.asarray(w)


def spectral_gap(w: np.ndarray) -> float:
    r"""Speed of agreement, :math:`1 - \sigma_2(W)`.

    Args:
        w: mixing matrix ``(n, n)``.

    Returns:
        1 for averaging at once, 0 for no agreement; for a symmetric ``w`` it equals
        one less the second largest absolute eigenvalue.

    Examples:
        >>> round(spectral_gap(metropolis(dbo.topology.complete(5))), 12)
        1.0
    """
    w = np.asarray(w)
    return float(1 - np.linalg.norm(w - 1 / len(w), 2))
