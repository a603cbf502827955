"""Implicit hypergradients against closed forms, and where there is none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import dbojax as dbo

hg = dbo.hypergradients
KEY = jax.random.key(0)

# Section T1 of the specification: y_T = 1.75 after three steps of 0.5 from zero, x = 2.
SCALAR = dbo.Problem(
    lambda x, y, batch: (y - 1) ** 2 / 2, lambda x, y, batch: (y - x) ** 2 / 2
)
SCALAR_EXPECTED = {
    "cg": (hg.cg(SCALAR), 0.75),
    "hessian_free": (hg.hessian_free(SCALAR), 0.75),
    "neumann 0": (hg.neumann(SCALAR, 0, 0.5), 0.375),
    "neumann 1": (hg.neumann(SCALAR, 1, 0.5), 0.5625),
    "neumann 3": (hg.neumann(SCALAR, 3, 0.5), 0.703125),
}


@pytest.mark.parametrize("name", SCALAR_EXPECTED)
def test_scalar_closed_form(name):
    hyper, expected = SCALAR_EXPECTED[name]
    x, y = jnp.array(2.0), jnp.array(1.75)
    g, y, _, info = jax.jit(hyper.estimate)(KEY, x, y, hyper.init(x, y), None)
    np.testing.assert_allclose(g, expected, rtol=1e-14)
    np.testing.assert_allclose(info.value, 0.75**2 / 2)
    assert y == 1.75
    assert info.ok


@functools.cache
def one_node():
    """The mean of the task's nodes as one problem, on a dict and a tuple."""
    task = toys.task()
    a, b, c = (jnp.asarray(leaf).mean(0) for leaf in task.batch.lower)
    target = jnp.asarray(task.batch.upper).mean(0)

    def flat(x, y):
        return jnp.concatenate([x["a"], x["b"]]), jnp.concatenate(y)

    def upper(x, y, batch):
        x, y = flat(x, y)
        return 0.5 * jnp.sum((y - target) ** 2) + 0.05 * jnp.sum(x**2)

    def lower(x, y, batch):
        x, y = flat(x, y)
        return 0.5 * y @ (a @ y) - y @ (b @ x + c)

    x = {"a": jnp.ones(1), "b": jnp.array([0.5, -2.0])}
    flat_x = jnp.array([1.0, 0.5, -2.0])
    solution = jnp.linalg.solve(a, b @ flat_x + c)
    y = (solution[:2], solution[2:])
    exact = task.exact.hypergradient(flat_x)
    return dbo.Problem(upper, lower), x, y, exact, np.asarray(a)


def step_size():
    return 1.0 / float(np.linalg.norm(one_node()[-1], 2))


@functools.cache
def estimators():
    problem = one_node()[0]
    return {
        "cg": hg.cg(problem),
        "cg warm": hg.cg(problem, warm_start=True),
        "normal_cg": hg.normal_cg(problem),
        "gmres": hg.gmres(problem),
        "bicgstab": hg.bicgstab(problem),
        "dense": hg.dense(problem),
        "neumann": hg.neumann(problem, 2000, step_size()),
        "with inner": hg.cg(
            problem, inner=hg.descent(problem, optax.sgd(step_size()), 2000)
        ),
        "function": hg.cg(problem, inner=lambda key, x, y, batch: one_node()[2]),
    }


NAMES = (
    "cg",
    "cg warm",
    "normal_cg",
    "gmres",
    "bicgstab",
    "dense",
    "neumann",
    "with inner",
    "function",
)


@pytest.mark.parametrize("name", NAMES)
def test_closed_form_hypergradient_of_the_quadratic(name):
    _, x, y, exact, _ = one_node()
    hyper = estimators()[name]
    if name in ("with inner", "function"):
        y = jax.tree.map(jnp.zeros_like, y)
    g, _, state, info = jax.jit(hyper.estimate)(KEY, x, y, hyper.init(x, y), None)
    np.testing.assert_allclose(
        jnp.concatenate([g["a"], g["b"]]), exact, rtol=0, atol=1e-10
    )
    assert jax.tree.structure(state) == jax.tree.structure(hyper.init(x, y))
    assert info.ok
    assert info.residual < 1e-10
    told = hyper.calls + dbo.Calls(products=5 if name == "dense" else 0)
    for spent, most in zip(info.cost, dataclasses.astuple(told), strict=True):
        assert spent <= most


