"""Channels keep the mean, forget nothing and count the bytes that cross."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import dbojax as dbo

COMPRESSORS = toys.compressors()
GRAPHS = toys.graphs()
LOSSY = {
    "reference_point": dbo.channels.reference_point,
    "error_feedback": dbo.channels.error_feedback,
}


def _normal(*shape):
    return jnp.asarray(np.random.default_rng(7).normal(size=shape))


def _values(n=toys.N):
    both = _normal(n, 13)
    a, b = np.split(np.asarray(both), [7], axis=1)
    return {"a": jnp.asarray(a), "b": jnp.asarray(b.reshape(n, 2, 3))}


def _send(channel, v, key):
    """A first exchange, in one program."""
    return jax.jit(lambda key, v: channel.send(key, v, channel.init(v)))(key, v)


def _close(a, b, atol=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def _gossip(channel, v, rounds, key):
    def one(carry, key):
        v, state = carry
        v, state, _ = channel.send(key, v, state)
        return (v, state), None

    @jax.jit
    def run(key, v):
        zeros = jax.tree.map(jnp.zeros_like, v)
        keys = jax.random.split(key, rounds)
        return jax.lax.scan(one, (v, channel.init(zeros)), keys)[0]

    return run(key, v)


@pytest.mark.parametrize("graph", GRAPHS)
def test_exact_is_the_matrix(graph, key):
    w, v = GRAPHS[graph], _values()
    channel = dbo.channels.exact(dbo.mixing.mixer(w), gamma=0.7)
    held, _, _ = _send(channel, v, key)
    slow = np.eye(toys.N) + 0.7 * (w - np.eye(toys.N))
    _close(held, jax.tree.map(lambda a: np.einsum("ij,j...->i...", slow, a), v))


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize(("name", "graph"), toys.star_cover(COMPRESSORS, GRAPHS))
def test_the_mean_is_kept(kind, name, graph, key):
    channel = LOSSY[kind](dbo.mixing.mixer(GRAPHS[graph]), COMPRESSORS[name], 0.3)
    v = _values()
    held, _ = _gossip(channel, v, 5, key)
    assert float(dbo.consensus_error(jax.tree.map(jnp.subtract, held, v))) > 1e-3
    _close(dbo.node_mean(held), dbo.node_mean(v))


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_identity_compressor_is_the_exact_channel(kind, graph, key):
    mix, v = dbo.mixing.mixer(GRAPHS[graph]), _values()
    lossy = LOSSY[kind](mix, dbo.compressors.identity(), 0.4)
    _close(
        _gossip(lossy, v, 6, key)[0],
        _gossip(dbo.channels.exact(mix, 0.4), v, 6, key)[0],
    )


@pytest.mark.parametrize("name", COMPRESSORS)
def test_consensus_is_a_fixed_point(name, key):
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    channel = dbo.channels.reference_point(mix, COMPRESSORS[name], 0.3)
    one = jax.tree.map(lambda a: np.asarray(a)[:1], _values())
    v = jax.tree.map(lambda a: jnp.asarray(np.repeat(a, toys.N, 0)), one)
    held, _, _ = _send(channel, v, key)
    _close(held, v)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_reference_points_reach_agreement_on_the_mean(name, key):
    mix = dbo.mixing.mixer(GRAPHS["erdos_renyi"])
    channel = dbo.channels.reference_point(mix, COMPRESSORS[name], 0.2)
    v = _values()
    held, _ = _gossip(channel, v, 1500, key)
    _close(held, dbo.replicate(dbo.node_mean(v), toys.N), atol=1e-6)


def test_naive_messages_never_settle(key):
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    channel = dbo.channels.error_feedback(mix, dbo.compressors.top_k(0.2), 0.3)
    held, _ = _gossip(channel, _values(), 1500, key)
    assert float(dbo.consensus_error(held)) > 1e-2


_c = dbo.compressors
# Few entries of long vectors: these messages are added to running sums.
SPARSE = {
    "top_k": _c.top_k(3),
    "block_top_k": _c.block_top_k(3),
    "random_k": _c.scaled(_c.random_k(3)),
    "top_k of qsgd": _c.composed(_c.top_k(3), _c.scaled(_c.qsgd(15))),
    "per_leaf": _c.per_leaf(_c.top_k(2)),
    "one by one": _c.top_k(2)._replace(add_all=None),
}


@pytest.mark.parametrize(("name", "graph"), toys.star_cover(SPARSE, GRAPHS))
def test_the_running_sum_is_the_mixed_copies(name, graph, key):
    w = GRAPHS[graph]
    channel = dbo.channels.reference_point(dbo.mixing.mixer(w), SPARSE[name], 0.3)
    v = {"a": _normal(toys.N, 3, 100), "b": _normal(toys.N, 400)}
    _, state = _gossip(channel, v, 20, key)
    mixed = jax.tree.map(lambda a: np.einsum("ij,j...->i...", w, a), state.hat)
    _close(state.heard, mixed)


def test_no_sum_is_kept_of_messages_that_are_not_sparse(key):
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    for part in (_c.sign(), _c.top_k(0.4)):
        _, state = _gossip(
            dbo.channels.reference_point(mix, part, 0.3), _values(), 2, key
        )
        assert state.heard == ()


def test_the_first_running_sum_is_that_of_what_is_known():
    w, v = GRAPHS["star"], _normal(toys.N, 100)
    c = dbo.compressors.top_k(1)
    channel = dbo.channels.reference_point(dbo.mixing.mixer(w), c, 0.3)
    state = jax.jit(channel.init)(v)
    _close(state.hat, v)
    _close(state.heard, jax.tree.map(lambda a: np.einsum("ij,j...->i...", w, a), v))


@pytest.mark.parametrize("length", [20, 400], ids=["mixed", "scattered"])
def test_running_sums_forget_their_rounding_errors(length, key):
    """Else trackers add them up: a drift of the mean that never ends in float32."""
    mix = dbo.mixing.mixer(GRAPHS["erdos_renyi"])
    channel = dbo.channels.reference_point(mix, dbo.compressors.top_k(2), 0.1)
    v = (1e3 * np.asarray(_normal(toys.N, length))).astype(np.float32)

    def send(state, inputs):
        v, key = inputs
        return channel.send(key, v, state)[1], None

    values = np.concatenate([np.stack([v] * 100), np.zeros((1500, *v.shape), v.dtype)])

    @jax.jit
    def run(key, values):
        start, keys = channel.init(0 * values[0]), jax.random.split(key, len(values))
        return jax.lax.scan(send, start, (values, keys))[0]

    state = run(key, values)
    assert not np.asarray(state.hat).any()
    assert not np.asarray(state.heard).any()


def test_copies_of_neighbours_do_what_the_running_sum_does(key):
    """A mix that can act on messages alone keeps each neighbour's copy."""
    w = GRAPHS["erdos_renyi"]
    whole = dbo.mixing.mixer(w)
    for kept in (2, 0.5):
        top = dbo.compressors.top_k(kept)
        a, b = (
            dbo.channels.reference_point(mix, top, 0.3)
            for mix in (whole, whole._replace(local=False))
        )
        v = _normal(toys.N, 200)
        (held, sums), (same, copies) = (_gossip(c, v, 20, key) for c in (a, b))
        _close(held, same)
        _close(sums.hat, copies.hat)
        mixed = np.einsum("ik,ikd->id", whole.weights, copies.heard)
        _close(sums.heard if kept == 2 else jnp.asarray(w) @ sums.hat, mixed)


