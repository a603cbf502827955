"""The law of every compressor: contraction or unbiasedness, edges, transforms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax import compressors as C
from dbojax import trees

CASES = {
    "identity": C.identity(),
    "top_k": C.top_k(0.2),
    "top_k_int": C.top_k(3),
    "block_top_k": C.block_top_k(0.2),
    "block_top_k_int": C.block_top_k(4),
    "chunked_top_k": C.chunked_top_k(0.2, chunk=8),
    "random_k": C.random_k(0.25),
    "strided_random_k": C.strided_random_k(5),
    "qsgd1": C.qsgd(1),
    "qsgd7": C.qsgd(7),
    "qsgd_threefry": C.qsgd(4, uniform=jax.random.uniform),
    "natural": C.natural(),
    "natural_threefry": C.natural(uniform=jax.random.uniform),
    "int8": C.int8(),
    "int8_blocks": C.int8(5),
    "int8_whole": C.int8(None, uniform=jax.random.uniform),
    "low_rank": C.low_rank(2, (5, 5)),
    "sign": C.sign(),
    "float16": C.cast(jnp.float16),
    "bfloat16": C.cast(jnp.bfloat16),
    "scaled_random_k": C.scaled(C.random_k(0.25)),
    "scaled_qsgd": C.scaled(C.qsgd(2)),
    "top_k_then_qsgd": C.composed(C.top_k(0.2), C.scaled(C.qsgd(3))),
    "block_then_sign": C.composed(C.block_top_k(0.2), C.sign()),
    "top_k_then_half": C.composed(C.top_k(0.2), C.cast(jnp.bfloat16)),
    "random_k_then_qsgd": C.composed(C.random_k(0.25), C.qsgd(3)),
    "top_k_then_natural": C.composed(C.top_k(0.2), C.scaled(C.natural())),
    "random_k_then_steps": C.composed(C.random_k(0.25), C.multi_step(C.qsgd(1), 2)),
    "multi_step_random_k": C.multi_step(C.random_k(0.25), 3),
    "multi_step_qsgd": C.multi_step(C.qsgd(1), 2),
    "multi_step_top_k": C.multi_step(C.top_k(0.2), 3),
    "multi_step_low_rank": C.multi_step(C.low_rank(1, (5, 5)), 2),
    "multi_step_composed": C.multi_step(C.composed(C.random_k(0.25), C.natural()), 2),
    "multi_step_scaled": C.multi_step(C.scaled(C.strided_random_k(5)), 2),
    "per_leaf_multi_step": C.per_leaf(C.multi_step(C.random_k(0.5), 2)),
    "per_leaf_top_k": C.per_leaf(C.top_k(0.2)),
    "per_leaf_qsgd": C.per_leaf(C.qsgd(3)),
}
CONTRACTIONS = {name: c for name, c in CASES.items() if c.delta}
UNBIASED = {name: c for name, c in CASES.items() if c.omega}
WITH_ADD = {name: c for name, c in CASES.items() if c.add}
LEAFWISE = ("per_leaf", "low_rank")
AS_ONE_VECTOR = {
    name: c for name, c in CASES.items() if not any(word in name for word in LEAFWISE)
}
KINDS = (
    "top_k",
    "block_top_k",
    "chunked_top_k",
    "random_k",
    "strided_random_k",
    "qsgd7",
    "natural",
    "int8_blocks",
    "multi_step_random_k",
    "multi_step_top_k",
    "sign",
    "bfloat16",
    "top_k_then_qsgd",
    "per_leaf_qsgd",
)
EACH_KIND = {name: CASES[name] for name in KINDS}
RANDOM = [
    "random_k",
    "strided_random_k",
    "qsgd7",
    "natural",
    "int8",
    "low_rank",
    "multi_step_qsgd",
    "scaled_qsgd",
    "random_k_then_qsgd",
]
D = 23


def params(cases):
    return pytest.mark.parametrize("c", cases.values(), ids=cases.keys())


@partial(jax.jit, static_argnums=0)
def roundtrip(c, key, v):
    payload, _ = c.compress(key, v, c.init(v))
    return c.decompress(payload, jax.tree.map(shape, v))


def shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def vectors(d=D):
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random(d) < 0.2, rng.normal(size=d), 0.0)
    return {
        "gaussian": rng.normal(size=d),
        "heavy": rng.standard_cauchy(size=d),
        "equal": np.ones(d),
        "one_hot": np.eye(d)[d - 1],
        "sparse": sparse,
        "signs": rng.choice([-2.0, 2.0], size=d),
    }


@partial(jax.jit, static_argnums=(0, 3))
def sample(c, key, v, times):
    return jax.vmap(lambda k: roundtrip(c, k, v))(jax.random.split(key, times))


def draws(c, key, v, times):
    return np.asarray(sample(c, key, jnp.asarray(v), times))


@pytest.mark.parametrize("v", vectors().values(), ids=vectors().keys())
@params(CONTRACTIONS)
def test_contraction(c, v, key):
    errors = ((draws(c, key, v, 2000) - v) ** 2).sum(axis=1)
    bound = (1 - c.delta(D)) * (v**2).sum()
    noise = errors.std() / 2000**0.5
    assert errors.mean() <= bound + 5 * noise + 1e-12 * (v**2).sum()


@pytest.mark.parametrize("name", ["gaussian", "one_hot", "equal"])
@params(UNBIASED)
def test_unbiased_with_variance(c, name, key):
    v = vectors()[name]
    received = draws(c, key, v, 20_000)
    deviation = np.abs(received.mean(axis=0) - v)
    assert (deviation <= 5 * received.std(axis=0) / 20_000**0.5 + 1e-9).all()
    errors = ((received - v) ** 2).sum(axis=1)
    bound = c.omega(D) * (v**2).sum()
    assert errors.mean() <= bound + 5 * errors.std() / 20_000**0.5 + 1e-9


@pytest.mark.parametrize("name", ["random_k", "strided_random_k"])
def test_variance_is_the_law_itself(name, key):
    v = vectors()["gaussian"]
    errors = ((draws(CASES[name], key, v, 20_000) - v) ** 2).sum(axis=1)
    z = (errors.mean() - CASES[name].omega(D) * (v**2).sum()) / errors.std()
    assert abs(z) * 20_000**0.5 < 5


@params(CASES)
def test_zero_stays_zero(c, key):
    assert (np.asarray(roundtrip(c, key, jnp.zeros(D))) == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@params(EACH_KIND)
def test_dtype_is_kept_and_finite(c, dtype, key):
    v = jnp.asarray(vectors()["gaussian"], dtype)
    out = roundtrip(c, key, v)
    assert out.dtype == dtype
    assert out.shape == v.shape
    assert bool(jnp.isfinite(out).all())


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize(
    "sparsifier",
    [C.top_k, C.block_top_k, C.chunked_top_k, C.random_k, C.strided_random_k],
)
def test_all_entries_are_the_vector(sparsifier, d, key):
    v = np.arange(1.0, d + 1)
    for c in (sparsifier(1.0), sparsifier(d)):
        np.testing.assert_array_equal(roundtrip(c, key, jnp.asarray(v)), v)


def test_one_entry_is_exact(key):
    for c in (C.sign(), C.qsgd(1), C.int8(), C.low_rank(1), C.cast(jnp.float32)):
        assert float(roundtrip(c, key, jnp.array([-3.0]))[0]) == -3.0


@params(AS_ONE_VECTOR)
def test_tree_is_its_raveled_vector(c, key):
    v = jnp.asarray(vectors()["gaussian"])
    tree = {"a": v[:10].reshape(2, 5), "b": {"c": v[10], "d": v[11:]}}
    flat = trees.ravel(roundtrip(c, key, tree))
    np.testing.assert_array_equal(flat, roundtrip(c, key, v))


@params(EACH_KIND)
def test_transforms_change_nothing(c, key):
    """vmap over nodes and scan over steps give what a plain loop gives."""
    v = jnp.asarray(np.stack(list(vectors().values())))
    keys = jax.random.split(key, len(v))
    plain = np.stack([roundtrip(c, k, row) for k, row in zip(keys, v, strict=True)])
    lifted = jax.jit(jax.vmap(lambda k, row: roundtrip(c, k, row)))(keys, v)

    def step(memory, inputs):
        payload, memory = c.compress(inputs[0], inputs[1], memory)
        return memory, c.decompress(payload, inputs[1])

    scanned = jax.lax.scan(step, c.init(v[0]), (keys, v))[1]
    np.testing.assert_allclose(lifted, plain, rtol=1e-12)
    np.testing.assert_allclose(scanned, plain, rtol=1e-12)


@params(WITH_ADD)
def test_add_is_decompress_then_add(c, key):
    v = {"a": jnp.asarray(vectors()["gaussian"]), "b": jnp.ones((2, 3))}
    into = jax.tree.map(lambda a: np.asarray(a) + 1, v)

    @jax.jit
    def both(key, scale, into):
        payload, _ = c.compress(key, v, c.init(v))
        nothing = jax.tree.map(jnp.zeros_like, payload)
        kept = c.add(nothing, scale, into)
        return c.add(payload, scale, into), c.decompress(payload, v), kept

    got, dense, kept = both(key, jnp.asarray(-0.5), into)
    jax.tree.map(np.testing.assert_array_equal, kept, into)
    want = jax.tree.map(lambda i, q: i - 0.5 * np.asarray(q), into, dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want)


@pytest.mark.parametrize("name", RANDOM)
def test_same_key_same_bits(name, key):
    v = jnp.asarray(vectors()["gaussian"])
    one, again, other = (
        np.asarray(roundtrip(CASES[name], k, v))
        for k in (key, key, jax.random.fold_in(key, 1))
    )
    assert (one == again).all()
    assert (one != other).any()


@pytest.mark.parametrize("name", RANDOM)
def test_raw_keys_work(name):
    v = jnp.asarray(vectors()["gaussian"])
    typed, raw = jax.random.key(3), jax.random.PRNGKey(3)
    np.testing.assert_array_equal(
        roundtrip(CASES[name], typed, v), roundtrip(CASES[name], raw, v)
    )


@params(CASES)
def test_not_a_number_is_seen(c, key):
    v = jnp.asarray(vectors()["gaussian"]).at[7].set(jnp.nan)
    seen = [
        bool(jnp.isnan(roundtrip(c, k, v)).any()) for k in jax.random.split(key, 40)
    ]
    assert any(seen)


@pytest.mark.parametrize("c", CASES.values(), ids=CASES)
def test_nothing_is_lost_of_nothing(c, key):
    assert c.delta is None or c.delta(0) == 1
    assert c.omega is None or c.omega(0) == 0
    for each in (c, C.scaled(c)) if c.omega else (c,):
        for v in ((), {"a": jnp.zeros((0, 2))}):
            payload, _ = each.compress(key, v, each.init(v))
            assert trees.nbytes(payload) == trees.nbytes(each.decompress(payload, v))


def test_empty_trees_send_nothing(key):
    for c in (
        C.top_k(0.1),
        C.qsgd(3),
        C.natural(),
        C.int8(),
        C.int8(None),
        C.multi_step(C.random_k(0.1), 2),
        C.multi_step(C.strided_random_k(0.1), 2),
        C.composed(C.top_k(0.1), C.sign()),
    ):
        for v in ((), {"a": jnp.zeros((0, 2))}):
            payload, state = c.compress(key, v, c.init(v))
            assert trees.nbytes(payload) == 0
            assert state == ()
            assert trees.size(c.decompress(payload, v)) == 0


def test_law_of_per_leaf(key):
    like = {"a": jnp.zeros(5), "b": jnp.zeros(11)}
    known, any_split = C.per_leaf(C.top_k(0.2), like), C.per_leaf(C.top_k(0.2))
    assert known.delta(16) == min(1 / 5, 3 / 11)
    assert any_split.delta(16) == min(C.top_k(0.2).delta(d) for d in range(1, 17))
    assert any_split.delta(16) <= known.delta(16)
    assert C.per_leaf(C.top_k(2)).delta(16) == 2 / 16
    assert C.per_leaf(C.qsgd(2), like).omega(16) == C.qsgd(2).omega(11)
    assert C.per_leaf(C.sign()).omega is None
    # Leaves of very different size: what one top_k over all would drop is kept.
    v = {"a": jnp.full(5, 1e-3), "b": jnp.arange(11.0)}
    assert int((roundtrip(known, key, v)["a"] != 0).sum()) == 1
    assert int((roundtrip(C.top_k(0.2), key, v)["a"] != 0).sum()) == 0


def test_law_of_scaled_and_composed():
    assert C.scaled(C.random_k(5)).delta(20) == pytest.approx(0.25)
    assert C.scaled(C.scaled(C.qsgd(3))).omega(100) == C.qsgd(3).omega(100)
    both = C.composed(C.top_k(0.1), C.sign())
    assert both.delta(100) == pytest.approx(0.1 * 1 / 10)
    both = C.composed(C.random_k(25), C.qsgd(5))
    assert both.omega(100) == pytest.approx(4 * (1 + 1) - 1)
    assert C.composed(C.top_k(0.1), C.qsgd(3)).delta is None
    assert C.composed(C.top_k(0.1), C.qsgd(3)).omega is None
    assert C.scaled(both).delta(100) == pytest.approx(1 / 8)


def test_cast_law_is_per_entry(key):
    exponents = np.linspace(-13.9, 15.9, 5001)
    v = jnp.asarray(2.0**exponents * np.where(np.arange(5001) % 2, 1, -1))
    for dtype in (jnp.float16, jnp.bfloat16):
        error = np.abs(roundtrip(C.cast(dtype), key, v) - v)
        assert (error <= float(jnp.finfo(dtype).eps) * np.abs(v)).all()
    wild = jnp.asarray([1e30, -7e4, 1e-9, 1e-40, -3e-6])
    out = np.asarray(roundtrip(C.cast(jnp.float16), key, wild))
    assert (np.abs(out - wild) <= np.abs(wild)).all()
    assert out[0] == 65504
    assert np.isinf(roundtrip(C.cast(jnp.float16), key, jnp.array([jnp.inf]))[0])


def refused(message, build):
    return pytest.param(message, build, id=message.split("`")[1])


def test_cast_rounds_inside_a_program_too(key):
    v = jax.random.normal(key, (8, 10_000), jnp.float32)
    c = C.cast(jnp.bfloat16)

    @jax.jit
    def error(v):
        return jnp.vdot(v, v - c.decompress(c.compress(None, v, ())[0], v))

    lost = v - v.astype(jnp.bfloat16).astype(v.dtype)
    np.testing.assert_allclose(error(v[0]), jnp.vdot(v[0], lost[0]), rtol=1e-3)
    small = jnp.array([3e-6, -1e-7], jnp.float32)  # below the normal range of float16
    payload, _ = C.cast(jnp.float16).compress(None, small, ())
    np.testing.assert_array_equal(payload, small.astype(jnp.float16).view(jnp.uint16))


def test_derivatives_of_what_is_reduced(key):
    v = jnp.array([1.0, -5.0, 2.0, 4.0, -0.5])
    dv = jnp.array([10.0, 20.0, 30.0, 40.0, 50.0])

    def both(c):
        def sent(v):
            return c.decompress(c.compress(key, v, ())[0], v)

        along = jax.jvp(sent, (v,), (dv,))[1]
        return along, jax.grad(lambda v: jnp.vdot(dv, sent(v)))(v)

    along, back = both(C.block_top_k(2))  # blocks (1, 2, -0.5) and (-5, 4)
    np.testing.assert_array_equal(along, [0, 20, 30, 0, 0])
    np.testing.assert_array_equal(back, along)
    signs = jnp.sign(v)
    along, back = both(C.sign())  # the scale has a derivative, signs have none
    np.testing.assert_allclose(along, signs * jnp.mean(signs * dv))
    np.testing.assert_allclose(back, signs * jnp.mean(signs * dv))


@pytest.mark.parametrize("c", [C.int8, lambda **of: C.qsgd(127, **of)])
def test_whole_steps_are_never_lost(c, key):
    def nearly_one(key, shape, dtype):
        return jnp.full(shape, 1 - 2.0**-24, dtype)

    v = jnp.array([127.0, 0.0, 0.0], jnp.float32)
    c = c(uniform=nearly_one)
    got = c.decompress(c.compress(key, v, ())[0], v)
    np.testing.assert_array_equal(got, v)


@pytest.mark.parametrize(
    ("message", "build"),
    [
        *[
            pytest.param(rf"`top_k\(k\)` needs .*got k={k!r}", lambda k=k: C.top_k(k))
            for k in (0, -2, 0.0, 1.5, True, "3")
        ],
        refused("`block_top_k.*got k=0", lambda: C.block_top_k(0)),
        refused("`random_k.*got k=2.0", lambda: C.random_k(2.0)),
        refused("`strided_random_k.*got k=-1", lambda: C.strided_random_k(-1)),
        refused("`chunked_top_k.*got k=0", lambda: C.chunked_top_k(0)),
        *[
            pytest.param(
                r"`chunked_top_k\(k, chunk\)` needs .*got chunk=",
                lambda chunk=chunk: C.chunked_top_k(0.1, chunk),
            )
            for chunk in (0, 65537, 16.0, True)
        ],
        refused("`qsgd.*1 to 32767.*got levels=0", lambda: C.qsgd(0)),
        refused("`qsgd.*got levels=32768", lambda: C.qsgd(32768)),
        refused("`qsgd.*got levels=2.5", lambda: C.qsgd(2.5)),
        *[
            pytest.param(r"`int8\(block\)` needs .*got block=", lambda b=b: C.int8(b))
            for b in (0, -1, 2.0, True, "all")
        ],
        *[
            pytest.param(rf"`low_rank\(rank\)` .*rank={r!r}", lambda r=r: C.low_rank(r))
            for r in (0, 1.0, True)
        ],
        *[
            pytest.param(
                r"`low_rank\(rank, shape\)` needs .*got shape=",
                lambda shape=shape: C.low_rank(1, shape),
            )
            for shape in (5, (5,), (5, 0), (5, 2.0), (1, 2, 3))
        ],
        *[
            pytest.param(
                rf"`multi_step\(.* needs an integer rounds >= 1, got rounds={r!r}",
                lambda r=r: C.multi_step(C.top_k(1), r),
            )
            for r in (0, -1, 2.0, True)
        ],
        refused(
            "`multi_step` needs a compressor with a law.*neither",
            lambda: C.multi_step(C.composed(C.top_k(0.1), C.qsgd(3)), 2),
        ),
        refused("`cast.*got int8", lambda: C.cast(jnp.int8)),
        refused("`scaled` needs an unbiased", lambda: C.scaled(C.top_k(3))),
        refused("`scaled` needs an unbiased", lambda: C.scaled(C.sign())),
        refused(
            "`per_leaf.*d=5 entries, got d=6",
            lambda: C.per_leaf(C.top_k(0.1), jnp.ones(5)).delta(6),
        ),
    ],
)
def test_refusals_when_building(message, build):
    with pytest.raises(ValueError, match=message):
        build()


def test_refusals_when_tracing(key):
    names = "top_k", "block_top_k", "chunked_top_k", "random_k", "strided_random_k"
    for name in names:
        with pytest.raises(ValueError, match=rf"`{name}\(k=9\)` needs .* got d=8"):
            roundtrip(getattr(C, name)(9), key, jnp.ones(8))
    with pytest.raises(ValueError, match=r"real floating-point.*int32"):
        roundtrip(C.top_k(1), key, {"a": jnp.ones(3, jnp.int32)})
    with pytest.raises(ValueError, match=r"real floating-point.*complex"):
        roundtrip(C.sign(), key, jnp.ones(3, complex))
    with pytest.raises(ValueError, match=r"payload has a field `values`, got Packed"):
        roundtrip(C.composed(C.sign(), C.top_k(0.1)), key, jnp.ones(8))
    # Noise on the values of several rounds would not follow the law of `composed`.
    steps = C.multi_step(C.random_k(2), 2)
    with pytest.raises(ValueError, match=r"field `values`, got Repeated"):
        roundtrip(C.composed(steps, C.qsgd(3)), key, jnp.ones(8))
    with pytest.raises(ValueError, match=r"`low_rank\(shape=\(2, 3\)\)` .* 6 .*with 8"):
        roundtrip(C.low_rank(1, (2, 3)), key, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"real floating-point.*int32"):
        roundtrip(C.low_rank(1), key, {"a": jnp.ones((9, 9), jnp.int32)})
