"""Mixes, networks and channels on a mesh: the same values, the payload's bytes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import dbojax as dbo

C, D, T = dbo.channels, dbo.devices, dbo.topology
N, SIZE = 16, 40
COMPRESSORS = toys.compressors()
GRAPHS = {
    "ring": T.metropolis(T.ring(N)),
    "torus": T.metropolis(T.torus(4, 4)),
    "exponential": T.uniform(T.exponential(N)),
    "erdos_renyi": T.metropolis(T.erdos_renyi(N, 0.3, seed=3)),
}
MESHES = {"one node": 8, "several": 16}  # nodes on 8 devices
TRIPS = 3


def graph(name, n):
    """The first n nodes' worth of a kind of graph."""
    if n == N:
        return GRAPHS[name]
    make = {
        "ring": lambda: T.metropolis(T.ring(8)),
        "torus": lambda: T.metropolis(T.torus(2, 4)),
        "exponential": lambda: T.uniform(T.exponential(8)),
        "erdos_renyi": lambda: T.metropolis(T.erdos_renyi(8, 0.4, seed=3)),
    }
    return make[name]()


def start(n, mesh, dtype=float):
    v = np.random.default_rng(0).normal(size=(n, SIZE)).astype(dtype)
    return D.place(jnp.asarray(v), mesh)


def repeated(channel):
    """A few exchanges in a row, in one loop."""

    def body(carry, key):
        held, state, traffic = channel.send(key, *carry)
        return (held, state), traffic

    def run(v, state, key):
        carry, traffic = jax.lax.scan(body, (v, state), jax.random.split(key, TRIPS))
        return *carry, traffic

    return run


def compiled(channel, v, mesh):
    state = D.place(jax.jit(channel.init)(v), mesh, len(v))
    arguments = v, state, jax.random.key(1)
    return jax.jit(repeated(channel)).lower(*arguments).compile(), arguments


@pytest.mark.parametrize(
    ("name", "devices"), [*((name, 8) for name in GRAPHS), ("ring", 1), ("torus", 2)]
)
def test_mixes_give_what_their_matrix_gives(name, devices):
    w = GRAPHS[name]
    mesh = D.mesh(N, devices=jax.devices()[:devices])
    mix = D.spread(dbo.mixing.mixer(w), mesh)
    v = start(N, mesh)

    @jax.jit
    def all_of_it(v):
        halved = mix.apply(v, lambda row: row / 2)
        heard = mix.exchange({"a": v, "b": v.astype(jnp.float16)[:, :3]})
        return mix.apply(v), mix.flow(v), halved, heard

    mixed, flow, halved, heard = all_of_it(v)
    np.testing.assert_allclose(mixed, w @ v, atol=1e-14)
    np.testing.assert_allclose(flow, w @ v - v, atol=1e-14)
    np.testing.assert_allclose(halved, w @ v / 2, atol=1e-14)
    table = mix.heard
    np.testing.assert_array_equal(heard["a"], np.asarray(v)[table])
    np.testing.assert_array_equal(heard["b"], np.float16(v)[table][..., :3])


# All compressors meet several nodes per device, all graphs both kinds of mesh.
CASES = [
    *(("erdos_renyi", "several", name) for name in COMPRESSORS),
    *((*pair, "top_k") for pair in itertools.product(GRAPHS, MESHES)),
]


