"""Networks: what is lost goes back to its sender, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import dbojax as dbo

N = 6
RING = dbo.topology.metropolis(dbo.topology.ring(N))
nets = dbo.networks


def digraph(seed=0, n=N):
    """Strongly connected, with unequal degrees both ways."""
    edges = np.roll(np.eye(n, dtype=bool), 1, axis=1)
    edges |= np.random.default_rng(seed).random((n, n)) < 0.25
    np.fill_diagonal(edges, False)
    return edges


def digraphs(steps=4, n=N):
    """Column-stochastic, few edges each, strongly connected together."""
    draws = np.random.default_rng(3).random((steps, n, n)) < 0.25
    kept = draws | np.eye(n, dtype=bool)
    return kept / kept.sum(axis=1, keepdims=True)


PAIRS = dbo.topology.random_matchings(dbo.topology.complete(N), 9, seed=0)
SYMMETRIC = {
    "fixed": nets.fixed(RING),
    "lossy": nets.lossy(nets.fixed(RING), 0.2),
    "star": nets.lossy(nets.fixed(dbo.topology.metropolis(dbo.topology.star(N))), 0.5),
    "complete": nets.lossy(nets.fixed(np.full((N, N), 1 / N)), 0.3),
    "matchings": nets.sequence(
        dbo.topology.random_matchings(dbo.topology.torus(2, 3), 7, seed=1)
    ),
    "away": nets.away(nets.fixed(RING), [1, 4], 2, 5),
    "all of it": nets.away(nets.lossy(nets.sequence(PAIRS), 0.3), [0], 1, 4),
    "one node": nets.lossy(nets.fixed(np.ones((1, 1))), 0.5),
}
DIRECTED = {
    "one_peer": nets.sequence(dbo.topology.one_peer_exponential(N)),
    "push": nets.fixed(dbo.topology.push_weights(digraph())),
    "push in turns": nets.sequence(digraphs()),
    "push with losses": nets.lossy(nets.sequence(digraphs()), 0.3),
    "push with absences": nets.away(nets.sequence(digraphs()), [2], 1, 5),
    "one_peer with losses": nets.lossy(
        nets.sequence(dbo.topology.one_peer_exponential(N)), 0.3
    ),
}
NETWORKS = SYMMETRIC | DIRECTED


def dense(network, weights):
    """The matrix behind the slots, entry by entry."""
    w = np.zeros((len(network.nodes),) * 2)
    for i, row in enumerate(network.nodes):
        for j, value in zip(row, weights[i], strict=True):
            w[i, j] += value
    return w


def drawn(network, count, seed=0):
    """Matrices of exchanges 0, 1, ..., each from a key of its own."""
    keys = jax.random.split(jax.random.key(seed), count)
    weights = jax.jit(jax.vmap(network.weights))(keys, jnp.arange(count))
    return np.stack([dense(network, row) for row in np.asarray(weights)])


def values(*shape):
    return jnp.asarray(np.random.default_rng(7).normal(size=shape))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_draw_keeps_what_there_is(name):
    network = NETWORKS[name]
    ws = drawn(network, 40)
    assert ws.min() >= 0
    assert np.einsum("tii->ti", ws).min() > 0
    np.testing.assert_allclose(ws.sum(axis=1), 1, atol=1e-14)
    assert network.doubly == (np.abs(ws.sum(axis=2) - 1).max() < 1e-12)
    assert network.symmetric == (np.abs(ws - ws.swapaxes(1, 2)).max() == 0)
    busiest = max((w > 0).sum() - len(w) for w in ws)
    assert busiest <= network.links <= network.nodes.size


@pytest.mark.parametrize("name", NETWORKS)
def test_the_way_back_leads_back(name):
    nodes, reverse = NETWORKS[name].nodes, NETWORKS[name].reverse
    me = np.arange(len(nodes))[:, None]
    np.testing.assert_array_equal(nodes[:, 0], me[:, 0])
    np.testing.assert_array_equal(nodes[nodes, reverse], me + 0 * nodes)
    np.testing.assert_array_equal(reverse[nodes, reverse], np.indices(nodes.shape)[1])
    ever = np.asarray(jax.jit(NETWORKS[name].weights)(jax.random.key(0), 0)) > 0
    assert not ever[:, NETWORKS[name].heard :].any()


@pytest.mark.parametrize("name", ["one_peer", "push in turns"])
def test_sequences_take_turns(name):
    ws = {
        "one_peer": dbo.topology.one_peer_exponential(N),
        "push in turns": digraphs(),
    }[name]
    np.testing.assert_array_equal(drawn(NETWORKS[name], 9), ws[np.arange(9) % len(ws)])


@pytest.mark.parametrize("name", ["complete", "push with losses"])
def test_links_fail_as_often_as_they_should_and_by_themselves(name, key):
    """Links and exchanges in pairs: they fail together as often as by chance."""
    network, rate, count = NETWORKS[name], 0.3, 2000
    keys = jax.random.split(key, count)
    weights = jax.jit(jax.vmap(network.weights, (0, None)))(keys, 0)
    ws = np.stack([dense(network, row) for row in np.asarray(weights)])
    if network.symmetric:
        links = np.triu(np.full((N, N), 1 / N), 1)
    else:
        links = digraphs()[0] * (1 - np.eye(N))
    drawn_ = ws[:, links > 0]
    kept = drawn_ > 0
    np.testing.assert_allclose(drawn_, kept * links[links > 0], atol=1e-15)
    z = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
    assert z.shape[1] > 5
    assert abs(z.sum()) / np.sqrt(z.size) < 5
    together = z.T @ z / np.sqrt(count)
    assert np.abs(together[~np.eye(z.shape[1], dtype=bool)]).max() < 5
    assert np.abs((z[1:] * z[:-1]).sum(axis=0)).max() / np.sqrt(count) < 5


def test_a_link_fails_or_not_whatever_others_there_are(key):
    few, many = SYMMETRIC["lossy"], nets.lossy(nets.fixed(np.full((N, N), 1 / N)), 0.2)
    few, many = (
        dense(net, np.asarray(jax.jit(net.weights)(key, 0))) for net in (few, many)
    )
    on_ring = dbo.topology.ring(N)
    np.testing.assert_array_equal((few > 0)[on_ring], (many > 0)[on_ring])
    assert (many[on_ring] == 0).any()


def test_no_loss_and_no_absence_change_nothing(key):
    network = nets.fixed(RING)
    for same in (nets.lossy(network, 0.0), nets.away(network, [1], 3, 3)):
        np.testing.assert_array_equal(same.weights(key, 3), network.weights(key, 3))


def test_who_is_away_keeps_all_and_hears_nobody():
    ws = drawn(SYMMETRIC["away"], 7)
    for step, w in enumerate(ws):
        if 2 <= step < 5:
            gone, alone = [1, 4], np.eye(N)
            np.testing.assert_array_equal(w[gone], alone[gone])
            np.testing.assert_array_equal(w[:, gone], alone[:, gone])
            assert w[2, 3] == w[3, 2] == pytest.approx(1 / 3)
        else:
            np.testing.assert_allclose(w, RING, atol=1e-15)


def gossip(channel, v, rounds, key, known=None):
    """Exchanges in a row, in one program."""

    def one(carry, key):
        v, state = carry
        v, state, _ = channel.send(key, v, state)
        return (v, state), None

    @jax.jit
    def run(key, v):
        state = channel.init(0 * v if known is None else known)
        return jax.lax.scan(one, (v, state), jax.random.split(key, rounds))[0]

    return run(key, v)


def seen(network, rounds, key):
    """The matrices that `gossip` goes through with this key."""
    keys = jax.random.split(key, rounds)
    keys = jax.vmap(lambda key: jax.random.split(key)[0])(keys)
    weights = jax.jit(jax.vmap(network.weights))(keys, jnp.arange(rounds))
    return np.stack([dense(network, row) for row in np.asarray(weights)])


@pytest.mark.parametrize("name", ["one_peer", "lossy", "all of it", "one node"])
def test_changing_is_the_matrix_of_the_day(name, key):
    network = NETWORKS[name]
    v = values(len(network.nodes), 2, 3)
    held, state = gossip(dbo.channels.changing(network, 0.7), v, 5, key)
    slow = np.asarray(v)
    for w in seen(network, 5, key):
        slow = slow + 0.7 * np.einsum("ij,j...->i...", w - np.eye(len(w)), slow)
    np.testing.assert_allclose(held, slow, atol=1e-14)
    np.testing.assert_allclose(held.mean(0), v.mean(0), atol=1e-14)
    assert int(state.step) == 5


@pytest.mark.parametrize("name", DIRECTED)
def test_pushing_is_the_matrix_of_the_day(name, key):
    network, v = DIRECTED[name], values(N, 2, 3)
    held, _ = gossip(dbo.channels.push(network), v, 5, key)
    slow = np.asarray(v)
    for w in seen(network, 5, key):
        slow = np.einsum("ij,j...->i...", w, slow)
    np.testing.assert_allclose(held, slow, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_values_stay_equal_to_the_last_bit(dtype, key):
    channel = dbo.channels.changing(SYMMETRIC["lossy"])
    v = jnp.full((N, 3), 0.7, dtype)
    held, _ = gossip(channel, v, 20, key)
    assert held.dtype == dtype
    np.testing.assert_array_equal(held.astype(float), v.astype(float))


def test_two_ways_to_write_one_graph_agree(key):
    """Many slots, so that they are scanned, and a form that knows nothing of them."""
    w = dbo.topology.metropolis(dbo.topology.erdos_renyi(40, 0.6, seed=1))
    v = values(40, 3)
    held, _ = gossip(dbo.channels.changing(nets.fixed(w)), v, 2, key)
    np.testing.assert_allclose(held, w @ (w @ np.asarray(v)), atol=1e-14)


COMPRESSORS = toys.compressors()


# The product of parts meets the others.
@pytest.mark.parametrize("compressor", ["top_k", "random_k", "sign", "float16"])
def test_copies_per_link_keep_the_mean(compressor, key):
    v = values(N, 9)
    channel = dbo.channels.changing_reference_point(
        SYMMETRIC["lossy"], COMPRESSORS[compressor], 0.3
    )
    held, _ = gossip(channel, v, 6, key)
    assert float(jnp.abs(held - v).max()) > 1e-3
    np.testing.assert_allclose(held.mean(0), v.mean(0), atol=1e-14)


@pytest.mark.parametrize("name", ["lossy", "star", "all of it", "one node"])
def test_copies_without_compression_are_the_exact_channel(name, key):
    network = SYMMETRIC[name]
    v, everything = values(len(network.nodes), 4), dbo.compressors.identity()
    channel = dbo.channels.changing_reference_point(network, everything, 0.4)
    held, _ = gossip(channel, v, 6, key)
    exact, _ = gossip(dbo.channels.changing(network, 0.4), v, 6, key)
    np.testing.assert_allclose(held, exact, atol=1e-13)


@pytest.mark.parametrize("name", ["lossy", "all of it"])
def test_copies_equal_loops_over_links(name, key):
    network, v = SYMMETRIC[name], values(N, 7)
    top = dbo.compressors.top_k(2)
    channel = dbo.channels.changing_reference_point(network, top, 0.3)
    held, _ = gossip(channel, v, 8, key, known=v[::-1])
    slow, known = np.asarray(v), np.asarray(v)[::-1]
    copies = {(i, j): known[j].copy() for i in range(N) for j in range(N)}
    for w in seen(network, 8, key):
        links = [(i, j) for i, j in copies if i != j and w[i, j] > 0]
        for i, j in links:
            news = slow[j] - copies[i, j]
            kept = np.argsort(-np.abs(news))[:2]
            copies[i, j][kept] += news[kept]
        moved = slow.copy()
        for i, j in links:
            moved[i] += 0.3 * w[i, j] * (copies[i, j] - copies[j, i])
        slow = moved
    np.testing.assert_allclose(held, slow, atol=1e-12)


@pytest.mark.parametrize("compressor", ["top_k", "random_k", "sign"])
def test_nothing_comes_over_a_link_that_is_down(compressor, key):
    """Not even what cannot be multiplied away."""
    v = values(N, 7).at[1].set(jnp.nan)
    channel = dbo.channels.changing_reference_point(
        nets.away(nets.fixed(RING), [1], 0, 3), COMPRESSORS[compressor], 0.3
    )
    held, state = gossip(channel, v, 3, key, known=jnp.zeros_like(v))
    others = np.delete(np.arange(N), 1)
    assert np.isfinite(held[others]).all()
    assert np.isfinite(state.heard).all()


@pytest.mark.parametrize("slots", [3, 40], ids=["written out", "a product"])
def test_sums_over_slots(slots):
    weights, leaf = values(N, slots), values(N * slots, 6).reshape(N, slots, 2, 3)
    total = dbo.trees.over_slots(weights, leaf)
    exact = np.einsum("nk,nkab->nab", weights, leaf)
    np.testing.assert_allclose(total, exact, atol=1e-13)


@pytest.mark.parametrize("compressor", ["top_k", "sign"])
def test_copies_agree_on_the_mean_whatever_is_lost(compressor, key):
    v = values(N, 5)
    channel = dbo.channels.changing_reference_point(
        SYMMETRIC["lossy"], COMPRESSORS[compressor], 0.2
    )
    held, _ = gossip(channel, v, 1500, key)
    np.testing.assert_allclose(held, np.tile(v.mean(0), (N, 1)), atol=1e-6)


def test_traffic_counts_what_is_sent_over_links(key):
    v = values(N, 10)
    top = dbo.compressors.top_k(2)
    matchings = SYMMETRIC["matchings"]
    for network, links in (
        (SYMMETRIC["lossy"], 2 * N),
        (DIRECTED["one_peer"], N),
        (DIRECTED["push"], int(digraph().sum())),
        (matchings, max(int((w > 0).sum()) - N for w in drawn(matchings, 7))),
    ):
        assert network.links == links
    for channel, links, message in (
        (dbo.channels.changing(DIRECTED["one_peer"]), N, 80),
        (dbo.channels.push(DIRECTED["push"]), int(digraph().sum()), 80),
        (
            dbo.channels.changing_reference_point(SYMMETRIC["lossy"], top, 0.3),
            2 * N,
            2 * (8 + 1),
        ),
    ):
        state = jax.eval_shape(channel.init, v)
        held, after, traffic = jax.eval_shape(channel.send, key, v, state)
        assert traffic == dbo.Traffic(message, message * links, 1)
        assert held.dtype == v.dtype
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
            lambda a: (a.shape, a.dtype), state
        )


COLUMNS = np.array([[0.5, 0.5], [0.5, 0.4]])
REFUSED = {
    "columns": (lambda: nets.fixed(COLUMNS), r"off by 0\.1.*push_weights"),
    "rows": (lambda: nets.fixed(dbo.topology.push_weights(digraph()).T), "`w.T`"),
    "not square": (lambda: nets.fixed(np.ones((2, 3))), r"got shape \(2, 3\)"),
    "three axes": (lambda: nets.fixed(np.ones((1, 2, 2))), "square matrices"),
    "not finite": (lambda: nets.fixed(np.full((2, 2), np.nan)), "finite"),
    "negative": (lambda: nets.fixed([[1.5, -0.5], [-0.5, 1.5]]), "least is -0.5"),
    "nothing kept": (lambda: nets.fixed([[0.0, 1.0], [1.0, 0.0]]), r"topology\.lazy"),
    "islands": (lambda: nets.sequence([np.eye(2)] * 3), "not strongly connected"),
    "no matrix": (lambda: nets.sequence([]), "at least one matrix"),
    "sizes": (lambda: nets.sequence([np.ones((1, 1)), RING]), r"\(1, 1\), \(6, 6\)"),
    "rate": (lambda: nets.lossy(nets.fixed(RING), 1.0), "0 <= rate < 1, got 1.0"),
    "who": (lambda: nets.away(nets.fixed(RING), [6], 0, 1), "nodes from 0 to 5"),
    "when": (lambda: nets.away(nets.fixed(RING), [0], 3, 1), "start=3, stop=1"),
    "directed": (
        lambda: dbo.channels.changing(DIRECTED["push"]),
        r"rows sum to one.*dbo\.channels\.push",
    ),
    "one way": (
        lambda: dbo.channels.changing_reference_point(
            DIRECTED["one_peer"], dbo.compressors.identity(), 0.5
        ),
        "needs a symmetric network",
    ),
    "gamma": (lambda: dbo.channels.changing(SYMMETRIC["fixed"], 0), "got 0"),
    "unbiased": (
        lambda: dbo.channels.changing_reference_point(
            SYMMETRIC["fixed"], dbo.compressors.random_k(2), 0.5
        ),
        r"compressors\.scaled",
    ),
    "nodes": (
        lambda: dbo.channels.push(SYMMETRIC["fixed"]).init(np.ones((5, 2))),
        "holds 5 nodes",
    ),
    "mask of nodes": (
        lambda: nets.away(SYMMETRIC["fixed"], np.eye(N, dtype=bool)[2], 0, 1),
        r"numbers of nodes.*flatnonzero",
    ),
    "mask": (
        lambda: dbo.channels.push(SYMMETRIC["fixed"]).send(
            None, None, None, mask=np.ones(6)
        ),
        "takes no mask",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_say_what_to_write(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_parts_of_another_kind_are_refused():
    identity = dbo.compressors.identity()
    for call in (
        lambda: nets.lossy(RING, 0.1),
        lambda: nets.away(RING, [1], 0, 1),
        lambda: dbo.channels.changing(RING),
        lambda: dbo.channels.push(dbo.mixing.mixer(RING)),
        lambda: dbo.channels.changing_reference_point(RING, identity, 0.5),
    ):
        with pytest.raises(TypeError, match=r"Network, e.g. `dbo\.networks\.fixed"):
            call()


def test_finished_parts_and_traced_matrices_are_no_matrices():
    fixed = nets.fixed(RING)
    for part in (dbo.mixing.mixer(RING), fixed, dbo.channels.changing(fixed)):
        for make in (nets.fixed, nets.sequence):
            with pytest.raises(TypeError, match=r"takes matrices.*got a [MNC]"):
                make(part)
    with pytest.raises(TypeError, match=r"cannot be traced.*mixing\.dense"):
        jax.jit(lambda w: nets.fixed(w).links)(RING)
    with pytest.raises(TypeError, match="probability 0 <= rate < 1, got 'a'"):
        nets.lossy(fixed, "a")


def test_float32_matrices_are_taken_as_they_come():
    w = (RING @ RING).astype(np.float32)
    assert nets.fixed(w).symmetric
    assert nets.fixed(w).doubly
