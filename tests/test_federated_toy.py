"""The federated toy: written objectives, solutions and both true hypergradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax.tasks import solve_federated_toy

SCOPES = {"global": False, "personal": True}


@pytest.fixture(scope="module")
def toy():
    return dbo.tasks.federated_toy(n=4, dx=6, dy=5)


@pytest.fixture(scope="module", params=SCOPES)
def exact(request, toy):
    """Functions of x, compiled once."""
    found = solve_federated_toy(toy.batch, SCOPES[request.param])
    functions = (*found, jax.grad(found.value))
    return SimpleNamespace(
        **dict(zip((*found._fields, "slope"), map(jax.jit, functions), strict=True))
    )


def test_the_objectives_are_the_written_ones(toy):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=6), rng.normal(size=5)
    h, a, b = (np.asarray(leaf[2]) for leaf in toy.batch.lower)
    t = np.asarray(toy.batch.upper[2])
    rest = [
        y[k] - sum(a[k, j] * np.tanh(x[j]) for j in range(6)) - b[k] for k in range(5)
    ]
    lower = sum(0.5 * rest[k] * h[k, m] * rest[m] for k in range(5) for m in range(5))
    lower += sum(0.1 * np.log(1 + np.exp(v)) for v in y)
    upper = sum(0.1 * v**2 / (1 + v**2) for v in x)
    upper += sum(np.sqrt(1 + (v - w) ** 2) for v, w in zip(y, t, strict=True))
    one = jax.tree.map(lambda leaf: leaf[2], toy.batch)
    np.testing.assert_allclose(toy.problem.lower(x, y, one.lower), lower, rtol=1e-12)
    np.testing.assert_allclose(toy.problem.upper(x, y, one.upper), upper, rtol=1e-12)


def test_the_lower_level_is_strongly_convex_and_the_upper_slope_bounded(toy):
    assert np.linalg.eigvalsh(toy.batch.lower.h).min() > 0.5 - 1e-12
    slope = jax.jit(jax.grad(toy.problem.upper, 1))
    slope = slope(toy.x0, toy.y0 + 1e6, toy.batch.upper[0])
    assert 0.999 * 5**0.5 < jnp.linalg.norm(slope) < 5**0.5 * (1 + 1e-12)


def test_the_upper_level_is_not_convex_in_x(toy):
    def along(x):
        return toy.problem.upper(x, toy.y0, toy.batch.upper[0])

    curvature = jax.jit(jax.hessian(along))
    assert jnp.linalg.eigvalsh(curvature(toy.x0 * 0 + 2.0))[0] < -1e-3
    assert jnp.linalg.eigvalsh(curvature(toy.x0 * 0))[0] > 1e-3


def test_the_solution_is_stationary(toy, exact, request):
    y = exact.solution(toy.x0)
    each = None if y.ndim == 1 else 0
    slopes = jax.vmap(jax.grad(toy.problem.lower, 1), (None, each, 0))
    found = jax.jit(slopes)(toy.x0, y, toy.batch.lower)
    found = found.mean(0) if each is None else found
    np.testing.assert_allclose(found, jnp.zeros_like(found), atol=1e-13)


def test_the_hypergradient_is_the_gradient_of_the_value(toy, exact):
    # Once through all of Newton's steps, once by differences of values.
    found = exact.hypergradient(toy.x0)
    np.testing.assert_allclose(found, exact.slope(toy.x0), rtol=1e-10, atol=1e-12)
    width = 1e-5
    slopes = [
        (exact.value(toy.x0 + width * e) - exact.value(toy.x0 - width * e))
        / (2 * width)
        for e in np.eye(6)
    ]
    np.testing.assert_allclose(found, slopes, atol=1e-8)


def test_evaluate_gives_the_norm_at_the_mean_of_x(toy, exact):
    drift = np.array([[1.0], [-1.0], [2.0], [-2.0]])
    x = toy.x0[None] + np.broadcast_to(drift, (4, 6))
    found = toy.evaluate(SimpleNamespace(x=x, y=dbo.replicate(toy.y0, 4)))
    assert set(found) == {"hypergrad_true", "hypergrad_personal"}
    wanted = jnp.linalg.norm(exact.hypergradient(toy.x0))
    personal = exact.solution(toy.x0).ndim == 2
    names = ("hypergrad_personal", "hypergrad_true")
    mine, other = names if personal else reversed(names)
    np.testing.assert_allclose(found[mine], wanted, rtol=1e-12)
    assert abs(found[other] - wanted) > 1e-3, "unlike clients have unlike problems"


def test_identical_clients_have_the_data_of_the_first(toy):
    alike = dbo.tasks.federated_toy(n=4, dx=6, dy=5, identical=True)
    for one, all_of in zip(
        jax.tree.leaves(alike.batch), jax.tree.leaves(toy.batch), strict=True
    ):
        np.testing.assert_array_equal(one, np.repeat(all_of[:1], 4, 0))


def test_bad_sizes_and_samplers_say_what_to_do():
    with pytest.raises(ValueError, match="at least one client"):
        dbo.tasks.federated_toy(n=0)
    with pytest.raises(ValueError, match="with_gradient_noise"):
        dbo.tasks.federated_toy(n=1, dx=1, dy=1).sampler(3)
