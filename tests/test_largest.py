"""Exactly the largest entries: by counting, by chunks, as a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax import compressors as C
from dbojax.compressors import largest

RNG = np.random.default_rng(0)


def kinds(d, dtype):
    """Vectors on which a threshold is hard to find, one in each row."""
    info = jnp.finfo(dtype)
    normal = RNG.normal(size=d)
    missing = normal.copy()
    missing[RNG.integers(0, d, 3)] = np.nan
    missing[RNG.integers(0, d, 2)] = -np.inf
    rows = {
        "normal": normal,
        "ties": np.round(2 * normal) / 2,
        "zeros": np.where(RNG.random(d) < 0.95, -0.0, normal),
        "equal": np.full(d, -1.0),
        "missing": missing,
        "nowhere": np.full(d, np.nan),
        "wide": normal * 10.0 ** RNG.uniform(-4, 4, d),
        "rising": np.arange(d) / d,
        "small": float(info.tiny) * normal,  # many of them denormal
        "ends": np.where(normal > 0, float(info.max), float(info.tiny)),
    }
    return jnp.asarray(np.stack(list(rows.values())), dtype)


def by_sorting(v, k):
    """Indices of the ``k`` largest: NaN first, of equals the first."""
    size = np.abs(np.asarray(v, np.float64))
    order = np.lexsort((np.arange(size.size), -size, ~np.isnan(size)))
    return np.sort(order[:k])


@pytest.mark.parametrize(
    ("d", "k", "dtype"),
    [
        (1, 1, jnp.float32),
        (130, 13, jnp.float32),
        (130, 130, jnp.float32),
        (3001, 1, jnp.float32),
        (3001, 700, jnp.float32),
        (700, 300, jnp.float64),
        (700, 300, jnp.bfloat16),
        (700, 300, jnp.float16),
    ],
)
def test_counting_finds_what_sorting_finds(d, k, dtype):
    v = kinds(d, dtype)
    found = np.asarray(jax.jit(jax.vmap(lambda v: largest.largest(v, k)))(v))
    for row, at in zip(v, found, strict=True):
        np.testing.assert_array_equal(at, by_sorting(row, k))


@pytest.mark.parametrize("k", [20, 300])
def test_mask_is_what_top_k_sends(k, key):
    """Both forms: a heap for few entries, counting for many."""
    v = kinds(1001, jnp.float32)[:8]
    top = C.top_k(k)

    @jax.jit
    @jax.vmap
    def both(v):
        payload, _ = top.compress(key, v, ())
        return C.keep_largest(v, k), top.decompress(payload, v)

    kept, received = both(v)
    np.testing.assert_array_equal(kept, received)
    for row, want in zip(np.asarray(kept), np.asarray(v), strict=True):
        at = by_sorting(want, k)
        np.testing.assert_array_equal(row[at], want[at])
        assert (np.delete(row, at) == 0).all()


@pytest.mark.parametrize(("d", "k", "chunk"), [(23, 5, 8), (2000, 0.4, 900), (9, 9, 4)])
def test_chunks_against_a_loop(d, k, chunk, key):
    v = RNG.normal(size=d)
    entries = k if isinstance(k, int) else int(k * d)
    m = -(-d // chunk)
    c = -(-d // m)
    q = min(c, -(-entries // m))
    want = np.zeros(d)
    for first in range(0, d, c):
        at = first + by_sorting(v[first : first + c], q)
        want[at] = v[at]
    top = C.chunked_top_k(k, chunk)
    payload = jax.jit(lambda v: top.compress(key, v, ())[0])(v)
    np.testing.assert_array_equal(top.decompress(payload, jnp.asarray(v)), want)
    assert top.delta is not None
    assert top.delta(d) == q / c
    assert ((want - v) ** 2).sum() <= (1 - q / c) * (v**2).sum()


@pytest.mark.parametrize(
    ("v", "k", "message"),
    [
        (jnp.ones((2, 3)), 1, r"vector of real .* got float64\[2, 3\]"),
        (jnp.arange(3), 1, r"got int64\[3\]"),
        (jnp.ones(3), 4, "from 1 to d=3, got k=4"),
        (jnp.ones(3), 0, "got k=0"),
        (jnp.ones(3), 0.5, "got k=0.5"),
    ],
)
def test_refusals(v, k, message):
    with pytest.raises(ValueError, match=message):
        C.keep_largest(v, k)
