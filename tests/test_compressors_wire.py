"""What crosses a link: bytes by hand, layouts and selections by slow NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax import compressors as C
from dbojax import trees
from dbojax.compressors import noise, quantised


def sent_and_received(c, key, v):
    """The payload and what arrives, in one program."""

    @jax.jit
    def both(key, v):
        payload, _ = c.compress(key, v, ())
        return payload, c.decompress(payload, v)

    return both(key, jnp.asarray(v))


def message_bytes(c, d, dtype=jnp.float32):
    v = jax.ShapeDtypeStruct((d,), dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def message(key, v):
        return c.compress(key, v, c.init(v))[0]

    return trees.nbytes(jax.eval_shape(message, key, v))


BYTES = {
    # compressor, d, dtype, bytes
    "identity": (C.identity(), 10, jnp.float32, 40),
    "top_k_uint8": (C.top_k(5), 256, jnp.float32, 5 * (4 + 1)),
    "top_k_uint16": (C.top_k(5), 257, jnp.float32, 5 * (4 + 2)),
    "top_k_uint16_last": (C.top_k(5), 65536, jnp.float32, 5 * (4 + 2)),
    "top_k_uint32": (C.top_k(5), 65537, jnp.float32, 5 * (4 + 4)),
    "top_k_float64": (C.top_k(0.01), 1000, jnp.float64, 10 * (8 + 2)),
    "top_k_bfloat16": (C.top_k(0.01), 1000, jnp.bfloat16, 10 * (2 + 2)),
    "block_top_k": (C.block_top_k(0.01), 10_000, jnp.float32, 100 * (4 + 1)),
    "block_top_k_uint16": (C.block_top_k(10), 10_000, jnp.float32, 10 * (4 + 2)),
    "chunked_top_k": (C.chunked_top_k(0.01), 10_000, jnp.float32, 100 * (4 + 2)),
    "chunked_top_k_uint8": (
        C.chunked_top_k(0.01, chunk=250),
        10_000,
        jnp.float32,
        40 * 3 * (4 + 1),
    ),
    "random_k": (C.random_k(0.01), 10_000, jnp.float32, 100 * 4 + 8),
    "strided_random_k": (C.strided_random_k(0.01), 10_000, jnp.float32, 100 * 4 + 1),
    "qsgd1": (C.qsgd(1), 1600, jnp.float32, 4 * 100 + 4),  # 2 bits, 16 a word
    "qsgd7": (C.qsgd(7), 1600, jnp.float32, 4 * 200 + 4),  # 4 bits, 8 a word
    "qsgd8": (C.qsgd(8), 1600, jnp.float32, 4 * 267 + 4),  # 5 bits, 6 a word
    "qsgd16": (C.qsgd(16), 1600, jnp.float32, 4 * 320 + 4),  # 6 bits, 5 a word
    "qsgd32767": (C.qsgd(32767), 1600, jnp.float32, 4 * 800 + 4),
    "qsgd7_bfloat16": (C.qsgd(7), 1600, jnp.bfloat16, 4 * 200 + 4),
    "natural": (C.natural(), 1001, jnp.float32, 1001 + 4 * 32),
    "natural_bfloat16": (C.natural(), 1001, jnp.bfloat16, 1001 + 4 * 32),
    "natural_float64": (C.natural(), 1001, jnp.float64, 2 * 1001),
    "int8": (C.int8(), 2049, jnp.float32, 2049 + 4 * 3),
    "int8_bfloat16": (C.int8(100), 1001, jnp.bfloat16, 1001 + 4 * 11),
    "int8_float64": (C.int8(None), 1001, jnp.float64, 1001 + 8),
    "low_rank": (C.low_rank(3, (20, 60)), 1200, jnp.float32, 4 * 3 * (20 + 60)),
    "low_rank_wide": (C.low_rank(3, (20, 60)), 1200, jnp.bfloat16, 4 * 3 * 80),
    "low_rank_dense": (C.low_rank(8, (20, 60)), 1200, jnp.bfloat16, 2 * 1200),
    "low_rank_of_a_vector": (C.low_rank(1), 1200, jnp.float32, 4 * 1200),
    "multi_step": (C.multi_step(C.top_k(5), 3), 256, jnp.float32, 3 * 5 * (4 + 1)),
    "multi_step_seeds": (C.multi_step(C.random_k(9), 2), 99, jnp.float32, 2 * 44),
    "multi_step_once": (C.multi_step(C.sign(), 1), 1001, jnp.float32, 4 * 32 + 4),
    "sign": (C.sign(), 1001, jnp.float32, 4 * 32 + 4),
    "sign_float64": (C.sign(), 1001, jnp.float64, 4 * 32 + 8),
    "cast": (C.cast(jnp.bfloat16), 1001, jnp.float32, 2 * 1001),
    "scaled": (C.scaled(C.random_k(10)), 1000, jnp.float32, 10 * 4 + 8),
    # 100 kept: 2-byte indices, 13 words of 8 codes, the norm
    "composed": (
        C.composed(C.top_k(0.1), C.qsgd(7)),
        1000,
        jnp.float32,
        100 * 2 + 4 * 13 + 4,
    ),
    "fraction_rounds_up": (C.top_k(0.1), 11, jnp.float32, 2 * (4 + 1)),
    "fraction_is_exact": (C.top_k(0.07), 100, jnp.float32, 7 * (4 + 1)),
}


@pytest.mark.parametrize(("c", "d", "dtype", "size"), BYTES.values(), ids=BYTES.keys())
def test_bytes(c, d, dtype, size):
    assert message_bytes(c, d, dtype) == size


def test_bytes_of_the_newsgroups_example():
    """Top 20 % of 20 x 130107 entries; ten rounds, two problems, two vectors each."""
    k = 520_428
    message = message_bytes(C.top_k(0.2), 20 * 130_107)
    assert message == k * (4 + 4)
    assert 2 * 4 * 130_107 + 4 * 10 * message == 167_577_816  # 167.6 MB


def test_top_k_against_numpy(key):
    compress = jax.jit(C.top_k(17).compress)
    for v in np.random.default_rng(1).normal(size=(5, 300)):
        payload, _ = compress(key, jnp.asarray(v), ())
        assert set(payload.indices.tolist()) == set(np.argsort(-np.abs(v))[:17])
        np.testing.assert_array_equal(payload.values, v[np.asarray(payload.indices)])


@pytest.mark.parametrize(
    ("k", "d"), [(1, 7), (3, 7), (4, 12), (7, 7), (5, 1300), (90, 1003)]
)
def test_block_top_k_against_a_loop(k, d, key):
    v = np.random.default_rng(d).normal(size=d)
    want = np.zeros(d)
    for j in range(k):
        block = np.arange(j, d, k)
        best = block[np.argmax(np.abs(v[block]))]
        want[best] = v[best]
    payload, received = sent_and_received(C.block_top_k(k), key, v)
    np.testing.assert_array_equal(received, want)
    rows = np.asarray(payload.rows).astype(int)
    assert (rows * k + np.arange(k) < d).all()
    assert rows.max() < -(-d // k)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_block_top_k_never_chooses_the_padding(value, key):
    payload, _ = sent_and_received(C.block_top_k(5), key, np.full(11, value))
    assert (np.asarray(payload.rows).astype(int) * 5 + np.arange(5) < 11).all()


LENGTHS = [1, 2, 3, 5, 16, 17, 97, 1000, 10_007]


@pytest.mark.parametrize("d", LENGTHS)
def test_random_k_never_repeats(d, key):
    seeds = jax.random.bits(key, (20, 2), jnp.uint32)
    for k in sorted({1, (d + 2) // 3, (d + 1) // 2, d}):
        choose = jax.jit(jax.vmap(lambda seed, k=k: noise.distinct(seed, k, d)))
        chosen = np.asarray(choose(seeds))
        assert chosen.min() >= 0
        assert chosen.max() < d
        for row in chosen:
            assert len(set(row)) == k


@pytest.mark.parametrize(("k", "d"), [(1, 2), (1, 3), (2, 5), (3, 7), (4, 16), (6, 23)])
def test_random_k_includes_all_alike(k, d, key):
    times = 20_000
    seeds = jax.random.bits(key, (times, 2), jnp.uint32)
    chosen = jax.jit(jax.vmap(lambda seed: noise.distinct(seed, k, d)))(seeds)
    counts = np.bincount(np.asarray(chosen).ravel(), minlength=d)
    p = k / d
    assert (np.abs(counts - times * p) < 5 * (times * p * (1 - p)) ** 0.5).all()


def test_random_k_pairs_are_not_always_the_same(key):
    """Two of 11: one of each half of a circle that begins anywhere."""
    seeds = jax.random.bits(key, (5000, 2), jnp.uint32)
    choose = jax.jit(jax.vmap(lambda seed: noise.distinct(seed, 2, 11)))
    chosen = np.asarray(choose(seeds))
    gaps = np.bincount((chosen[:, 1] - chosen[:, 0]) % 11, minlength=11)
    ways = [
        sum(6 + b - a == gap for a in range(6) for b in range(5)) for gap in range(11)
    ]
    np.testing.assert_allclose(gaps / 5000, np.array(ways) / 30, atol=0.03)


@pytest.mark.parametrize("levels", [1, 2, 7, 8, 100, 32767])
@pytest.mark.parametrize("d", [1, 9, 100])
def test_qsgd_against_numpy(levels, d, key):
    rng = np.random.default_rng(levels)
    v, r = rng.normal(size=d), rng.random(d)
    norm = np.sqrt((v**2).sum())
    want = np.zeros(d)
    for j in range(d):
        u = levels * abs(v[j]) / norm
        q = np.floor(u) + (r[j] < u - np.floor(u))
        want[j] = norm * np.sign(v[j]) * min(q, levels) / levels
    c = C.qsgd(levels, uniform=lambda key, shape, dtype: jnp.asarray(r, dtype))
    _, received = sent_and_received(c, key, v)
    np.testing.assert_allclose(received, want, rtol=1e-9)


def given(r):
    """A source of "random" numbers that are known."""
    return lambda key, shape, dtype: jnp.asarray(r, dtype).reshape(shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_natural_against_numpy(dtype, key):
    rng = np.random.default_rng(3)
    v = (rng.normal(size=500) * 10.0 ** rng.integers(-30, 30, 500)).astype(dtype)
    r = (rng.random(500) // 2.0**-20 * 2.0**-20).astype(dtype)
    half, exponent = np.frexp(np.abs(v))  # |v| = half 2^exponent, 1/2 <= half < 1
    up = r + (2 * half.astype(float) - 1) >= 1
    want = np.sign(v) * 2.0 ** (exponent - 1 + up)
    _, received = sent_and_received(C.natural(given(r)), key, v)
    np.testing.assert_array_equal(received, want)


@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64], ids=str
)
def test_ends_of_the_range(dtype, key):
    info = jnp.finfo(dtype)
    wild = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf], dtype)
    for c in (C.natural(), C.int8()):

        @jax.jit
        def received(v, c=c):
            payload, _ = c.compress(key, v, ())
            return c.decompress(payload, v).astype(jnp.float64)

        assert not np.isfinite(received(wild)).any()
        # Nothing finite overflows; as powers of two these are just one step up.
        large = np.full(99, info.max, dtype)
        large[1] = -info.max
        got = np.asarray(received(jnp.asarray(large)))
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got / float(info.max), np.sign(got), rtol=0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_small_entries_stay_unbiased(dtype, key):
    """Below the smallest power, also where the input is a denormal number."""
    c, power = C.natural(), 2 * np.finfo(dtype).tiny

    @jax.jit
    def received(v):
        return c.decompress(c.compress(key, v, ())[0], v)

    for part in (1.25, 4, 8):
        v = np.full(8000, power / dtype(part), dtype)
        v[::2] *= -1
        got = np.asarray(received(jnp.asarray(v))) / power
        assert set(np.abs(got)) == {0.0, 1.0}
        assert (got * np.sign(v) >= 0).all()
        p = 1 / part
        z = (np.abs(got).mean() - p) / (p * (1 - p) / 8000) ** 0.5
        assert abs(z) < 5


@pytest.mark.parametrize("block", [1, 7, 100, None])
def test_int8_against_numpy(block, key):
    rng = np.random.default_rng(4)
    v = rng.normal(size=100)
    m = block or 100
    rows = -(-100 // m)
    r = rng.random(rows * m)
    want = np.zeros(100)
    for j in range(100):
        scale = np.abs(v[j // m * m : (j // m + 1) * m]).max() / 127
        u = v[j] / scale
        want[j] = scale * (np.floor(u) + (r[j] < u - np.floor(u) - 1e-12))
    payload, received = sent_and_received(C.int8(block, given(r[:100])), key, v)
    np.testing.assert_allclose(received, want, rtol=1e-9)
    assert payload.scales.size == rows


@pytest.mark.parametrize("m", [2, 100, 20_000])
def test_law_of_int8_is_sharp(m):
    """One large entry, the others at the worst fraction of a step: equality."""
    omega = C.int8(None).omega(m)
    a = 127**2 / (m - 1)
    f = 1 / (1 + (1 + 1 / a) ** 0.5)
    assert omega == pytest.approx(f * (1 - f) / (a + f**2), rel=1e-6)
    others = np.linspace(0, 127, 100_001)
    part = others - np.floor(others)
    assert (part * (1 - part) <= omega * (others**2 + a) * (1 + 1e-9)).all()
    assert C.int8(m).omega(10 * m) == omega


@pytest.mark.parametrize("bits", [1, 3, 8, 11])
@pytest.mark.parametrize("d", [1, 33, 1000])
def test_pack_and_unpack(bits, d):
    codes = np.random.default_rng(d).integers(0, 2**bits, d)

    @jax.jit
    def there_and_back(codes):
        words = quantised.pack(codes, bits)
        return words, quantised.unpack(words, bits, d)

    words, back = there_and_back(jnp.asarray(codes))
    assert words.dtype == jnp.uint32
    assert words.size == -(-d // (32 // bits))
    np.testing.assert_array_equal(back, codes)


def test_sign_against_numpy(key):
    v = np.array([0.5, -2.0, 0.0, -0.0, 3.5])
    _, out = sent_and_received(C.sign(), key, v)
    np.testing.assert_allclose(out, 1.2 * np.array([1, -1, 1, 1, 1]))


def test_payload_types_survive_a_link():
    """No payload leaf of a quantiser is a short float: those may travel as float32."""
    v = jnp.ones(50, jnp.float32)
    for c in (
        C.cast(jnp.bfloat16),
        C.cast(jnp.float16),
        C.qsgd(3),
        C.sign(),
        C.natural(),
        C.int8(),
    ):
        payload = jax.eval_shape(lambda v, c=c: c.compress(jax.random.key(0), v, ()), v)
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(payload)}
        assert dtypes <= {"int8", "uint8", "uint16", "uint32", "float32"}


def test_counter_uniform_moments(key):
    keys = jax.random.split(key, 200)
    u = np.asarray(jax.jit(jax.vmap(lambda k: C.counter_uniform(k, (1000,))))(keys))
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    scale = u.size**0.5
    assert abs(u.mean() - 1 / 2) * scale < 5 * 12**-0.5
    assert abs((u**2).mean() - 1 / 3) * scale < 5 * (4 / 45) ** 0.5
    centred = u - 1 / 2
    for lagged in (centred[:, :-1] * centred[:, 1:], centred[:-1] * centred[1:]):
        assert abs(lagged.mean()) * scale < 5 / 12
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float64):
        assert C.counter_uniform(key, (9,), dtype).max() < 1


def test_counter_uniform_in_pairs_and_across_seeds():
    """What two neighbours, or two streams alike in one seed word, have in common."""
    words = jax.random.bits(jax.random.key(0), (3, 400), jnp.uint32)
    counter = jnp.arange(1000, dtype=jnp.uint32)
    stream = jax.vmap(lambda a, b: noise.hashed(jnp.stack([a, b]), counter) / 2**32)
    one, two = (np.asarray(stream(*words[np.array(at)])) for at in ((0, 1), (0, 2)))
    cells = (16 * one[:, :-1]).astype(int) * 16 + (16 * one[:, 1:]).astype(int)
    counts, each = np.bincount(cells.ravel(), minlength=256), cells.size / 256
    chi = ((counts - each) ** 2 / each).sum()  # 255 degrees of freedom
    assert abs(chi - 255) < 5 * (2 * 255) ** 0.5
    for lag in (1, 2, 16, 32, 256):
        both = (one[:, lag:] - 0.5) * (one[:, :-lag] - 0.5)
        assert abs(both.mean()) * both.size**0.5 < 5 / 12
    both = (one - 0.5) * (two - 0.5)
    assert abs(both.mean()) * both.size**0.5 < 5 / 12