@pytest.mark.parametrize("last", [1, 3])
def test_truncated_unrolling_is_the_neumann_series_on_quadratics(last):
    problem, x, y, _, _ = one_node()
    inner = hg.descent(problem, optax.sgd(step_size()), 4)
    truncated = hg.truncated(problem, inner, last)
    neumann = hg.neumann(problem, last - 1, step_size(), inner)

    @jax.jit
    def both(y):
        return [
            hyper.estimate(KEY, x, y, (), None)[0] for hyper in (truncated, neumann)
        ]

    a, b = both(jax.tree.map(jnp.ones_like, y))
    for name in x:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-11, atol=1e-13)


def test_neumann_is_the_geometric_series_of_the_hessian():
    problem, x, y, _, a = one_node()
    hyper = hg.neumann(problem, 9, step_size())
    g, *_ = jax.jit(hyper.estimate)(KEY, x, y, (), None)
    f_y = np.concatenate(jax.grad(problem.upper, 1)(x, y, None))
    rest = np.linalg.matrix_power(np.eye(5) - step_size() * a, 10)
    z = np.linalg.solve(a, f_y - rest @ f_y)
    b = np.asarray(toys.task().batch.lower[1]).mean(0)
    expected = 0.1 * np.array([1.0, 0.5, -2.0]) + b.T @ z
    np.testing.assert_allclose(jnp.concatenate([g["a"], g["b"]]), expected, rtol=1e-10)


def test_a_warm_start_saves_steps_and_counts_one_product_more():
    problem, x, y, _, _ = one_node()
    hyper = hg.cg(problem, tol=1e-8, warm_start=True)
    estimate = jax.jit(hyper.estimate)
    _, _, z, cold = estimate(KEY, x, y, hyper.init(x, y), None)
    near = jax.tree.map(lambda a: a + 1e-7, y)
    g, _, z, warm = estimate(KEY, x, near, z, None)
    assert warm.cost.products < cold.cost.products
    same, *_ = jax.jit(hg.dense(problem).estimate)(KEY, x, near, (), None)
    for name in x:
        np.testing.assert_allclose(g[name], same[name], atol=1e-6)
    # Nothing is left to solve: b - A z to see it, and the cross term.
    *_, still = estimate(KEY, x, near, z, None)
    assert still.cost.products == 2


def test_soba_is_descent_on_the_linear_system():
    problem, x, y, exact, _ = one_node()
    hyper = hg.soba(problem, step_size())
    estimate = jax.jit(hyper.estimate)

    def repeat(z, _):
        g, _, z, info = hyper.estimate(KEY, x, y, z, None)
        return z, (jnp.concatenate([g["a"], g["b"]]), info.residual)

    z = hyper.init(x, y)
    _, _, first, info = estimate(KEY, x, y, z, None)
    assert info.residual == 1
    f_y = jax.grad(problem.upper, 1)(x, y, None)
    for got, slope in zip(first, f_y, strict=True):
        np.testing.assert_allclose(got, step_size() * slope, rtol=1e-12)
    _, (g, residual) = jax.jit(lambda z: jax.lax.scan(repeat, z, length=2000))(z)
    np.testing.assert_allclose(g[-1], exact, rtol=0, atol=1e-10)
    # After k steps from zero, the Neumann series of k terms.
    neumann = jax.jit(hg.neumann(problem, 2, step_size()).estimate)(KEY, x, y, (), None)
    np.testing.assert_allclose(
        g[3], jnp.concatenate([neumann[0]["a"], neumann[0]["b"]]), rtol=1e-11
    )
    np.testing.assert_allclose(residual[3], neumann[3].residual, rtol=1e-11)


def test_hessian_free_is_the_first_term_of_the_series():
    problem, x, y, _, _ = one_node()
    free, first = (
        jax.jit(hyper.estimate)(KEY, x, y, (), None)
        for hyper in (hg.hessian_free(problem, 0.3), hg.neumann(problem, 0, 0.3))
    )
    for name in x:
        np.testing.assert_allclose(free[0][name], first[0][name], rtol=1e-13)
    assert free[3].residual is None
    assert free[3].cost.products == 1


# g = y'Dy / 2 - x y with y in R^2: D tells what the linear system is like.
def bent(x, y, batch):
    return 0.5 * jnp.sum(batch * y**2) - x * jnp.sum(y)


BENT = dbo.Problem(lambda x, y, batch: 0.5 * jnp.sum((y - 1) ** 2), bent)
CURVATURES = {
    "indefinite": jnp.array([1.0, -1.5]),
    "singular": jnp.array([1.0, 0.0]),
    "nan": jnp.array([1.0, jnp.nan]),
}
FLAGS = {  # which of the three each estimator flags
    "cg": (hg.cg(BENT), (True, True, True)),
    "normal_cg": (hg.normal_cg(BENT), (False, False, True)),
    "neumann": (hg.neumann(BENT, 200, 0.5), (True, False, True)),
    "dense": (hg.dense(BENT), (False, True, True)),
    "soba": (hg.soba(BENT, 0.5), (False, False, True)),
}


