"""CD-Adam: its invariants, its golden toy and its bits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_server as twin

import dbojax as dbo

TOY = twin.DiagonalToy()
A, C = jnp.asarray(TOY.a), jnp.asarray(TOY.c)
MIX = dbo.mixing.averaging(TOY.n)
SIGN = dbo.compressors.sign()
RATE, LONG = 0.03, 2000


def _adaptive(channel, rate):
    return optax.chain(
        dbo.communicate(channel),
        dbo.optim.scale_by_amsgrad(),
        optax.scale_by_learning_rate(rate),
    )


METHODS = {
    "uncompressed": lambda rate: _adaptive(dbo.channels.server(MIX), rate),
    "cd_adam": lambda rate: dbo.optim.cd_adam(rate, MIX, SIGN),
    "ef": lambda rate: _adaptive(dbo.channels.ef14(MIX, SIGN, SIGN), rate),
    "naive": lambda rate: _adaptive(dbo.channels.server(MIX, SIGN, SIGN), rate),
}
# Squared gradient norms after 10, 50 and 200 steps at a constant rate; the mean of the
# last 50 of 2000 steps with decay.
GOLDEN = {
    "uncompressed": (47.3665415, 2.45952378, 3.64893e-7, 2.5e-29),
    "cd_adam": (48.5609289, 2.08217645, 2.12239e-2, 1.4e-6),
    "ef": (57.5508387, 13.2336814, 0.107327, 6.2e-4),
    "naive": (53.2254799, 39.8086961, 68.9, 68.8),
}


def _run(tx, steps, states=True):
    """Squared norms of the mean gradient after each step, and maybe the states."""

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(A * (x[None] - C), state, x)
        x = x + updates
        slope = (A * (x[None] - C)).mean(0)
        return (x, state), (slope @ slope, state) if states else slope @ slope

    x = jnp.zeros(TOY.d)
    return jax.jit(lambda: jax.lax.scan(step, (x, tx.init(x)), None, length=steps)[1])()


@pytest.fixture(scope="module")
def golden():
    """Squared norms along 2000 steps of each method, at both rates: (2, steps)."""
    decay = dbo.optim.two_step_decay(RATE, LONG)

    def at(make, decays):
        return _run(
            make(lambda step: jnp.where(decays, decay(step), RATE)), LONG, states=False
        )

    both = jnp.array([False, True])
    return {
        name: jax.jit(jax.vmap(lambda decays, make=make: at(make, decays)))(both)
        for name, make in METHODS.items()
    }


def test_the_toy_is_the_golden_one():
    assert TOY.a.sum() == pytest.approx(513.643011598, abs=1e-8)
    assert TOY.c.sum() == pytest.approx(-45.919736061, abs=1e-8)
    assert TOY.value(TOY.start) == pytest.approx(284.430546753, abs=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_golden_rows(method, golden):
    constant, decayed = np.asarray(golden[method])
    tenth, fiftieth, last, settled = GOLDEN[method]
    np.testing.assert_allclose(constant[[9, 49]], (tenth, fiftieth), 1e-6)
    assert last / 3 < float(constant[199]) < 3 * last
    assert settled / 3 < float(decayed[-50:].mean()) < 3 * settled


def test_naive_signs_stall(golden):
    rows = jax.tree.map(np.asarray, golden)
    settled = {name: row[1, -50:].mean() for name, row in rows.items()}
    assert settled["naive"] > 1e6 * settled["cd_adam"]


def test_identity_is_amsgrad():
    tx = dbo.optim.cd_adam(RATE, MIX, dbo.compressors.identity(), weight_decay=0.1)
    plain = optax.chain(
        dbo.communicate(dbo.channels.server(MIX)),
        optax.add_decayed_weights(0.1),
        dbo.optim.scale_by_amsgrad(),
        optax.scale_by_learning_rate(RATE),
    )
    np.testing.assert_allclose(_run(tx, 100)[0], _run(plain, 100)[0], rtol=1e-10)


def test_memories_of_both_ends_agree():
    _, states = _run(dbo.optim.cd_adam(RATE, MIX, SIGN), 200)
    links = states[0].channel
    np.testing.assert_allclose(
        links.up.receiver, links.up.sender.mean(1), rtol=0, atol=1e-12
    )
    np.testing.assert_array_equal(links.down.sender, links.down.receiver)


def test_the_error_follows_the_change_of_the_gradient():
    """With pi of each vector, on both links, over 4000 random steps."""
    n, d = 4, 50
    channel = dbo.channels.two_way(dbo.mixing.averaging(n), SIGN)

    def pi(v):
        return 1 - jnp.abs(v).sum(-1) ** 2 / (d * (v**2).sum(-1))

    def excess(old, new, memory, moved):
        """Left sides over right sides of both inequalities, at most 1."""
        share = pi(new - memory)
        error, before = ((new - moved) ** 2).sum(-1), ((old - memory) ** 2).sum(-1)
        change = ((new - old) ** 2).sum(-1)
        first = error / (share * ((new - memory) ** 2).sum(-1))
        root = jnp.sqrt(share)
        return jnp.maximum(first, error / (root * before + share / (1 - root) * change))

    def step(carry, key):
        v, state = carry
        kinds, draw = jax.random.split(key)
        size = jnp.exp(3 * jax.random.normal(kinds))
        new = v + size * jax.random.normal(draw, (n, d))
        _, after, _ = channel.send(key, new, state)
        up = excess(v, new, state.up.sender, after.up.sender)
        down = excess(
            state.up.receiver, after.up.receiver, state.down.sender, after.down.sender
        )
        return (new, after), (up.max(), down)

    v = jnp.ones((n, d))
    keys = jax.random.split(jax.random.key(1), 4000)

    @jax.jit
    def run(keys):
        start = channel.send(jax.random.key(0), v, channel.init(0 * v))[1]
        return jax.lax.scan(step, (v, start), keys)[1]

    found = run(keys)
    for worst in found:
        assert float(jnp.nanmax(worst)) <= 1 + 1e-9
        assert int(jnp.isnan(worst).sum()) <= 2  # 0 / 0, where the start is exact


def test_errors_of_a_gradient_at_rest():
    g = np.random.default_rng(0).normal(size=50)
    channel = dbo.channels.ef21(dbo.mixing.averaging(1), SIGN)
    state = channel.init(jnp.zeros((1, 50)))

    def step(state, _):
        held, state, _ = channel.send(jax.random.key(0), jnp.asarray(g)[None], state)
        return state, jnp.linalg.norm(g - held[0])

    run = jax.jit(lambda state: jax.lax.scan(step, state, length=60)[1])
    errors = np.asarray(run(state))
    assert np.linalg.norm(g) == pytest.approx(6.506922, abs=1e-6)
    wanted = [3.860614, 0.506834, 0.205504, 0.058947]
    np.testing.assert_allclose(errors[[0, 9, 29, 59]], wanted, rtol=0, atol=1e-6)
    assert (np.diff(errors) < 0).all()


def _convolutions(pairs, size=3):
    return [(size, size, a, b) for a, b in pairs]


def _resnet(*stages):
    """Two blocks a stage, no biases of convolutions, two vectors per normalisation."""
    width = stages[0]
    shapes = [(3, 3, 3, width), (width,), (width,)]
    for wide in stages:
        for entry in (width, wide):
            shapes += _convolutions([(entry, wide), (wide, wide)]) + 4 * [(wide,)]
            if entry != wide:
                shapes += [(1, 1, entry, wide), (wide,), (wide,)]
        width = wide
    return [*shapes, (width, 10), (10,)]


def _vgg16():
    """Convolutions with biases and normalisations, one head."""
    widths = [3] + 2 * [64] + 2 * [128] + 3 * [256] + 6 * [512]
    shapes = _convolutions(itertools.pairwise(widths))
    return shapes + [(w,) for w in widths[1:] for _ in range(3)] + [(512, 10), (10,)]


MODELS = {
    "ResNet-18": (_resnet(64, 128, 256, 512), 11_173_962, 715_133_568, 22_347_988),
    "VGG-16-BN": (_vgg16(), 14_728_266, 942_609_024, 29_456_596),
    "WRN-16-4": (_resnet(64, 128, 256), 2_777_674, 177_771_136, 5_555_412),
}


def _traffic(tx, shapes):
    """Bytes of a step, from shapes alone."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return optax.tree.get(jax.eval_shape(tx.init, params), "traffic")


