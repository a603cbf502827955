"""`communicate` is optax on the mean gradient, wherever the workers are."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as Spec

import dbojax as dbo

N, STEPS = 8, 12
OPTIMISERS = {
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
    "lamb": functools.partial(optax.lamb, weight_decay=0.01),
    "adafactor": functools.partial(optax.adafactor, min_dim_size_to_factor=2),
}
IDENTITY = dbo.compressors.identity()
EXACT = {
    "server": lambda mix: dbo.channels.server(mix, IDENTITY),
    "averaging": dbo.channels.exact,
    "ef14": lambda mix: dbo.channels.ef14(mix, IDENTITY, IDENTITY),
    "ef21": lambda mix: dbo.channels.ef21(mix, IDENTITY),
    "two_way": lambda mix: dbo.channels.two_way(mix, IDENTITY),
}
TOP, SIGN = dbo.compressors.top_k(2), dbo.compressors.sign()
METHODS = {
    "cd_adam": lambda mix, **more: dbo.optim.cd_adam(
        0.05, mix, SIGN, weight_decay=0.1, momentum=0.5, **more
    ),
    "ef_sgd": lambda mix, **more: dbo.optim.ef_sgd(
        0.05, mix, TOP, downlink=SIGN, **more
    ),
    "ef21_sgd": lambda mix, **more: dbo.optim.ef21_sgd(0.05, mix, TOP, **more),
    "ef21_sgdm": lambda mix, **more: dbo.optim.ef21_sgdm(0.05, mix, TOP, 0.3, **more),
    "one_bit": lambda mix, **more: dbo.optim.one_bit_adam(
        0.05, mix, 2, weight_decay=0.1, **more
    ),
    "one_bit_on_gradients": lambda mix, **more: dbo.optim.one_bit_adam_on_gradients(
        0.05, mix, 2, **more
    ),
    "powersgd": lambda mix, **more: dbo.optim.powersgd(0.05, mix, 2, 0.9, **more),
}
COMPRESSED = {
    "ef21 top_k": lambda mix: dbo.channels.ef21(mix, TOP),
    "two_way sign": lambda mix: dbo.channels.two_way(mix, SIGN),
    "server random_k": lambda mix: dbo.channels.server(
        mix, dbo.compressors.random_k(2), dbo.compressors.random_k(3)
    ),
}


def _params(dtype=jnp.float64):
    flat = jnp.linspace(0.5, 2.0, 17, dtype=dtype)
    return {"w": flat[:12].reshape(4, 3), "b": flat[12:16], "s": flat[16]}


def _gradients(steps=STEPS, dtype=jnp.float64):
    rng = np.random.default_rng(5)

    def draw(p):
        return jnp.asarray(1 + rng.normal(size=(steps, N, *p.shape)), dtype)

    return jax.tree.map(draw, _params(dtype))


def _descend(tx, params, gradients):
    """Parameters at the end and the state; call it where the workers live."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]


def _stacked(make, gradients):
    tx = make(dbo.mixing.averaging(N), None)
    params, state = jax.jit(functools.partial(_descend, tx))(_params(), gradients)
    return params, optax.tree.get(state, "traffic")


def _over_axis(make, gradients):
    """All workers under `vmap`, one each."""
    tx = make(dbo.mixing.along("workers", N), "workers")

    def worker(own):
        params, state = _descend(tx, _params(), own)
        return params, optax.tree.get(state, "traffic")

    mapped = jax.vmap(worker, in_axes=1, axis_name="workers")
    params, traffic = jax.jit(mapped)(gradients)
    _agree(params)
    return jax.tree.map(lambda leaf: leaf[0], params), traffic