@pytest.mark.parametrize("kind", ["exact", *LOSSY])
def test_no_setting_changes_the_dtype(kind, key):
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    v = jax.ShapeDtypeStruct((toys.N, 8), jnp.float32)
    for gamma in (0.5, np.float64(0.5), jnp.asarray([0.5], jnp.float64)[0]):
        if kind == "exact":
            channel = dbo.channels.exact(mix, gamma)
        else:
            channel = LOSSY[kind](mix, dbo.compressors.top_k(2), gamma)
        state = jax.eval_shape(channel.init, v)
        held, state, _ = jax.eval_shape(channel.send, key, v, state)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves((held, state))}
        assert dtypes == {np.dtype("float32")}


def test_sparse_messages_are_added_without_a_dense_detour(key):
    """Both ways of adding give the same numbers; sparse ones only scatter."""
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    v = _normal(toys.N, 200)
    sparse = dbo.compressors.top_k(2)
    channel = dbo.channels.reference_point(mix, sparse, 0.3)
    plain = dbo.channels.reference_point(mix, sparse._replace(add=None), 0.3)
    (held, state), (same, mixed) = (_gossip(c, v, 10, key) for c in (channel, plain))
    _close((held, state.hat), (same, mixed.hat))
    text = str(jax.make_jaxpr(channel.send)(key, v, channel.init(v)))
    assert "scatter-add" in text
    assert "roll[" not in text