@pytest.mark.parametrize("model", MODELS)
def test_bits_of_the_models(model):
    shapes, d, dense_bits, sign_bits = MODELS[model]
    mix = dbo.mixing.averaging(5)
    assert sum(math.prod(shape) for shape in shapes) == d
    assert (64 * d, 2 * (d + 32)) == (dense_bits, sign_bits)

    dense = _traffic(dbo.optim.cd_adam(0.1, mix, dbo.compressors.identity()), shapes)
    assert 8 * (dense.message + dense.down) == dense_bits
    signs = _traffic(dbo.optim.cd_adam(0.1, mix, SIGN), shapes)
    assert signs.message == signs.down == 4 * math.ceil(d / 32) + 4
    assert 0 <= 8 * (signs.message + signs.down) - sign_bits < 2 * 32
    assert signs.total == 5 * (signs.message + signs.down)

    layerwise = dbo.compressors.per_leaf(SIGN)
    apart = _traffic(dbo.optim.cd_adam(0.1, mix, layerwise), shapes)
    words = sum(math.ceil(math.prod(shape) / 32) for shape in shapes)
    assert apart.message == 4 * words + 4 * len(shapes)
    over = 8 * (apart.message + apart.down) - 2 * (d + 32 * len(shapes))
    assert 0 <= over < 2 * 32 * len(shapes)

    k = max(d // 100, 1)
    top = _traffic(dbo.optim.cd_adam(0.1, mix, dbo.compressors.top_k(k)), shapes)
    assert 8 * (top.message + top.down) == 128 * k


def test_the_analysed_form_has_no_corrections(key):
    tx = dbo.optim.scale_by_amsgrad(
        0.9, 0.99, 1e-3, bias_correction=False, eps_inside_sqrt=True
    )
    m, v, v_max = np.zeros((3, 6))
    state = tx.init(jnp.zeros(6))
    for u in np.asarray(jax.random.normal(key, (5, 6))):
        m, v = 0.9 * m + 0.1 * u, 0.99 * v + 0.01 * u**2
        v_max = np.maximum(v, v_max)
        updates, state = tx.update(jnp.asarray(u), state)
        np.testing.assert_allclose(updates, m / np.sqrt(v_max + 1e-3), rtol=1e-12)


def test_the_maximum_of_corrected_moments_is_that_of_optax(key):
    ours = dbo.optim.scale_by_amsgrad(0.9, 0.99, max_of_corrected=True)
    default = dbo.optim.scale_by_amsgrad(0.9, 0.99)
    theirs = optax.scale_by_amsgrad(0.9, 0.99)
    x = jnp.zeros(6)
    states = [tx.init(x) for tx in (ours, default, theirs)]
    for size in (10.0, 1.0, 0.1):
        u = size * jax.random.normal(key, (6,))
        a, states[0] = ours.update(u, states[0])
        b, states[1] = default.update(u, states[1])
        c, states[2] = theirs.update(u, states[2])
        np.testing.assert_allclose(a, c, rtol=1e-12)
    assert np.abs(a - b).max() > 1e-3


def test_decoupled_decay_is_past_the_moments(key):
    gradients = jax.random.normal(key, (3, TOY.n, 6))
    tx = dbo.optim.cd_adam(0.1, MIX, SIGN, weight_decay=0.5, decoupled=True)
    plain = dbo.optim.cd_adam(0.1, MIX, SIGN)
    x, states = jnp.ones(6), [tx.init(jnp.ones(6)), plain.init(jnp.ones(6))]
    update, update_plain = jax.jit(tx.update), jax.jit(plain.update)
    for gradient in gradients:
        decayed, states[0] = update(gradient, states[0], x)
        bare, states[1] = update_plain(gradient, states[1], x)
        np.testing.assert_allclose(decayed, bare - 0.1 * 0.5 * x, rtol=1e-12)
        x = x + decayed


def test_momentum_is_averaged_before_it_is_sent(key):
    gradients = jax.random.normal(key, (4, TOY.n, 6))
    tx = dbo.optim.cd_adam(0.1, MIX, SIGN, momentum=0.3)
    plain = dbo.optim.cd_adam(0.1, MIX, SIGN)
    states, average = [tx.init(jnp.ones(6)), plain.init(jnp.ones(6))], gradients[0]
    update, update_plain = jax.jit(tx.update), jax.jit(plain.update)
    for gradient in gradients:
        average = 0.7 * average + 0.3 * gradient
        a, states[0] = update(gradient, states[0])
        b, states[1] = update_plain(average, states[1])
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_dense_downlink_is_exact(key):
    tx = dbo.optim.cd_adam(0.1, MIX, SIGN, downlink=dbo.compressors.identity())
    gradient = jax.random.normal(key, (TOY.n, 64))
    _, state = jax.jit(lambda g: tx.update(g, tx.init(jnp.zeros(64))))(gradient)
    links = state[0].channel
    np.testing.assert_allclose(links.down.receiver, links.up.receiver, rtol=1e-15)
    assert state[0].traffic.down == 64 * 8
