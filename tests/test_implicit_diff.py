"""Solutions differentiated implicitly, with and without constraints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo

hg = dbo.hypergradients
implicit_diff, fixed_point = hg.implicit_diff, hg.fixed_point
linear, projections = hg.linear, hg.projections

RNG = np.random.default_rng(5)
ROOT = RNG.normal(size=(4, 4))
A = ROOT @ ROOT.T / 4 + np.eye(4)
B = np.array([2.0, 0.5, -1.0, 0.3])
CONTRACTION = 0.2 * RNG.normal(size=(4, 4))

SOLVERS = {
    "default": None,
    "cg": linear.cg(20),
    "dense": linear.dense(),
}


def ridge(x, y, b):
    """Its minimum is (A + exp(x) I)^-1 b."""
    return 0.5 * y @ (A @ y) + 0.5 * jnp.exp(x) * jnp.sum(y**2) - y @ b


def numpy_solver(x, y0, b):
    """Nothing in here has a derivative."""
    shape = jax.ShapeDtypeStruct((4,), float)
    return jax.pure_callback(
        lambda x, b: np.linalg.solve(A + np.exp(x) * np.eye(4), b),
        shape,
        x,
        b,
        vmap_method="sequential",
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_both_modes_give_the_derivative_of_the_closed_form(name):
    solver = implicit_diff(jax.grad(ridge, 1), SOLVERS[name])(numpy_solver)
    x, y0, b = 0.3, jnp.ones(4), jnp.asarray(B)

    @jax.jit
    def derivatives(x, b):
        return [mode(solver, (0, 2))(x, y0, b) for mode in (jax.jacfwd, jax.jacrev)]

    inverse = np.linalg.inv(A + np.exp(x) * np.eye(4))
    for in_x, in_b in derivatives(x, b):
        expected = -np.exp(x) * inverse @ inverse @ B
        np.testing.assert_allclose(in_x, expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(in_b, inverse, rtol=0, atol=1e-10)


def test_batches_of_gradients_and_no_derivative_in_the_start():
    solver = implicit_diff(jax.grad(ridge, 1), linear.cg(20))(numpy_solver)

    def loss(x, y0, b):
        return jnp.sum(solver(x, y0, b) ** 2)

    xs, bs = jnp.array([0.0, 1.0]), jnp.stack([B, 2 * B])
    grads = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, 0)))(
        xs, jnp.ones(4), bs
    )
    for i in range(2):
        inverse = np.linalg.inv(A + np.exp(xs[i]) * np.eye(4))
        y = inverse @ bs[i]
        np.testing.assert_allclose(
            grads[0][i], -2 * np.exp(xs[i]) * y @ inverse @ y, rtol=1e-10
        )
        np.testing.assert_allclose(grads[2][i], 2 * inverse @ y, rtol=1e-10)
    assert not grads[1].any()


@pytest.mark.parametrize("name", ["default", "bicgstab"])
def test_fixed_points_of_maps_that_are_not_symmetric(name):
    def update(x, y):
        return CONTRACTION @ y + x

    @implicit_diff(fixed_point(update), {"bicgstab": linear.bicgstab(12)}.get(name))
    def solver(x, y0):
        return jax.lax.while_loop(
            lambda y: jnp.abs(update(x, y) - y).max() > 1e-13,
            lambda y: update(x, y),
            y0,
        )

    x = jnp.asarray(B)
    both = jax.jit(lambda x: (jax.jacfwd(solver)(x, x), jax.jacrev(solver)(x, x)))(x)
    for jacobian in both:
        np.testing.assert_allclose(
            jacobian, np.linalg.inv(np.eye(4) - CONTRACTION), rtol=0, atol=1e-10
        )


def test_second_derivatives_in_every_order_of_modes():
    @implicit_diff(lambda x, y: y**3 - x, linear.cg(3))
    def root(x, y0):
        return jnp.cbrt(x)

    x = 1.7

    @jax.jit
    def second(x):
        modes = (jax.jacfwd, jax.jacrev)
        return [a(b(lambda x: root(x, 1.0)))(x) for a in modes for b in modes]

    np.testing.assert_allclose(second(x), -2 / 9 * x ** (-5 / 3), rtol=1e-9)


def test_trees_integers_keys_and_aux_pass_through():
    def optimality(x, y, power, key):
        return {"u": y["u"] - x[0], "v": y["v"] - x[1] ** power}

    @implicit_diff(optimality, linear.cg(5), has_aux=True)
    def solver(x, y0, power, key):
        return {"u": x[0], "v": x[1] ** power}, {"steps": 3, "x": x[1]}

    def loss(x):
        y, aux = solver(x, None, 3, jax.random.key(1))
        return jnp.sum(y["u"]) + y["v"] + aux["x"], aux

    x = (jnp.ones(2), jnp.array(2.0))
    grads, aux = jax.jit(jax.grad(loss, has_aux=True))(x)
    np.testing.assert_allclose(grads[0], 1.0)
    np.testing.assert_allclose(grads[1], 12.0)  # and nothing through aux
    assert aux["steps"] == 3


def test_a_derivative_whose_system_breaks_down_is_nan_and_the_value_is_not():
    solver = implicit_diff(lambda x, y: x - y, linear.cg(5))(lambda x, y0: x)
    value, grad = jax.jit(jax.value_and_grad(solver))(2.0, 0.0)
    assert value == 2.0
    assert jnp.isnan(grad)


def test_what_cannot_be_differentiated_is_refused():
    with pytest.raises(ValueError, match="`y` must hold real floating-point arrays"):
        implicit_diff(lambda x, y: y)(lambda x, y0: 3)(1.0, 0.0)
    with pytest.raises(ValueError, match=r"`optimality\(x, y, \*args\)` must have the"):
        implicit_diff(lambda x, y: (y, y))(lambda x, y0: x)(1.0, 0.0)
    with pytest.raises(TypeError, match="`solve` must be a LinearSolver"):
        implicit_diff(lambda x, y: y, linear.cg)


def test_a_pair_that_is_an_array_is_refused():
    root = implicit_diff(lambda x, y: y**2 - x, has_aux=True)(lambda x, y0: x**0.5)
    with pytest.raises(ValueError, match=r"must return a pair \(y, aux\)"):
        root(jnp.array([1.0, 4.0]), jnp.ones(2))


# --- constrained problems: the active set is known, so the derivative is too ---

STEP = 1 / float(np.linalg.norm(A, 2))


def kkt(bend, normals):
    """Derivative in x of argmin y'Ay/2 - x'y, the normals of what is active given."""
    normals = np.atleast_2d(normals)
    m = len(normals)
    system = np.block([[bend, normals.T], [normals, np.zeros((m, m))]])
    return np.linalg.inv(system)[:4, :4]


def box_jacobian(y):
    return kkt(A, np.eye(4)[(y <= -0.4) | (y >= 0.6)])


def simplex_jacobian(y):
    return kkt(A, np.concatenate([np.eye(4)[y <= 0], np.ones((1, 4))]))


def ball_jacobian(y):
    pull = y @ (B - A @ y) / (y @ y)  # A y + pull y = x
    return kkt(A + pull * np.eye(4), y)


def lasso_jacobian(y):
    return kkt(A, np.eye(4)[y == 0])


CONSTRAINED = {
    "box": (lambda v: projections.box(v, -0.4, 0.6), box_jacobian),
    "simplex": (projections.simplex, simplex_jacobian),
    "ball": (lambda v: projections.ball(v, 0.5), ball_jacobian),
    "lasso": (lambda v: projections.soft_threshold(v, 0.6 * STEP), lasso_jacobian),
}


def projected(project):
    """Projected gradient descent on y'Ay/2 - x'y, made differentiable."""

    def update(x, y):
        return project(y - STEP * (A @ y - x))

    @implicit_diff(fixed_point(update))
    def solver(x, y0):
        return jax.lax.fori_loop(0, 400, lambda _, y: update(x, y), y0)

    return solver


@pytest.mark.parametrize("name", CONSTRAINED)
def test_constrained_quadratics_have_the_derivative_of_their_active_set(name):
    project, expected = CONSTRAINED[name]
    solver, x = projected(project), jnp.asarray(B)
    y, forward, reverse = jax.jit(
        lambda x: (
            solver(x, x),
            jax.jacfwd(solver)(x, x),
            jax.jacrev(solver)(x, x),
        )
    )(x)
    assert 0 < np.linalg.matrix_rank(np.asarray(expected(y)), tol=1e-9) < 4
    np.testing.assert_allclose(forward, expected(np.asarray(y)), rtol=0, atol=1e-10)
    np.testing.assert_allclose(reverse, expected(np.asarray(y)), rtol=0, atol=1e-10)


def test_lasso_on_an_orthonormal_design_is_soft_thresholding():
    q = np.linalg.qr(ROOT)[0]

    def update(x, y):
        weight, target = x
        return projections.soft_threshold(
            y - 0.5 * (q.T @ (q @ y - target)), 0.5 * weight
        )

    @implicit_diff(fixed_point(update))
    def solver(x, y0):
        return jax.lax.fori_loop(0, 100, lambda _, y: update(x, y), y0)

    x = (jnp.array(1.0), jnp.asarray(B))
    y, (in_weight, in_target) = jax.jit(
        lambda x: (solver(x, x[1]), jax.jacrev(solver)(x, x[1]))
    )(x)
    correlations = q.T @ B
    alive = np.abs(correlations) > 1.0
    assert 0 < alive.sum() < 4
    signs = alive * np.sign(correlations)
    np.testing.assert_allclose(y, signs * (np.abs(correlations) - 1.0), atol=1e-12)
    np.testing.assert_allclose(in_weight, -signs, atol=1e-10)
    np.testing.assert_allclose(in_target, alive[:, None] * q.T, atol=1e-10)


def test_simplex_derivative_at_ties_of_the_sort_in_batches_and_both_modes():
    points = jnp.array([[1.0, 1.0, 1.0, -3.0], [0.2, 0.9, 0.9, -1.0], [5.0, 0, 0, 0]])
    supports = np.array([[1.0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0]])

    @jax.jit
    def derivatives(points):
        modes = (jax.jacfwd, jax.jacrev)
        return [
            jax.vmap(m(projections.simplex, (0, 1)), (0, None))(points, 1.0)
            for m in modes
        ]

    for in_v, in_total in derivatives(points):
        for s, jacobian, slope in zip(supports, in_v, in_total, strict=True):
            expected = np.diag(s) - np.outer(s, s) / s.sum()
            np.testing.assert_allclose(jacobian, expected, atol=1e-14)
            np.testing.assert_allclose(slope, s / s.sum(), atol=1e-14)


@jax.jit
def pieces(v):
    p = projections
    return {
        "box": jax.jacrev(p.box, (0, 1, 2))(v, 0.0, 1.0),
        "soft": jax.jacrev(p.soft_threshold, (0, 1))(v, 1.0),
        "ball": jax.jacrev(p.ball, (0, 1))(v, 1.0),
        "inside": jax.jacrev(p.ball, (0, 1))(v, 9.0),
        "origin": jax.jacrev(p.ball)(0 * v, 9.0),
        "kink": jax.jacrev(p.soft_threshold)(0 * v, 1.0),
    }


def test_derivatives_of_the_other_pieces():
    v = np.array([-2.0, 0.5, 3.0])
    found = pieces(jnp.asarray(v))
    in_v, in_low, in_high = found["box"]
    np.testing.assert_array_equal(in_v, np.diag([0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(in_low, [1, 0, 0])
    np.testing.assert_array_equal(in_high, [0, 0, 1])
    np.testing.assert_array_equal(found["soft"][0], np.diag([1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(found["soft"][1], [1, 0, -1])
    size = np.linalg.norm(v)
    tangent = np.eye(3) - np.outer(v, v) / size**2
    np.testing.assert_allclose(found["ball"][0], tangent / size, atol=1e-14)
    np.testing.assert_allclose(found["ball"][1], v / size, atol=1e-14)
    np.testing.assert_allclose(found["inside"][0], np.eye(3), atol=1e-14)
    np.testing.assert_array_equal(found["inside"][1], np.zeros(3))
    np.testing.assert_array_equal(found["origin"], np.eye(3))
    np.testing.assert_array_equal(found["kink"], np.zeros((3, 3)))


def test_sets_of_trees_span_all_leaves_and_take_one_bound_or_one_per_entry():
    v = {"a": jnp.array([2.0, 1.5], jnp.float32), "b": jnp.array(0.0)}
    on_simplex = projections.simplex(v)
    np.testing.assert_allclose(on_simplex["a"], [0.75, 0.25])
    np.testing.assert_allclose(projections.ball(v, 1.25)["a"], [1.0, 0.75])
    low = {"a": jnp.array([0.0, 1.7]), "b": jnp.array(-1.0)}
    boxed = projections.box(v, low, 1.8)
    np.testing.assert_allclose(boxed["a"], [1.8, 1.7], rtol=1e-6)
    for tree in (on_simplex, boxed, projections.soft_threshold(v, 0.5)):
        assert tree["a"].dtype == jnp.float32
        assert tree["b"].dtype == jnp.float64


def test_weights_may_be_a_tree():
    v, weights = (
        {"a": jnp.ones(2), "b": jnp.ones(3)},
        {"a": 0.25, "b": jnp.full(3, 2.0)},
    )
    shrunk = projections.soft_threshold(v, weights)
    assert shrunk["a"].tolist() == [0.75] * 2
    assert shrunk["b"].tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="`soft_threshold` needs weight >= 0"):
        projections.soft_threshold(v, weights | {"a": -1.0})


BAD = {
    "total": (lambda: projections.simplex(jnp.ones(2), 0.0), "`simplex` needs total"),
    "radius": (lambda: projections.ball(jnp.ones(2), -1.0), "`ball` needs radius > 0"),
    "weight": (
        lambda: projections.soft_threshold(jnp.ones(2), -1.0),
        "`soft_threshold` needs weight >= 0",
    ),
    "bound": (
        lambda: projections.box({"a": jnp.ones(2)}, [0.0], 1.0),
        "A bound must be one number or have the structure",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_sets_are_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
