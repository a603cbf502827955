"""Graphs and weights: doubly stochastic, connected, with the gaps theory gives."""

import functools

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbojax import topology

UNDIRECTED = {
    "ring": topology.ring(10),
    "ring2": topology.ring(10, hops=2),
    "torus": topology.torus(3, 4),
    "star": topology.star(7),
    "complete": topology.complete(6),
    "hypercube": topology.hypercube(8),
    "erdos_renyi": topology.erdos_renyi(10, 0.4, seed=3),
    "networkx": topology.from_networkx(networkx.petersen_graph()),
}


@pytest.mark.parametrize("graph", UNDIRECTED)
@pytest.mark.parametrize("weights", [topology.metropolis, topology.laplacian])
def test_weights_are_doubly_stochastic_and_live_on_the_edges(graph, weights):
    adjacency = UNDIRECTED[graph]
    w = weights(adjacency)
    np.testing.assert_allclose(w.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(w, w.T, atol=1e-15)
    assert w.min() >= 0
    off_diagonal = ~np.eye(len(w), dtype=bool)
    np.testing.assert_array_equal((w > 0) & off_diagonal, adjacency)


@pytest.mark.parametrize("graph", UNDIRECTED)
def test_gap_is_one_less_the_second_eigenvalue(graph):
    w = topology.metropolis(UNDIRECTED[graph])
    magnitudes = np.sort(np.abs(np.linalg.eigvalsh(w)))
    assert topology.spectral_gap(w) == pytest.approx(1 - magnitudes[-2], abs=1e-12)


def test_gaps_of_the_rings_of_ten():
    gaps = [
        topology.spectral_gap(topology.metropolis(topology.ring(10, hops)))
        for hops in (1, 2)
    ]
    assert gaps == pytest.approx([0.1273, 0.3528], abs=5e-5)


def test_degrees():
    degrees = {name: set(a.sum(axis=1).tolist()) for name, a in UNDIRECTED.items()}
    assert degrees["ring"] == {2}
    assert degrees["ring2"] == degrees["torus"] == {4}
    assert degrees["star"] == {1, 6}
    assert degrees["complete"] == {5}
    assert degrees["hypercube"] == degrees["networkx"] == {3}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_rings_have_no_double_edges(n):
    assert topology.ring(n).sum() == n * (n - 1)
    assert topology.metropolis(topology.ring(n)).sum() == pytest.approx(n)


def test_exponential_graph_hears_powers_of_two_ahead():
    adjacency = topology.exponential(10)
    assert np.flatnonzero(adjacency[7]).tolist() == [1, 5, 8, 9]
    w = topology.uniform(adjacency)
    np.testing.assert_allclose(w[adjacency], 1 / 5)


def test_lazy_weights_have_no_negative_eigenvalue():
    w = topology.lazy(topology.metropolis(topology.star(6)))
    assert np.linalg.eigvalsh(w).min() >= -1e-12


def test_networkx_edges_point_from_speaker_to_hearer():
    adjacency = topology.from_networkx(networkx.DiGraph([(0, 1), (1, 2), (2, 0)]))
    assert adjacency[1, 0]
    assert not adjacency[0, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.floats(0.3, 1.0), st.integers(0, 10**6))
def test_random_graphs_are_connected_reproducible_and_mix(n, p, seed):
    adjacency = topology.erdos_renyi(n, p, seed)
    np.testing.assert_array_equal(adjacency, topology.erdos_renyi(n, p, seed))
    graph = networkx.from_numpy_array(adjacency)
    assert networkx.is_connected(graph)
    assert topology.spectral_gap(topology.metropolis(adjacency)) > 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 10**6))
def test_strong_connectivity_agrees_with_networkx(n, p, seed):
    edges = np.random.default_rng(seed).random((n, n)) < p
    graph = networkx.from_numpy_array(edges, create_using=networkx.DiGraph)
    assert topology.is_connected(edges) == networkx.is_strongly_connected(graph)