def _over_devices(make, gradients):
    """All workers under `shard_map`, one on each device."""
    tx = make(dbo.mixing.along("workers", N), "workers")

    def worker(own):
        own = jax.tree.map(lambda leaf: leaf[:, 0], own)
        params, state = _descend(tx, _params(), own)
        stacked = jax.tree.map(lambda leaf: leaf[None], params)
        return stacked, optax.tree.get(state, "traffic")

    mesh = jax.make_mesh((N,), ("workers",), (jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        worker,
        mesh=mesh,
        in_specs=Spec(None, "workers"),
        out_specs=(Spec("workers"), Spec()),
        check_vma=False,
    )
    params, traffic = jax.jit(mapped)(gradients)
    _agree(params)
    return jax.tree.map(lambda leaf: leaf[0], params), traffic


PLACES = {"vmap": _over_axis, "shard_map": _over_devices}


def _agree(params):
    for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def _close(a, b, **tolerance):
    chex.assert_trees_all_close(a, b, **{"rtol": 1e-12, "atol": 1e-12} | tolerance)


def _plain(optimiser, rate, gradients):
    mean = jax.tree.map(lambda leaf: leaf.mean(1), gradients)
    return _descend(optimiser(rate), _params(), mean)[0]


def _communicating(channel, optimiser, rate):
    def make(mix, axis_name):
        through = dbo.communicate(channel(mix), axis_name=axis_name)
        return optax.chain(through, optimiser(rate))

    return make


CASES = [("server", name) for name in OPTIMISERS]
CASES += [("ef21", "sgd"), ("averaging", "adam"), ("ef14", "lamb")]
CASES += [("two_way", "adafactor")]


@pytest.mark.parametrize(("channel", "optimiser"), CASES)
def test_identity_is_optax_on_the_mean_gradient_at_any_rate(channel, optimiser):
    gradients, rates = _gradients(), jnp.array([0.1, 0.03, 0.01])

    def ours(rate):
        make = _communicating(EXACT[channel], OPTIMISERS[optimiser], rate)
        return _descend(make(dbo.mixing.averaging(N), None), _params(), gradients)[0]

    def plain(rate):
        return _plain(OPTIMISERS[optimiser], rate, gradients)

    _close(jax.jit(jax.vmap(ours))(rates), jax.jit(jax.vmap(plain))(rates))


@pytest.mark.parametrize(
    ("channel", "optimiser", "place"),
    [
        ("server", "sgd", "shard_map"),
        ("ef21", "adam", "shard_map"),
        ("server", "lamb", "shard_map"),
        ("ef21", "adafactor", "shard_map"),
        ("ef21", "adam", "vmap"),
    ],
)
def test_identity_is_optax_where_workers_are_apart(channel, optimiser, place):
    make = _communicating(EXACT[channel], OPTIMISERS[optimiser], 0.1)
    params, _ = PLACES[place](make, _gradients())
    _close(params, _plain(OPTIMISERS[optimiser], 0.1, _gradients()))


@pytest.mark.parametrize(
    ("channel", "place"),
    [
        ("ef21 top_k", "shard_map"),
        ("two_way sign", "vmap"),
        ("server random_k", "shard_map"),
    ],
)
def test_compressed_channels_do_the_same_where_workers_are_apart(channel, place):
    make = _communicating(COMPRESSED[channel], OPTIMISERS["sgd"], 0.1)
    params, traffic = PLACES[place](make, _gradients())
    wanted, counted = _stacked(make, _gradients())
    _close(params, wanted)
    assert traffic == counted
    assert 0 < traffic.message < 17 * 8


@pytest.mark.parametrize("method", METHODS)
def test_methods_do_the_same_where_workers_are_apart(method):
    def make(mix, axis_name):
        return METHODS[method](mix, axis_name=axis_name)

    params, traffic = _over_devices(make, _gradients(4))
    wanted, counted = _stacked(make, _gradients(4))
    _close(params, wanted)
    assert traffic == counted


@pytest.mark.parametrize("name", ["exact", "reference_point"])
def test_per_node_over_a_ring_is_a_loop(name):
    w = dbo.topology.metropolis(dbo.topology.ring(N))
    mix = dbo.mixing.mixer(w)
    channel = {
        "exact": dbo.channels.exact(mix),
        "reference_point": dbo.channels.reference_point(mix, IDENTITY, 0.4),
    }[name]
    matrix = w if name == "exact" else np.eye(N) + 0.4 * (w - np.eye(N))
    tx = optax.chain(dbo.communicate(channel), dbo.per_node(optax.adam(0.1)))
    gradients = _gradients()["w"]
    start = jnp.zeros((N, 4, 3))
    params, _ = jax.jit(functools.partial(_descend, tx))(start, gradients)
    for i in range(N):
        mixed = jnp.einsum("j,tjab->tab", matrix[i], gradients)
        _close(params[i], _descend(optax.adam(0.1), start[i], mixed)[0])


@pytest.mark.parametrize("method", ["cd_adam", "one_bit", "powersgd"])
def test_one_trace_and_donated_states(method):
    tx, params = METHODS[method](dbo.mixing.averaging(N)), _params()
    gradient = jax.tree.map(lambda leaf: leaf[0], _gradients())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    buffers = [
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves((params, state))
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    assert len(set(buffers)) == len(buffers)
    for _ in range(4):
        params, state = step(params, state, gradient)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("method", METHODS)
def test_memories_of_short_floats_are_long(method):
    tx, params = METHODS[method](dbo.mixing.averaging(N)), _params(jnp.bfloat16)
    gradients = _gradients(3, jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    descend = functools.partial(_descend, tx)
    moved, after = jax.eval_shape(descend, params, gradients)
    chex.assert_trees_all_equal_shapes_and_dtypes((params, state), (moved, after))
    floats = [
        leaf.dtype
        for leaf in jax.tree.leaves(after)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim
    ]
    short = {"powersgd": [jnp.dtype("bfloat16")] * 2}  # the trace of optax
    assert [d for d in floats if d != jnp.float32] == short.get(method, [])


@pytest.mark.parametrize("method", METHODS)
def test_misfits_are_refused(method):
    tx, params = METHODS[method](dbo.mixing.averaging(N)), _params()
    state, stacked = jax.eval_shape(tx.init, params), dbo.replicate(params, N)
    update = functools.partial(jax.eval_shape, tx.update)
    with pytest.raises(ValueError, match="needs the node axis first"):
        update(params, state, params)
    with pytest.raises(ValueError, match=r"holds 3 nodes on axis 0, .* has 8"):
        update(dbo.replicate(params, 3), state, params)
    with pytest.raises(ValueError, match="must have the structure of `params`"):
        update({"w": stacked["w"]}, state, params)
    with pytest.raises(ValueError, match="must have the shapes of `params`"):
        update(stacked | {"w": jnp.ones((N, 3, 4))}, state, params)


def test_axis_of_another_length_is_refused():
    tx = METHODS["cd_adam"](dbo.mixing.along("workers", 4), axis_name="workers")
    with pytest.raises(ValueError, match="is for an axis of length 4; this one has 8"):
        jax.vmap(tx.init, axis_name="workers")(jnp.ones((N, 3)))


def test_updates_whose_bytes_were_not_counted_are_refused():
    tx = dbo.communicate(dbo.channels.server(dbo.mixing.averaging(N)))
    state = tx.init(jnp.ones(3))
    with pytest.raises(ValueError, match="Cast the updates to the dtypes"):
        tx.update(jnp.ones((N, 3), jnp.float32), state)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda mix: dbo.optim.cd_adam(0.1, mix, dbo.compressors.random_k(2)),
            ValueError,
            r"`cd_adam` needs a contraction, .*scaled",
        ),
        (
            lambda mix: dbo.optim.cd_adam(
                0.1, mix, SIGN, downlink=dbo.compressors.qsgd(3)
            ),
            ValueError,
            "`cd_adam` needs a contraction",
        ),
        (
            lambda mix: dbo.optim.ef_sgd(0.1, mix, dbo.compressors.random_k(2)),
            ValueError,
            "`ef_sgd` needs a contraction",
        ),
        (
            lambda mix: dbo.optim.ef21_sgd(
                0.1, mix, SIGN, downlink=dbo.compressors.qsgd(3)
            ),
            ValueError,
            "`ef21_sgd` needs a contraction",
        ),
        (
            lambda mix: dbo.optim.ef21_sgdm(0.1, mix, dbo.compressors.qsgd(3)),
            ValueError,
            "`ef21_sgdm` needs a contraction",
        ),
        (lambda mix: dbo.optim.cd_adam(0.1, mix, 0.1), TypeError, "a Compressor"),
        (lambda mix: dbo.optim.cd_adam(0.1, 8, SIGN), TypeError, "a Mix"),
        (lambda mix: dbo.optim.powersgd(0.1, 8, 2), TypeError, "a Mix"),
        (lambda mix: dbo.optim.one_bit_adam(0.1, 8, 2), TypeError, "a Mix"),
        (lambda mix: dbo.optim.ef21_sgdm(0.1, mix, SIGN, 0.0), ValueError, "weight"),
        (lambda mix: dbo.optim.powersgd(0.1, mix, 0), ValueError, "rank >= 1"),
        (lambda mix: dbo.optim.one_bit_adam(0.1, mix, 0), ValueError, "freeze >= 1"),
        (lambda mix: dbo.optim.two_step_decay(0.1, 0.5), ValueError, "steps >= 1"),
    ],
)
def test_impossible_settings_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build(dbo.mixing.averaging(N))


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_has_no_server(method):
    ring = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(N)))
    with pytest.raises(ValueError, match="has a server, which hears all workers"):
        METHODS[method](ring)


def test_powersgd_takes_no_mask(key):
    tx, params = METHODS["powersgd"](dbo.mixing.averaging(N)), _params()
    state, mask = tx.init(params), dbo.participation(key, N, 3)
    with pytest.raises(ValueError, match="takes no mask"):
        tx.update(dbo.replicate(params, N), state, params, mask=mask)


@pytest.mark.parametrize("method", ["cd_adam", "one_bit"])
def test_absent_workers_have_no_influence(method, key):
    tx, params = METHODS[method](dbo.mixing.averaging(N)), _params()
    mask = dbo.participation(key, N, 3)
    gradient = jax.tree.map(lambda leaf: leaf[0], _gradients())
    noise = jax.tree.map(
        lambda leaf: jnp.where(
            mask.mask.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, jnp.nan
        ),
        gradient,
    )

    @jax.jit
    def third(gradient):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(gradient, state, params, mask=mask)
        return updates

    _close(third(noise), third(gradient))
