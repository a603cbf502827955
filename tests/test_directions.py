"""Random directions: their second moments, their numbering, the error they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax.hypergradients import directions, forward_gradient

N, B = 40, 5
# name: (law, relative mean squared error of b directions in N dimensions)
LAWS = {
    "rademacher": (directions.rademacher, lambda n, b: (n - 1) / b),
    "gaussian": (directions.gaussian, lambda n, b: (n + 1) / b),
    "sphere": (directions.sphere, lambda n, b: (n - 1) / b),
    "coordinates": (directions.coordinates, lambda n, b: (n - 1) / b),
    "without_replacement": (
        directions.coordinates_without_replacement,
        lambda n, b: (n - b) / b,
    ),
    "orthogonal": (directions.orthogonal, lambda n, b: (n - b) / b),
}
each_law = pytest.mark.parametrize("name", LAWS)


def within(samples, wanted, sigmas=5.0):
    """Whether the means of samples (k, ...) lie within so many standard errors."""
    samples = np.asarray(samples)
    error = samples.std(axis=0, ddof=1) / len(samples) ** 0.5
    off = np.abs(samples.mean(axis=0) - wanted)
    return bool((off <= sigmas * error + 1e-12).all())


def test_the_interval_is_not_too_wide():
    samples = np.random.default_rng(0).normal(size=4000)
    assert within(samples, 0.0)
    assert not within(samples, 0.2)


def many(name, keys, size=N, count=B):
    law = LAWS[name][0]

    def one(key):
        return law.draw(key, size, count, jnp.float64)(jnp.arange(count))

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), keys)))


@each_law
def test_second_moment_is_the_identity_across_leaves(name):
    # Entries of one vector as `trees.ravel` orders the leaves of x, so that entries of
    # two leaves are as uncorrelated as those of one.
    v = many(name, 4000, size=6, count=3)
    assert within(np.einsum("kbi,kbj->kij", v, v) / 3, np.eye(6))
    assert within(v[:, 0, :, None] * v[:, 0, None, :], np.eye(6))


@each_law
def test_squared_error_is_the_closed_form_and_is_reported(name, key):
    law, factor = LAWS[name]
    matrix = jax.random.normal(key, (N, N))
    problem = dbo.Problem(lambda x, y, b: jnp.sum(y * y) / 2 + x["b"].sum(), None)

    def solve(key, x, y, batch):
        return matrix @ jnp.concatenate([x["a"].reshape(-1), x["b"]])

    x = {"a": jnp.linspace(-1.0, 1.0, 30).reshape(5, 6), "b": jnp.ones(10)}
    hyper = forward_gradient(problem, solve, B, chunk=B, law=law)

    def estimate(key):
        found, _, _, info = hyper.estimate(key, x, jnp.zeros(N), (), None)
        return dbo.trees.ravel(found), info.variance

    keys = jax.random.split(jax.random.key(5), 3000)
    found, variance = jax.jit(jax.vmap(estimate))(keys)
    flat = np.asarray(dbo.trees.ravel(x))
    exact = np.asarray(matrix.T @ (matrix @ flat)) + (np.arange(N) >= 30)
    square = np.sum(exact**2)
    assert within(found, exact)
    errors = np.sum((np.asarray(found) - exact) ** 2, axis=1)
    assert within(errors / square, factor(N, B))
    assert within(np.asarray(variance) / square, factor(N, B))


def test_squared_error_of_many_directions():
    n, b = 360, 2000
    g = jnp.cos(jnp.arange(float(n)))

    def error(key):
        v = directions.rademacher.draw(key, n, b, jnp.float64)(jnp.arange(b))
        return jnp.sum((v.T @ (v @ g) / b - g) ** 2) / jnp.sum(g**2)

    keys = jax.random.split(jax.random.key(1), 25)
    errors = jax.jit(lambda keys: jax.lax.map(error, keys))(keys)
    assert within(errors, (n - 1) / b)
    assert not within(errors, (n - 1) / b * 1.3)


@each_law
def test_a_direction_does_not_know_its_neighbours(name, key):
    @jax.jit
    def drawn(key, indices):
        return LAWS[name][0].draw(key, N, 6, jnp.float64)(indices)

    whole = np.asarray(drawn(key, jnp.arange(6)))
    assert whole.shape == (6, N)
    shuffled = np.array([4, 1, 1, 5])
    np.testing.assert_allclose(drawn(key, shuffled), whole[shuffled], rtol=1e-14)
    other = np.asarray(drawn(jax.random.key(99), jnp.arange(6)))
    assert np.abs(other - whole).max() > 0


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_signs_fill_any_length(size):
    v = many("rademacher", 64, size=size)
    assert v.shape == (64, B, size)
    assert (np.abs(v) == 1).all()
    # No entry repeats another one's signs.
    flat = v.reshape(-1, size)
    gram = np.abs(flat.T @ flat) / len(flat) - np.eye(size)
    assert gram.max() < 0.5


@pytest.mark.parametrize("name", ["sphere", "orthogonal", "without_replacement"])
def test_lengths_and_angles(name):
    v = many(name, 20)
    gram = np.einsum("kbi,kci->kbc", v, v)
    diagonal = np.einsum("kbb->kb", gram)
    np.testing.assert_allclose(diagonal, N)
    if LAWS[name][0].orthogonal:
        wanted = np.broadcast_to(N * np.eye(B), gram.shape)
        np.testing.assert_allclose(gram, wanted, atol=1e-11)


def test_as_many_orthogonal_directions_as_entries_leave_no_error(key):
    g = jnp.arange(1.0, 7.0)
    for law in (directions.orthogonal, directions.coordinates_without_replacement):
        v = law.draw(key, 6, 6, jnp.float64)(jnp.arange(6))
        np.testing.assert_allclose((v @ g) @ v / 6, g)
        w, squares = v @ g, jnp.sum(v * v, axis=1)
        variance = directions.sample_variance(law, w, squares)
        np.testing.assert_allclose(variance, 0, atol=1e-9)


@each_law
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_short_floats_stay_finite(name, dtype, key):
    size = 70_000 if name == "sphere" else 64

    @jax.jit
    def drawn(key):
        return LAWS[name][0].draw(key, size, 4, dtype)(jnp.arange(4))

    v = drawn(key)
    assert v.dtype == dtype
    squares = np.mean(np.asarray(v, np.float64) ** 2, axis=1)
    assert np.isfinite(squares).all()
    np.testing.assert_allclose(squares, 1, rtol=0.05 if name != "gaussian" else 0.9)


def test_keys_of_solver_directions_and_guides_differ(key):
    own = [directions.direction_key(key, guides) for guides in range(3)]
    keys = [key, *own, *jax.random.split(key), jax.random.fold_in(key, 0)]
    drawn = {int(jax.random.bits(k)) for k in keys[:4]}
    assert len(drawn) == 4
    assert drawn.isdisjoint({int(jax.random.bits(k)) for k in keys[4:]})


@pytest.mark.parametrize("name", ["orthogonal", "without_replacement"])
def test_message_of_too_many_orthogonal_directions(name, key):
    with pytest.raises(ValueError, match="at most as many directions as x has"):
        LAWS[name][0].draw(key, 4, 5, jnp.float64)
