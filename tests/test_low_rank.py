"""Low rank: projections, the law of a fresh start, memory, leaves that stay dense."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax import compressors as C
from dbojax import trees


@partial(jax.jit, static_argnums=0)
def message(c, key, v, state=None):
    payload, state = c.compress(key, v, c.init(v) if state is None else state)
    return c.decompress(payload, v), state, payload


def matrix(m, n, values, seed=0):
    rng = np.random.default_rng(seed)
    k = len(values)
    u = np.linalg.qr(rng.normal(size=(m, k)))[0]
    v = np.linalg.qr(rng.normal(size=(n, k)))[0]
    return jnp.asarray(u @ np.diag(values) @ v.T)


SPECTRA = {
    "alike": [1.0] * 6,
    "decaying": [1.0, 0.5, 0.25, 0.12, 0.06, 0.03],
    "one_large": [100.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "rank_four": [1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
def test_law_of_a_fresh_start(values, shape, key):
    c, m = C.low_rank(2), matrix(*shape, values)
    sent = jax.jit(jax.vmap(lambda k: message(c, k, m)[0]))(jax.random.split(key, 4000))
    errors = ((np.asarray(sent) - np.asarray(m)) ** 2).sum(axis=(1, 2))
    total = float((m**2).sum())
    bound = (1 - 2 / len(values)) * total
    assert errors.mean() <= bound + 5 * errors.std() / 4000**0.5 + 1e-9 * total
    if np.ptp(values) == 0:
        np.testing.assert_allclose(errors, bound, rtol=1e-9)


def test_the_law_holds_whatever_the_memory(key):
    """A memory at right angles to the matrix: a warm start alone would keep nothing."""
    c = C.low_rank(1)
    past, now = jnp.zeros((9, 9)).at[0, 0].set(1.0), jnp.eye(9).at[0, 0].set(0.0)
    _, state, _ = message(c, key, past)
    got = message(c, key, now, state)[0]
    assert float((got**2).sum()) == pytest.approx(1.0)


def test_error_is_a_projection(key):
    m = matrix(8, 12, SPECTRA["decaying"])
    got, _, (factors,) = message(C.low_rank(3), key, m)
    error = float(((got - m) ** 2).sum())
    kept = float((factors.right**2).sum())
    assert error == pytest.approx(float((m**2).sum()) - kept)
    np.testing.assert_allclose(factors.left.T @ factors.left, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_exact_up_to_the_rank(rank, dtype, key):
    m = matrix(10, 9, [3.0, 1.0]).astype(dtype)
    got = message(C.low_rank(rank), key, m)[0]
    assert got.dtype == dtype
    np.testing.assert_allclose(got, m, atol=20 * float(jnp.finfo(dtype).eps))


def test_memory_is_a_power_iteration(key):
    c, m = C.low_rank(2), matrix(12, 10, [4.0, 3.0, 1.0, 0.5, 0.2])
    state, errors = c.init(m), []
    for k in jax.random.split(key, 12):
        got, state, _ = message(c, k, m, state)
        errors.append(float(((got - m) ** 2).sum()))
    assert (np.diff(errors) <= 1e-12).all()
    assert errors[-1] == pytest.approx(1.0 + 0.25 + 0.04, rel=1e-6)


def test_zeros_and_not_a_number_leave_no_trace(key):
    c, m = C.low_rank(2), matrix(8, 9, [2.0, 1.0])
    for bad in (0 * m, m.at[0, 0].set(jnp.nan)):
        got, state, _ = message(c, key, bad)
        assert bool(jnp.isnan(bad).any()) == bool(jnp.isnan(got).any())
        np.testing.assert_allclose(message(c, key, m, state)[0], m, atol=1e-12)


def test_vmap_is_a_loop(key):
    c = C.low_rank(2)
    m = jnp.stack([matrix(8, 9, SPECTRA["decaying"], seed) for seed in range(3)])
    keys = jax.random.split(key, 3)
    lifted = jax.jit(jax.vmap(lambda k, a: message(c, k, a)[0]))(keys, m)
    plain = [message(c, k, a)[0] for k, a in zip(keys, m, strict=True)]
    np.testing.assert_allclose(lifted, plain, atol=1e-12)


def test_leaves_by_themselves(key):
    rng = np.random.default_rng(5)
    tree = {
        "bias": jnp.asarray(rng.normal(size=7)),
        "empty": jnp.zeros((0, 4)),
        "kernel": jnp.asarray(rng.normal(size=(6, 2, 5))),
        "scalar": jnp.asarray(2.0),
        "small": jnp.asarray(rng.normal(size=(2, 2))),
    }
    c = C.low_rank(1)
    got, state, payload = message(c, key, tree)
    assert jax.tree.map(jnp.shape, state) == ((), (), (10, 1), (), ())
    assert trees.size(payload) == 7 + (6 + 10) + 1 + 4
    for name in ("bias", "scalar", "small", "empty"):
        np.testing.assert_array_equal(got[name], tree[name])
    assert np.linalg.matrix_rank(got["kernel"].reshape(6, 10)) == 1
    assert trees.size(c.decompress(*[c.compress(key, (), ())[0], ()])) == 0


def test_declared_law():
    assert C.low_rank(2).delta(100) == 2 / 10
    assert C.low_rank(2).delta(120) == 2 / 10
    assert C.low_rank(20).delta(100) == 1
    assert C.low_rank(2).delta(0) == 1
    assert C.low_rank(2, (50, 5)).delta(250) == 2 / 5
    assert C.low_rank(5, (50, 5)).delta(250) == 1
    assert C.low_rank(5, (4, 4)).delta(100) == 1  # several leaves, all dense
    assert C.low_rank(2).omega is None