@pytest.mark.parametrize("share", [0.01, 0.3], ids=["added", "mixed"])
@pytest.mark.parametrize("codes", ["values", "cast", "sign"])
def test_codes_are_added_where_their_values_would_be(codes, share):
    """Few entries are added one by one, whatever they travel as, and many mixed."""
    part = dbo.compressors.top_k(share)
    if codes != "values":
        coded = dbo.compressors.cast(jnp.float16), dbo.compressors.sign()
        part = dbo.compressors.composed(part, coded[codes == "sign"])
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    channel = dbo.channels.reference_point(mix, part, 0.3)
    state = jax.eval_shape(channel.init, jnp.zeros((toys.N, 2000)))
    assert (state.heard != ()) == (share == 0.01)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("kind", LOSSY)
def test_the_meter_counts_the_payload(kind, name, key):
    mix, v = dbo.mixing.mixer(GRAPHS["star"]), _values()
    channel = LOSSY[kind](mix, COMPRESSORS[name], 0.3)
    state = jax.eval_shape(channel.init, v)
    _, _, traffic = jax.eval_shape(channel.send, key, v, state)
    row = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[0]), v)
    c = COMPRESSORS[name]
    payload, _ = jax.jit(lambda key, v: c.compress(key, v, c.init(v)))(key, row)
    message = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(payload))
    assert traffic == dbo.Traffic(message, message * 2 * (toys.N - 1), 1)


def test_dense_messages_count_their_own_bytes(key):
    channel = dbo.channels.exact(dbo.mixing.mixer(GRAPHS["ring"]))
    v = _values()
    traffic = channel.send(key, v, channel.init(v))[2]
    assert traffic == dbo.Traffic(8 * 13, 8 * 13 * 2 * toys.N, 1)


def test_traffic_adds_up():
    one = dbo.Traffic(message=3, total=30, rounds=1)
    assert one | one == dbo.Traffic(6, 60, 1)
    assert one + one == one * 2 == dbo.Traffic(6, 60, 2)
    assert jax.tree.leaves(one) == []
    huge = dbo.Traffic(10**30, 10**31, 10**12)
    assert jax.jit(lambda t: t + t)(huge) == huge * 2


def test_node_keys_depend_on_the_node_alone(key):
    few, many = dbo.trees.node_keys(key, 3), dbo.trees.node_keys(key, 8)
    np.testing.assert_array_equal(
        jax.random.key_data(few), jax.random.key_data(many)[:3]
    )


def test_bad_settings_say_what_to_write(key):
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    top = dbo.compressors.top_k(2)
    with pytest.raises(ValueError, match="0 < gamma <= 1, got 0"):
        dbo.channels.exact(mix, gamma=0)
    with pytest.raises(ValueError, match=r"0 < gamma <= 1, got 1.5"):
        dbo.channels.reference_point(mix, top, gamma=1.5)
    with pytest.raises(ValueError, match=r"dbo\.compressors\.scaled"):
        dbo.channels.reference_point(mix, dbo.compressors.random_k(2), gamma=0.1)
    with pytest.raises(ValueError, match=r"dbo\.compressors\.scaled"):
        dbo.channels.error_feedback(mix, dbo.compressors.qsgd(4), gamma=0.1)
    channel = dbo.channels.exact(mix)
    with pytest.raises(ValueError, match="holds 5 nodes on axis 0, but"):
        channel.init(jnp.ones((5, 2)))
    with pytest.raises(TypeError, match=r"got '0\.5'"):
        dbo.channels.exact(mix, gamma="0.5")
    with pytest.raises(TypeError, match=r"must be a Mix, .* got ndarray"):
        dbo.channels.exact(GRAPHS["ring"])
    with pytest.raises(TypeError, match=r"must be a Compressor, .* got function"):
        dbo.channels.reference_point(mix, dbo.compressors.top_k, 0.5)
    with pytest.raises(ValueError, match="takes no mask"):
        channel.send(key, jnp.ones((toys.N, 2)), (), mask=jnp.ones((toys.N, 1)))


def test_a_compiled_start_does_not_mix_zeros_at_compile_time():
    """The compiler would do it one by one: minutes for thousands of nodes."""
    w = dbo.topology.uniform(dbo.topology.exponential(100))
    channel = dbo.channels.reference_point(
        dbo.mixing.neighbours(w), dbo.compressors.top_k(2), gamma=0.5
    )
    program = jax.jit(lambda: channel.init(jnp.zeros((100, 120)))).lower().compile()
    assert "gather(" in program.as_text()
    assert not program().heard.any()
