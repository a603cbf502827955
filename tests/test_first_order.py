"""Hypergradients from gradients alone, against what they approximate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import dbojax as dbo

hg = dbo.hypergradients
KEY = jax.random.key(0)

# g is not quadratic in y, so that a difference quotient is not exact.
CURVED = dbo.Problem(
    lambda x, y, b: jnp.sum((y["u"] - 1) ** 2) + jnp.sum(x * y["v"]),
    lambda x, y, b: jnp.sum(jnp.exp(x[:1] * y["u"])) + jnp.sum(jnp.cosh(y["v"] - x)),
)
POINT = jnp.array([0.7, -0.4]), {"u": jnp.array([0.2]), "v": jnp.array([0.3, 1.0])}


def test_darts_is_reverse_mode_through_one_step_up_to_the_difference():
    x, y = POINT
    inner = hg.descent(CURVED, optax.sgd(0.3), 1)
    epsilons = jnp.array([0.2, 0.1, 0.05])

    @jax.jit
    def run(x, y):
        exact = hg.reverse(CURVED, inner).estimate(KEY, x, y, (), None)
        differences = jax.vmap(
            lambda eps: hg.darts(CURVED, 0.3, eps).estimate(KEY, x, y, (), None)
        )(epsilons)
        return exact, differences

    (g, y_new, _, info), (gs, ys, _, infos) = run(x, y)
    errors = np.linalg.norm(gs - g[None], axis=1)
    assert errors[-1] < 0.01 * jnp.linalg.norm(g)
    np.testing.assert_allclose(errors[:-1] / errors[1:], 4, rtol=0.05)
    for name in y:
        np.testing.assert_allclose(ys[name][0], y_new[name], rtol=1e-14)
    np.testing.assert_allclose(infos.value[0], info.value, rtol=1e-14)


def test_darts_takes_no_step_along_a_zero_gradient():
    problem = dbo.Problem(
        lambda x, y, b: jnp.sum(y**2) + 3 * x, lambda x, y, b: jnp.sum((y - x * y) ** 2)
    )
    x, y = jnp.array(0.5), jnp.zeros(2)
    g, _, _, info = jax.jit(hg.darts(problem, 0.1).estimate)(KEY, x, y, (), None)
    assert g == 3
    assert info.ok


def penalty_estimates(weights):
    """Converged estimates on the quadratic of the other tests, and what is exact."""
    task = toys.task()
    a, b, c = (jnp.asarray(leaf).mean(0) for leaf in task.batch.lower)
    target = jnp.asarray(task.batch.upper).mean(0)
    problem = dbo.Problem(
        lambda x, y, _: 0.5 * jnp.sum((y - target) ** 2) + 0.05 * jnp.sum(x**2),
        lambda x, y, _: 0.5 * y @ (a @ y) - y @ (b @ x + c),
    )
    optimizer = optax.sgd(1.0 / float(jnp.linalg.norm(a, 2) + 0.1))
    x, y = jnp.array([1.0, 0.5, -2.0]), jnp.zeros(toys.DY)

    def run(weight):
        hyper = hg.penalty(problem, weight, optimizer, 1500)
        return hyper.estimate(KEY, x, y, hyper.init(x, y), None)

    exact = np.asarray(task.exact.hypergradient(x))
    return jax.jit(jax.vmap(run))(jnp.asarray(weights)), exact, np.asarray(a)


def test_bias_of_the_penalty_halves_when_its_weight_doubles():
    weights = np.array([500.0, 1000.0, 2000.0])
    (g, y, state, info), exact, a = penalty_estimates(weights)
    errors = np.linalg.norm(g - exact[None], axis=1)
    np.testing.assert_allclose(errors[:-1] / errors[1:], 2, rtol=0.01)
    assert info.ok.all()
    # Both lower variables are where they should be: H (y - z) = -grad_y f(y) / weight.
    task = toys.task()
    f_y = y - np.asarray(task.batch.upper).mean(0)[None]
    np.testing.assert_allclose(
        (y - state.z) @ a, -f_y / weights[:, None], rtol=1e-8, atol=1e-12
    )


def test_penalty_keeps_its_variable_and_both_optimiser_states():
    hyper = hg.penalty(CURVED, 10.0, optax.sgd(0.05, momentum=0.9), 3)
    long = hg.penalty(CURVED, 10.0, optax.sgd(0.05, momentum=0.9), 6)
    x, y = POINT

    @jax.jit
    def twice(x, y):
        _, half, state, _ = hyper.estimate(KEY, x, y, hyper.init(x, y), None)
        return hyper.estimate(KEY, x, half, state, None)

    once = jax.jit(long.estimate)(KEY, x, y, long.init(x, y), None)
    for a, b in zip(*map(jax.tree.leaves, (twice(x, y)[:3], once[:3])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert once[3].cost.gradients == long.calls.gradients == 21


def test_penalty_takes_new_samples_at_each_step():
    problem = dbo.Problem(
        lambda x, y, t: 0.5 * (y - t) ** 2, lambda x, y, s: 0.5 * (y - s * x) ** 2
    )
    weight = 4.0
    hyper = hg.penalty(problem, weight, optax.sgd(0.5), 2)
    inner = dbo.Batch(upper=jnp.array([1.0, -1.0]), lower=jnp.array([2.0, 3.0]))
    rounds = dbo.Rounds(dbo.Batch(jnp.array(0.5), jnp.array(7.0)), inner)
    x, y = jnp.array(2.0), jnp.array(1.5)
    g, y_new, state, _ = jax.jit(hyper.estimate)(KEY, x, y, hyper.init(x, y), rounds)
    penalised = plain = 1.5
    for t, s in ((1.0, 2.0), (-1.0, 3.0)):
        penalised -= 0.5 * ((penalised - t) / weight + penalised - s * 2.0)
        plain -= 0.5 * (plain - s * 2.0)
    np.testing.assert_allclose((y_new, state.z), (penalised, plain), rtol=1e-14)
    # d/dx g = -s (y - s x), and the parts without y cancel
    np.testing.assert_allclose(g, weight * -7.0 * (penalised - plain), rtol=1e-13)
    with pytest.raises(ValueError, match=r"`Rounds.inner` needs samples for each of 3"):
        hg.penalty(problem, 1.0, optax.sgd(0.5), 3).estimate(KEY, x, y, state, rounds)


def test_diverging_steps_are_flagged_and_put_back():
    hyper = hg.penalty(CURVED, 10.0, optax.sgd(1e6), 50)
    x, y = POINT
    start = hyper.init(x, y)
    g, y_new, state, info = jax.jit(hyper.estimate)(KEY, x, y, start, None)
    assert not info.ok
    assert jnp.isfinite(g).all()
    for a, b in zip(*map(jax.tree.leaves, ((y_new, state), (y, start))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_moments_that_overflow_are_flagged_and_not_kept():
    # Adam then stands still for ever, at a finite y.
    problem = dbo.Problem(
        lambda x, y, b: (y - 1) ** 2, lambda x, y, b: x * (y - 3) ** 2
    )
    hyper = hg.penalty(problem, 10.0, optax.adam(0.1), 3)
    y, estimate = jnp.array(0.0), jax.jit(hyper.estimate)
    start = hyper.init(y, y)
    g, y, state, info = estimate(KEY, jnp.array(1e200), y, start, None)
    assert not info.ok
    assert jnp.isfinite(g)
    for a, b in zip(*map(jax.tree.leaves, (state, start)), strict=True):
        np.testing.assert_array_equal(a, b)
    _, after, _, info = estimate(KEY, jnp.array(1.0), y, state, None)
    assert info.ok
    assert after > y + 0.1


BAD = {
    "step_size": (lambda: hg.darts(CURVED, 0.0), "`darts` needs step_size > 0"),
    "epsilon": (lambda: hg.darts(CURVED, 0.1, -1.0), "`darts` needs epsilon > 0"),
    "weight": (lambda: hg.penalty(CURVED, 0.0, optax.sgd(1), 2), "needs weight > 0"),
    "steps": (lambda: hg.penalty(CURVED, 1.0, optax.sgd(1), 0), "steps >= 1, got 0"),
    "scalar": (
        lambda: hg.darts(CURVED._replace(lower=lambda x, y, b: y["v"]), 0.1).estimate(
            KEY, *POINT, (), None
        ),
        "`problem.lower",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_settings_are_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