REFUSED = {
    "not doubly stochastic": (np.full((3, 3), 0.5), "doubly stochastic"),
    "rows only": (np.array([[0.5, 0.5, 0], [1 / 3] * 3, [0, 0.5, 0.5]]), "doubly"),
    "not connected": (np.eye(3), "not connected"),
    "negative": (np.array([[1.5, -0.5], [-0.5, 1.5]]), "not negative"),
    "not square": (np.ones((2, 3)), r"square, \(n, n\); got shape \(2, 3\)"),
    "not finite": (np.full((2, 2), np.nan), "finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_matrices_are_refused(case):
    w, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        topology.check(w)


CALLS = {
    "metropolis": (lambda: topology.metropolis(topology.exponential(8)), "undirected"),
    "laplacian": (lambda: topology.laplacian(topology.exponential(8)), "undirected"),
    "long step": (lambda: topology.laplacian(topology.ring(4), 0.6), "not negative"),
    "number": (lambda: topology.metropolis(10), r"adjacency matrix \(n, n\)"),
    "oblong": (lambda: topology.uniform(np.ones((3, 2))), r"got shape \(3, 2\)"),
    "uniform": (lambda: topology.uniform(topology.star(4)), "degrees from 1 to 3"),
    "hypercube": (lambda: topology.hypercube(6), "power of two"),
    "probability": (lambda: topology.erdos_renyi(5, 0.0, 0), "probability"),
    "hopeless": (lambda: topology.erdos_renyi(30, 0.001, 0), "raise `p` above"),
    "hops": (lambda: topology.ring(5, 0), "hops >= 1"),
    "no node": (lambda: topology.complete(0), "at least one node"),
    "lazy": (lambda: topology.lazy(np.eye(2), 1.0), "keep"),
    "one way": (
        lambda: topology.push_weights(np.triu(np.ones((3, 3)), 1)),
        "path from every node",
    ),
    "no peer": (lambda: topology.one_peer_exponential(0), "n >= 1 nodes, got n=0"),
    "directed pairs": (
        lambda: topology.random_matchings(topology.exponential(5), 3, 0),
        r"`a \| a\.T`",
    ),
    "pairs apart": (
        lambda: topology.random_matchings(np.eye(4), 3, 0),
        "connected graph",
    ),
    "few pairs": (
        lambda: topology.random_matchings(topology.star(6), 4, 0),
        "raise `steps` above 4",
    ),
    "no pairs": (
        lambda: topology.random_matchings(topology.ring(4), 0, 0),
        "steps >= ",
    ),
    "two islands": (
        lambda: topology.metropolis(np.kron(np.eye(2), topology.complete(2))),
        "not connected",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_settings_say_what_to_write(case):
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("n", [1, 2, 5, 8, 16])
def test_a_turn_of_one_peer_graphs(n):
    ws = topology.one_peer_exponential(n)
    assert len(ws) == max(1, np.ceil(np.log2(n)))
    np.testing.assert_array_equal(ws.sum(axis=1), 1)
    np.testing.assert_array_equal(ws.sum(axis=2), 1)
    assert ((ws > 0).sum(axis=2) <= 2).all()
    reach = (ws.sum(axis=0) > 0) & ~np.eye(n, dtype=bool)
    np.testing.assert_array_equal(reach, topology.exponential(n))
    whole_turn = functools.reduce(np.matmul, ws)
    exact = np.abs(whole_turn - 1 / n).max() < 1e-15
    assert exact == (n & (n - 1) == 0)


@pytest.mark.parametrize("graph", ["ring", "star", "erdos_renyi"])
def test_matchings_average_in_pairs_of_neighbours(graph):
    adjacency = UNDIRECTED[graph]
    ws = topology.random_matchings(adjacency, 30, seed=1)
    np.testing.assert_array_equal(ws, topology.random_matchings(adjacency, 30, seed=1))
    paired = (ws > 0) & ~np.eye(len(adjacency), dtype=bool)
    assert not (paired & ~adjacency).any()
    for w, pairs in zip(ws, paired, strict=True):
        topology.check(0.5 * w + 0.5 / len(w))  # doubly stochastic
        np.testing.assert_array_equal(w @ w, w)
        free = ~pairs.any(axis=1)
        assert not adjacency[np.ix_(free, free)].any()
    assert topology.is_connected(paired.any(axis=0))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_push_weights_share_equally_among_hearers(n, seed):
    edges = np.roll(np.eye(n, dtype=bool), 1, axis=1)
    edges |= np.random.default_rng(seed).random((n, n)) < 0.3
    a = topology.push_weights(edges)
    np.testing.assert_allclose(a.sum(axis=0), 1, atol=1e-15)
    np.testing.assert_array_equal(a > 0, edges | np.eye(n, dtype=bool))
    for column in a.T:
        assert len({*column} - {0.0}) == 1