@pytest.mark.parametrize("name", FLAGS)
def test_bad_problems_are_flagged_and_a_zero_gradient_gives_zero(name):
    hyper, flags = FLAGS[name]
    x = jnp.array(1.0)

    def run(curvature, y):
        g, y_new, _, info = hyper.estimate(KEY, x, y, hyper.init(x, y), curvature)
        return g, y_new, info

    curvatures = jnp.stack([*CURVATURES.values(), jnp.ones(2)])
    starts = jnp.array([[3.0, 2.5]] * 3 + [[1.0, 1.0]])
    g, y_new, info = jax.jit(jax.vmap(run))(curvatures, starts)
    assert jnp.isfinite(g).all()
    assert jnp.isfinite(y_new).all()
    for i, flagged in enumerate(flags):
        assert bool(info.ok[i]) is not flagged
    # Nobody calls a singular system solved.
    assert info.residual[1] > 0.1
    assert g[3] == 0
    assert info.ok[3]
    assert info.residual[3] == 0


def test_diverging_inner_solver_is_flagged_and_put_back():
    hyper = hg.cg(BENT, inner=hg.descent(BENT, optax.sgd(1e3), 400), warm_start=True)
    x, y = jnp.array(1.0), jnp.array([3.0, 2.5])
    ones = jnp.ones(2)
    g, y_new, z, info = jax.jit(hyper.estimate)(KEY, x, y, hyper.init(x, y), ones)
    assert not info.ok
    np.testing.assert_array_equal(y_new, y)
    assert jnp.isfinite(g)
    assert jnp.isfinite(z).all()


def test_levels_see_their_own_samples_and_rounds_their_steps():
    problem = dbo.Problem(
        lambda x, y, t: 0.5 * (y - t) ** 2, lambda x, y, s: 0.5 * (y - s * x) ** 2
    )
    outer = dbo.Batch(upper=jnp.array(1.0), lower=jnp.array(3.0))
    inner_samples = dbo.Batch(upper=jnp.zeros(2), lower=jnp.array([3.0, 5.0]))
    inner = hg.descent(problem, optax.sgd(1.0), 2)  # lands on s x
    x, y = jnp.array(2.0), jnp.array(0.0)
    hyper = hg.cg(problem, inner=inner)
    rounds = dbo.Rounds(outer, inner_samples)
    g, y_new, *_ = jax.jit(hyper.estimate)(KEY, x, y, (), rounds)
    assert y_new == 10.0
    np.testing.assert_allclose(g, (10.0 - 1.0) * 3.0)
    short = jax.tree.map(lambda a: a[:1], inner_samples)
    with pytest.raises(ValueError, match=r"`Rounds.inner` needs samples for each of 2"):
        hyper.estimate(KEY, x, y, (), dbo.Rounds(outer, short))


VECTOR = dbo.Problem(lambda x, y, b: y, lambda x, y, b: jnp.sum(y**2))
WRONG = {
    "upper not scalar": (hg.cg(VECTOR), jnp.ones(2), (), "`problem.upper"),
    "lower not scalar": (
        hg.cg(dbo.Problem(VECTOR.lower, VECTOR.upper), inner=lambda k, x, y, b: y),
        jnp.ones(2),
        (),
        r"`problem.lower\(x, y, batch\)` must return a scalar",
    ),
    "integers": (hg.cg(SCALAR), jnp.array(1), (), "`y` must hold real floating-point"),
    "state": (
        hg.cg(SCALAR, warm_start=True),
        jnp.ones(()),
        jnp.ones(2),
        "`state` must have the shapes of `y`",
    ),
    "soba's state": (
        hg.soba(SCALAR, 0.1),
        jnp.ones(()),
        (),
        "`state` must have the st",
    ),
    "inner": (
        hg.cg(SCALAR, inner=lambda k, x, y, b: (y, y)),
        jnp.ones(()),
        (),
        "the inner solver's result` must have the structure of `y`",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_what_is_wrong(name):
    hyper, y, state, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        hyper.estimate(KEY, jnp.ones(()), y, state, None)


def test_parts_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="`solve` must be a LinearSolver"):
        hg.implicit(SCALAR, lambda matvec, b: b)
    with pytest.raises(ValueError, match="`soba` needs step_size > 0"):
        hg.soba(SCALAR, 0.0)
    with pytest.raises(ValueError, match="`scaled_identity` needs scale > 0"):
        hg.hessian_free(SCALAR, -1.0)
