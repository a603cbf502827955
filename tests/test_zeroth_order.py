"""Estimators from values of the upper objective alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_directions import within

import dbojax as dbo
from dbojax.hypergradients import (
    antithetic_es,
    central,
    descent,
    directions,
    es,
    forward_gradient,
    one_sided,
    pes,
    reverse,
    zeroth_order,
)

N = 6
X, Y = jnp.linspace(-1.0, 1.0, N), jnp.zeros(N)
CURVED = dbo.Problem(
    lambda x, y, b: jnp.sum(jnp.sin(3 * y)) + jnp.sum(x**3),
    lambda x, y, b: jnp.sum((y - jnp.exp(x)) ** 2) / 2,
)
# The loss at the end of any unroll is linear in x, so smoothing changes nothing.
LINEAR = dbo.Problem(
    lambda x, y, b: jnp.vdot(jnp.arange(1.0, N + 1), y) + jnp.sum(x) + 2,
    lambda x, y, b: jnp.sum((y - x) ** 2) / 2,
)


@pytest.mark.parametrize(
    ("difference", "order", "law"),
    [(one_sided, 1, directions.gaussian), (central, 2, directions.rademacher)],
    ids=["one_sided", "central"],
)
def test_quotients_approach_slopes_at_their_order(difference, order, law, key):
    inner = descent(CURVED, optax.sgd(0.3), 3)
    exact = forward_gradient(CURVED, inner, 4, 4, law)
    wanted = jax.jit(exact.estimate)(key, X, Y, (), None)

    @jax.jit
    @jax.vmap
    def run(step):
        hyper = zeroth_order(CURVED, inner, 4, step, difference, law, chunk=4)
        return hyper.estimate(key, X, Y, (), None)

    steps = jnp.array([1e-2, 1e-3])
    found, y, _, info = run(steps)
    errors = np.linalg.norm(found - wanted[0][None], axis=1)
    assert abs(np.log10(errors[0] / errors[1]) - order) < 0.1
    np.testing.assert_allclose(y, jnp.stack([wanted[1]] * 2), rtol=1e-14)
    np.testing.assert_allclose(info.value, jnp.stack([wanted[3].value] * 2))
    np.testing.assert_allclose(info.variance[1], wanted[3].variance, rtol=0.05)


@pytest.mark.parametrize(
    ("difference", "solves"), [(one_sided, 7), (central, 13)], ids=["one", "two"]
)
def test_runs_share_their_noise_and_are_counted(difference, solves, key):
    """Noise of the solver, a thousand times as large as the step, cancels."""

    def solve(key, x, y, batch):
        return 2 * x + 0.1 * jax.random.normal(key, x.shape)

    problem = dbo.Problem(lambda x, y, b: jnp.sum(y), None)
    hyper = zeroth_order(
        problem, solve, N, 1e-4, difference, directions.orthogonal, chunk=2
    )
    found, _, _, info = jax.jit(hyper.estimate)(key, X, Y, (), None)
    np.testing.assert_allclose(found, 2 * jnp.ones(N), rtol=1e-9)
    assert int(info.cost.solves) == hyper.calls.solves == solves
    assert int(info.cost.tangents) == 0


def test_trees_and_chunks(key):
    problem = dbo.Problem(lambda x, y, b: jnp.sum(y["u"] ** 2) + y["v"], None)
    x = {"a": jnp.arange(3.0), "b": jnp.array(2.0)}

    def solve(key, x, y, batch):
        return {"u": x["a"] * x["b"], "v": x["b"]}

    y = jax.tree.map(jnp.zeros_like, solve(key, x, None, None))
    wanted = {"a": 2 * x["b"] ** 2 * x["a"], "b": 1 + 2 * x["b"] * jnp.sum(x["a"] ** 2)}
    for chunk in (1, 4):
        hyper = zeroth_order(
            problem, solve, 4, 1e-3, central, directions.orthogonal, chunk
        )
        found = jax.jit(hyper.estimate)(key, x, y, (), None)[0]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-5), found, wanted
        )


INNER = descent(LINEAR, optax.sgd(0.3), 2)
STRATEGIES = {"es": es, "antithetic_es": antithetic_es}


def unrolled_gradient(key, steps):
    hyper = reverse(LINEAR, descent(LINEAR, optax.sgd(0.3), steps))
    return jax.jit(hyper.estimate)(key, X, Y, (), None)[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_evolution_strategies_are_unbiased_and_know_their_error(name, key):
    hyper = STRATEGIES[name](LINEAR, INNER, 8, 0.5, chunk=8)

    def one(key):
        found, _, _, info = hyper.estimate(key, X, Y, (), None)
        return found, info.variance

    found, told = jax.jit(jax.vmap(one))(jax.random.split(key, 2000))
    wanted = unrolled_gradient(key, 2)
    assert within(found, wanted)
    errors = jnp.sum((found - wanted[None]) ** 2, axis=1)
    assert within(errors - told, 0.0)
    # Without mirrored pairs the value itself, divided by sigma, is part of the error.
    assert not within(2 * errors - told, 0.0)


def test_one_sample_does_not_know_its_error(key):
    info = jax.jit(es(LINEAR, INNER, 1, chunk=1).estimate)(key, X, Y, (), None)[3]
    assert np.isinf(info.variance)
    assert bool(info.ok)


def test_persistent_particles_see_the_whole_episode(key):
    episode = 3
    hyper = pes(LINEAR, INNER, episode, 4, 0.5, chunk=2)

    def one(key):
        def step(carry, key):
            found, y, state, info = hyper.estimate(key, X, *carry, None)
            return (y, state), (found, info.variance, y, state.age)

        start = Y, hyper.init(X, Y)
        return jax.lax.scan(step, start, jax.random.split(key, episode))[1]

    found, told, ys, ages = jax.jit(jax.vmap(one))(jax.random.split(key, 3000))
    truncated = unrolled_gradient(key, 2)
    for k in range(episode):
        wanted = unrolled_gradient(key, 2 * (k + 1))
        assert within(found[:, k], wanted)
        errors = jnp.sum((found[:, k] - wanted[None]) ** 2, axis=1)
        assert within(errors - told[:, k], 0.0)
        if k:
            assert not within(found[:, k], truncated)
    y = jax.jit(lambda x: x * (1 - 0.7 ** (2 * episode)))(X)
    np.testing.assert_allclose(ys[0, -1], y)
    np.testing.assert_array_equal(ages[0], [1, 2, 0])


def test_a_new_episode_forgets_the_last(key):
    hyper = pes(LINEAR, descent(LINEAR, optax.adam(0.1), 2), 1, 4, chunk=4)

    @jax.jit
    def two(key):
        first = hyper.estimate(key, X, Y, hyper.init(X, Y), None)
        return first, hyper.estimate(key, X, Y, first[2], None)

    first, second = two(key)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: zeroth_order(LINEAR, INNER, 6, chunk=4), "multiple of chunk"),
        (
            lambda: zeroth_order(LINEAR, INNER, step=0.0),
            "step > 0 and finite",
        ),
        (lambda: zeroth_order(LINEAR, INNER, 1.5), "directions >= 1, got 1.5"),
        (lambda: es(LINEAR, INNER, chunk=0), "chunk >= 1, got 0"),
        (
            lambda: antithetic_es(LINEAR, INNER, sigma=-1.0),
            "sigma > 0 and finite",
        ),
        (lambda: pes(LINEAR, INNER, 0), "episode >= 1, got 0"),
        (lambda: pes(LINEAR, INNER, 2, 3, chunk=2), "multiple of chunk"),
        (lambda: pes(LINEAR, INNER, 2, sigma=float("inf")), "sigma > 0 and finite"),
    ],
)
def test_messages(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: zeroth_order(LINEAR, INNER, difference=1), "must be a Difference"),
        (lambda: zeroth_order(LINEAR, INNER, law=1), "must be a Law"),
        (lambda: es(1, INNER), "must be a Problem"),
        (lambda: pes(LINEAR, abs, 2), "must be a Inner"),
    ],
)
def test_messages_about_kinds(make, match):
    with pytest.raises(TypeError, match=match):
        make()
