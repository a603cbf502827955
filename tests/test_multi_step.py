"""Multi-step compression: the table of variances, both forms, bookkeeping."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax import compressors as C

TIMES = 60_000  # two per cent of a variance are then four standard errors


@partial(jax.jit, static_argnums=0)
def received(c, key, v):
    payload, _ = c.compress(key, v, c.init(v))
    return c.decompress(payload, v)


def draws(c, key, v):
    v = jnp.asarray(v)
    keys = jax.random.split(key, TIMES)
    return np.asarray(jax.jit(jax.vmap(lambda k: received(c, k, v)))(keys))


def vector(d):
    return jnp.asarray(np.random.default_rng(0).normal(size=d))


def level(d):
    """Distinct entries of about one size: their errors vary least from draw to draw."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], d)
    return jnp.asarray(signs * np.linspace(0.9, 1.1, d))


def check_mean_and_variance(c, key, v, omega):
    got, v = draws(c, key, v), np.asarray(v)
    spread = 5 * got.std(axis=0) / TIMES**0.5 + 1e-9
    assert (np.abs(got.mean(axis=0) - v) <= spread).all()
    variance = ((got - v) ** 2).sum(axis=1).mean() / float((v**2).sum())
    assert variance == pytest.approx(omega, rel=0.02, abs=2e-4)


@pytest.mark.parametrize("rounds", [1, 2, 5, 10])
@pytest.mark.parametrize(("k", "q"), [(2, 9 / 10), (10, 1 / 2)])
def test_variance_of_random_k(k, q, rounds, key):
    c = C.multi_step(C.random_k(k), rounds)
    omega = q**rounds / (1 - q**rounds)
    assert c.omega(20) == pytest.approx(omega)
    check_mean_and_variance(c, key, level(20), omega)


@pytest.mark.parametrize("c", [C.random_k(4), C.strided_random_k(4)])
def test_variance_of_one_message_is_its_law(c, key):
    check_mean_and_variance(c, key, level(20), c.omega(20))
    check_mean_and_variance(C.multi_step(c, 2), key, level(20), 0.64 / 0.36)


def test_variance_of_qsgd_is_within_its_law(key):
    c = C.multi_step(C.qsgd(1), 4)
    v = np.asarray(vector(20))
    variance = ((draws(c, key, v) - v) ** 2).sum(axis=1).mean() / (v**2).sum()
    assert 0 < variance < c.omega(20)


@pytest.mark.parametrize("rounds", [2, 3])
def test_against_a_loop(rounds, key):
    v = vector(12)
    for c, step in ((C.qsgd(2), 1 / (1 + C.qsgd(2).omega(12))), (C.block_top_k(3), 1)):
        total = np.zeros(12)
        for k in jax.random.split(key, rounds):
            rest = jnp.asarray(np.asarray(v) - total)
            total = total + step * np.asarray(received(c, k, rest))
        q = 1 - step if c.omega else 0.0
        got = received(C.multi_step(c, rounds), key, v)
        np.testing.assert_allclose(got, total / (1 - q**rounds), rtol=1e-12)


def test_once_is_the_compressor_itself():
    for c in (C.random_k(2), C.top_k(1), C.identity()):
        assert C.multi_step(c, 1) is c


def test_top_k_twice_is_top_2k():
    v = vector(23)
    got = received(C.multi_step(C.top_k(3), 4), None, v)
    np.testing.assert_array_equal(got, received(C.top_k(12), None, v))
    assert C.multi_step(C.top_k(0.5), 3).delta(10) == 1 - 0.5**3


def test_nothing_left_after_an_exact_message(key):
    v = vector(5)
    for c in (C.identity(), C.random_k(1.0), C.top_k(1.0)):
        many = C.multi_step(c, 3)
        np.testing.assert_array_equal(received(many, key, v), v)
    assert C.multi_step(C.identity(), 3).omega(5) == 0


def test_scaling_and_steps_commute(key):
    c, v = C.random_k(0.25), vector(20)
    inside, outside = C.multi_step(C.scaled(c), 3), C.scaled(C.multi_step(c, 3))
    np.testing.assert_array_equal(received(inside, key, v), received(outside, key, v))
    assert inside.delta(20) == outside.delta(20) == pytest.approx(1 - 0.75**3)
    many = C.multi_step(c, 3)
    assert C.scaled(C.scaled(many)) is many
    undone = C.scaled(inside)
    np.testing.assert_array_equal(received(undone, key, v), received(many, key, v))


def test_rounds_draw_different_entries(key):
    c = C.multi_step(C.random_k(3), 6)
    payload, _ = c.compress(key, jnp.ones(50), ())
    assert len({tuple(seed) for seed in np.asarray(payload.messages.seed)}) == 6


def test_memory_goes_from_round_to_round(key):
    """The memory of `low_rank` after two rounds is that of the second."""
    inner, m = C.low_rank(1), vector(30).reshape(5, 6)
    c = C.multi_step(inner, 2)

    @jax.jit
    def both(key):
        keys = jax.random.split(key, 2)
        first, state = inner.compress(keys[0], m, inner.init(m))
        rest = m - inner.decompress(first, m)
        _, want = inner.compress(keys[1], rest, state)
        return want, c.compress(key, m, c.init(m))[1]

    want, got = both(key)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-9)


@pytest.mark.parametrize("inner", [C.qsgd(3), C.random_k(0.2), C.low_rank(1, (2, 9))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_short_floats_keep_their_dtype(inner, dtype, key):
    tree = {"a": jnp.ones((2, 9), dtype), "b": jnp.full(18, 2, dtype)}
    got = received(C.multi_step(inner, 2), key, tree)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), got) == jax.tree.map(
        lambda a: (a.shape, a.dtype), tree
    )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in got.values())


def test_reaches_consensus_through_a_channel(key):
    mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(4)))
    v = jnp.asarray(np.random.default_rng(1).normal(size=(4, 36)))
    for inner in (C.scaled(C.random_k(0.1)), C.low_rank(1, (6, 6)), C.top_k(0.1)):
        channel = dbo.channels.reference_point(mix, C.multi_step(inner, 3), gamma=0.4)

        @jax.jit
        def run(keys, channel=channel):
            def send(carry, key):
                return channel.send(key, *carry)[:2], None

            held = jax.lax.scan(send, (v, channel.init(jnp.zeros_like(v))), keys)[0][0]
            means = dbo.node_mean(held), dbo.node_mean(v)
            return means, dbo.consensus_error(held), dbo.consensus_error(v)

        (mean, kept), error, before = run(jax.random.split(key, 150))
        np.testing.assert_allclose(mean, kept, atol=1e-9)
        assert float(error) < 0.05 * float(before)