@pytest.mark.parametrize(("name", "nodes", "compressor"), sorted(set(CASES)))
def test_the_meter_counts_what_the_program_sends(name, nodes, compressor):
    n = MESHES[nodes]
    mesh, w = D.mesh(n), graph(name, n)
    mix = dbo.mixing.mixer(w)
    spread = D.spread(mix, mesh)
    channel = C.reference_point(spread, COMPRESSORS[compressor], 0.3)
    program, arguments = compiled(channel, start(n, mesh, np.float32), mesh)
    traffic = program(*arguments)[-1]
    block = n // 8
    across = [
        (j, i // block)
        for i, j in zip(*np.nonzero(w), strict=True)
        if i // block != j // block
    ]
    assert D.crossings(mix, mesh) == len(set(across))
    if block == 1:
        assert len(across) == mix.links
    expected = traffic.message * len(set(across)) * TRIPS
    kind = "all-gather" if len(set(across)) == n * 7 else "collective-permute"
    assert D.wire(program) == {kind: expected}


def test_left_to_the_compiler_dense_rows_cross():
    """Why exchanges are written out in `shard_map`."""
    mesh, w = D.mesh(8), graph("ring", 8)
    v, top = start(8, mesh, np.float32), dbo.compressors.top_k(0.1)
    mix = dbo.mixing.mixer(w)
    sent = {}
    for name, part in {"plain": mix, "spread": D.spread(mix, mesh)}.items():
        channel = C.reference_point(part, top, 0.3)
        sent[name] = sum(D.wire(compiled(channel, v, mesh)[0]).values())
    assert sent["plain"] >= 2 * v.nbytes * TRIPS
    assert sent["spread"] < sent["plain"] / 4


MANY = {
    "neighbours": dbo.mixing.mixer(GRAPHS["erdos_renyi"]),
    "more than are written out": dbo.mixing.neighbours(
        T.metropolis(T.erdos_renyi(24, 0.9, seed=1))
    ),
    "mean": dbo.mixing.averaging(N),
}


@pytest.mark.parametrize("name", MANY)
def test_exchanges_can_be_differentiated(name):
    """Gradients follow what travels: the transposed matrix, on any devices."""
    plain = MANY[name]
    n = len(plain.heard)
    w = np.zeros((n, n))
    np.add.at(w, (np.arange(n)[:, None], plain.heard), np.asarray(plain.weights))
    mesh = D.mesh(n)
    mix = D.spread(plain, mesh)
    u, v = np.random.default_rng(1).normal(size=(2, n, 3))

    @jax.jit
    def slopes(v, u):
        out, pull = jax.vjp(lambda v: (mix.apply(v), mix.flow(v), mix.exchange(v)), v)
        _, push = jax.jvp(lambda v: mix.apply(v), (v,), (u,))
        ones = jax.tree.map(jnp.ones_like, out)
        back = pull((u, 2 * u, ones[2]))[0]
        return out, push, back

    (mixed, moved, heard), push, back = slopes(*D.place((v, u), mesh))
    np.testing.assert_allclose(mixed, w @ v, atol=1e-13)
    np.testing.assert_allclose(moved, w @ v - v, atol=1e-13)
    np.testing.assert_array_equal(heard, v[np.asarray(plain.heard)])
    np.testing.assert_allclose(push, w @ u, atol=1e-13)
    times = np.bincount(np.asarray(plain.heard).ravel(), minlength=n)[:, None]
    expected = w.T @ u + 2 * (w.T @ u - u) + times
    np.testing.assert_allclose(back, expected, atol=1e-12)


def test_an_exchange_takes_leaves_of_every_kind():
    mesh = D.mesh(N)
    mix = D.spread(dbo.mixing.mixer(GRAPHS["torus"]), mesh)
    draws = np.random.default_rng(0).normal(size=(N, 3))
    tree = {
        "complex": draws + 1j * draws[::-1],
        "bool": draws > 0,
        "short": draws.astype(jnp.bfloat16),
        "none of it": draws[:, :0],
        "scalar": draws[:, 0],
        "int": draws.astype(np.int16),
    }
    heard = jax.jit(mix.exchange)(D.place(tree, mesh))
    table = np.asarray(mix.heard)
    for name, leaf in tree.items():
        np.testing.assert_array_equal(heard[name], leaf[table], err_msg=name)


def test_equal_short_floats_stay_equal():
    mesh, w = D.mesh(N), T.metropolis(T.erdos_renyi(N, 0.5, seed=2))
    mix = D.spread(dbo.mixing.mixer(w), mesh)
    v = D.place(jnp.full((N, 5), 1.3, jnp.bfloat16), mesh)
    again = jax.jit(lambda v: jax.lax.fori_loop(0, 100, lambda _, v: mix.apply(v), v))
    np.testing.assert_array_equal(again(v), v)


def _bytes(channel, mesh, n, step="send"):
    """What one exchange sends, by the program and by the meter."""
    v = start(n, mesh, np.float32)
    state = D.place(jax.jit(channel.init)(v), mesh, n)
    exchange = jax.jit(getattr(channel, step))
    arguments = jax.random.key(0), v, state
    traffic = jax.eval_shape(exchange, *arguments)[-1]
    return D.wire(exchange.lower(*arguments).compile()), traffic


def test_links_that_are_not_in_turn_carry_nothing():
    mesh = D.mesh(8)
    turns = dbo.networks.sequence(T.one_peer_exponential(8))
    pairs = dbo.networks.sequence(T.random_matchings(T.complete(8), steps=3, seed=0))
    for network, make in (
        (turns, C.changing),
        (turns, C.push),
        (pairs, lambda n: C.changing_reference_point(n, dbo.compressors.top_k(4), 0.3)),
    ):
        sent, traffic = _bytes(make(D.spread(network, mesh)), mesh, 8)
        assert sent == {"collective-permute": traffic.total}
        assert traffic.total == traffic.message * 8
    assert D.crossings(turns, mesh) == 8


@pytest.mark.parametrize("step", ["send", "flow"])
@pytest.mark.parametrize("make", [C.reference_point, C.error_feedback])
def test_payloads_alone_cross_on_the_complete_graph(make, step):
    mesh = D.mesh(8)
    mean = D.spread(dbo.mixing.averaging(8), mesh)
    sent, traffic = _bytes(make(mean, dbo.compressors.top_k(4), 0.3), mesh, 8, step)
    assert sent == {"all-gather": traffic.total}


def test_a_network_of_one_node():
    mesh = D.mesh(1)
    channel = C.changing(D.spread(dbo.networks.fixed(np.ones((1, 1))), mesh))
    v = jnp.ones((1, 3))
    held, _, _ = channel.send(jax.random.key(0), v, channel.init(v))
    np.testing.assert_array_equal(held, v)


def test_nodes_compute_where_they_live():
    """Left to the compiler, convolutions with kernels of one's own would not."""
    mesh, images = D.mesh(8), (2, 6, 6, 1)
    mix = dbo.mixing.mixer(graph("ring", 8))
    spread = D.spread(mix, mesh)

    def loss(kernel, batch):
        out = jax.lax.conv_general_dilated(
            batch, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean((out - 1) ** 2)

    problem = dbo.Problem(
        upper=lambda x, y, batch: loss(y, batch) + jnp.sum(x**2),
        lower=lambda x, y, batch: loss(y, batch) + jnp.sum(jnp.exp(x) * y**2),
    )
    method = dbo.algorithms.d_soba(
        problem, channel=C.exact(spread), upper_step=0.1, lower_step=0.1
    )
    state = D.init(method, jnp.zeros(()), jnp.ones((3, 3, 1, 2)), mesh, n=8)
    batch = D.place(jnp.ones((8, *images)), mesh)
    step = jax.jit(lambda *arguments: method.step(*arguments)[0])
    arguments = jax.random.key(0), state, batch
    traffic = jax.eval_shape(method.step, *arguments)[1].traffic
    sent = D.wire(step.lower(*arguments).compile())
    assert sent == {"collective-permute": traffic.total}


def test_a_mix_is_spread_once():
    mesh = D.mesh(N)
    mix = D.spread(dbo.mixing.mixer(GRAPHS["ring"]), mesh)
    for again in (D.spread, D.crossings):
        with pytest.raises(ValueError, match="for several devices already"):
            again(mix, mesh)


def _channels(spread):
    ring, top = GRAPHS["ring"], dbo.compressors.top_k(0.2)
    mix, mean = spread(dbo.mixing.mixer(ring)), spread(dbo.mixing.averaging(N))
    lossy = spread(dbo.networks.lossy(dbo.networks.fixed(ring), 0.3))
    away = spread(dbo.networks.away(dbo.networks.fixed(ring), [1, 9], 1, 3))
    turns = spread(dbo.networks.sequence(T.one_peer_exponential(N)))
    return {
        "exact": C.exact(mix, 0.5),
        "reference_point": C.reference_point(mix, top, 0.3),
        "on the complete graph": C.reference_point(mean, top, 0.3),
        "error_feedback": C.error_feedback(mix, top, 0.3),
        "changing": C.changing(lossy, 0.5),
        "changing_reference_point": C.changing_reference_point(away, top, 0.3),
        "push": C.push(turns),
        "server": C.server(mean, dbo.compressors.random_k(0.3)),
        "ef21": C.ef21(mean, top, top),
        "smoothed": C.smoothed(C.diana(mean, dbo.compressors.qsgd(16)), 0.5),
    }


@pytest.mark.parametrize("name", _channels(lambda part: part))
def test_channels_do_the_same_on_a_mesh(name):
    ends = []
    meshes = [D.mesh(N, devices=jax.devices()[:k]) for k in (1, 8)]
    for mesh in (None, *meshes):
        part = (
            (lambda part: part) if mesh is None else (lambda p, m=mesh: D.spread(p, m))
        )
        channel = _channels(part)[name]
        v = start(N, mesh or meshes[0])
        state = jax.jit(channel.init)(v)
        if mesh is not None:
            state = D.place(state, mesh, N)
        ends.append(jax.jit(repeated(channel))(v, state, jax.random.key(1)))
    plain, one, many = ends
    np.testing.assert_allclose(plain[0], one[0], atol=1e-13)
    # Nothing but the order of an all-reduce can tell one device from eight.
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=0 if name not in SUMS else 1e-14)
    assert plain[2] == one[2] == many[2]


SUMS = ("server", "ef21", "smoothed")
