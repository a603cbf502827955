"""Unrolled hypergradients: NumPy recursions, closed forms, and each other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbojax as dbo

h = dbo.hypergradients
T, N, M = 12, 5, 4
FEW = 4  # steps of the network: written out by hand they are slow to compile

scalar = dbo.Problem(
    upper=lambda x, y, batch: (y - 1) ** 2 / 2,
    lower=lambda x, y, batch: (y - x) ** 2 / 2,
)


def quadratic():
    """g = y'Hy/2 + y'Yx and f = |y - c|^2/2 + |x|^2/2, with H, Y and c."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(M, M))
    parts = root @ root.T / M + np.eye(M), rng.normal(size=(M, N)), rng.normal(size=M)
    hessian, cross, centre = map(jnp.asarray, parts)
    problem = dbo.Problem(
        lambda x, y, batch: jnp.sum((y - centre) ** 2) / 2 + x @ x / 2,
        lambda x, y, batch: y @ hessian @ y / 2 + y @ cross @ x,
    )
    return problem, parts, jnp.asarray(rng.normal(size=N)), jnp.ones(M)


def tree_problem():
    """A small network whose data, in `Rounds`, differ from step to step."""

    def predict(y, inputs):
        return jnp.tanh(inputs @ y["hidden"]) @ y["out"]

    def lower(x, y, batch):
        inputs, targets = batch
        errors = jax.nn.softplus(x["weights"]) * (predict(y, inputs) - targets) ** 2
        size = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
        return jnp.mean(errors) + jnp.exp(x["decay"]) * size

    def upper(x, y, batch):
        inputs, targets = batch
        return jnp.mean((predict(y, inputs) - targets) ** 2) + x["decay"] ** 2

    rng = np.random.default_rng(1)
    data = (
        jnp.asarray(rng.normal(size=(FEW, 6, 3))),
        jnp.asarray(rng.normal(size=(FEW, 6))),
    )
    x = {"decay": jnp.asarray(-3.0), "weights": jnp.asarray(rng.normal(size=6))}
    y = {
        "hidden": jnp.asarray(rng.normal(size=(3, 4))),
        "out": jnp.asarray(rng.normal(size=4)),
    }
    outer = dbo.Batch(upper=jax.tree.map(lambda a: a[0], data), lower=None)
    batch = dbo.Rounds(outer, dbo.Batch(upper=None, lower=data))
    return dbo.Problem(upper, lower), x, y, batch


def estimate(hyper, x, y, batch=None):
    state = hyper.init(x, y)
    return jax.jit(hyper.estimate)(jax.random.key(0), x, y, state, batch)


EXACT = {
    "reverse": h.reverse,
    "checkpointed": h.checkpointed,
    "nested": h.nested,
    "forward": h.forward,
}
OPTIMIZERS = {
    "gradient descent": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.05, eps_root=1e-8),
}


@pytest.mark.parametrize("name", EXACT)
def test_scalar_closed_form(name):
    inner = h.descent(scalar, optax.sgd(0.5), 3)
    x, y = jnp.array(2.0), jnp.array(0.0)
    grad, y, _, info = estimate(EXACT[name](scalar, inner), x, y)
    assert (float(grad), float(y)) == (0.65625, 1.75)
    assert info.ok
    assert float(info.value) == 0.75**2 / 2


@pytest.mark.parametrize(("last", "expected"), [(1, 0.375), (2, 0.5625), (3, 0.65625)])
def test_truncated_scalar_closed_form(last, expected):
    inner = h.descent(scalar, optax.sgd(0.5), 3)
    hyper = h.truncated(scalar, inner, last)
    assert float(estimate(hyper, jnp.array(2.0), jnp.array(0.0))[0]) == expected


@pytest.mark.parametrize("last", [1, 5, T])
def test_quadratic_against_the_recursion(last):
    problem, (hessian, cross, centre), x, y = quadratic()
    step = 0.1
    inner = h.descent(problem, optax.sgd(step), T)
    iterate, jacobian = np.asarray(y), np.zeros((M, N))
    for t in range(T):
        iterate = iterate - step * (hessian @ iterate + cross @ np.asarray(x))
        if t >= T - last:  # what lies before is held constant
            jacobian = jacobian - step * (hessian @ jacobian + cross)
    expected = (iterate - centre) @ jacobian + np.asarray(x)
    grad, y_end, _, _ = estimate(h.truncated(problem, inner, last), x, y)
    np.testing.assert_allclose(y_end, iterate, rtol=1e-12)
    np.testing.assert_allclose(grad, expected, rtol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_exact_modes_agree_on_trees(optimizer):
    problem, x, y, batch = tree_problem()
    inner = h.descent(problem, OPTIMIZERS[optimizer](), FEW)

    def by_hand(x):
        tx, params = OPTIMIZERS[optimizer](), y
        memory = tx.init(params)
        for t in range(FEW):
            samples = jax.tree.map(lambda leaf: leaf[t], batch.inner.lower)  # noqa: B023
            gradient = jax.grad(problem.lower, 1)(x, params, samples)
            updates, memory = tx.update(gradient, memory, params)
            params = optax.apply_updates(params, updates)
        return problem.upper(x, params, batch.outer.upper)

    expected = jax.jit(jax.grad(by_hand))(x)
    grads = {name: estimate(make(problem, inner), x, y, batch)[0]
             for name, make in EXACT.items()}  # fmt: skip
    for grad in grads.values():
        chex.assert_trees_all_close(grad, expected, rtol=1e-10, atol=1e-13)
    whole = estimate(h.truncated(problem, inner, FEW), x, y, batch)[0]
    chex.assert_trees_all_close(whole, expected, rtol=1e-10, atol=1e-13)


def test_a_start_that_depends_on_x():
    problem, (hessian, _, centre), _, y = quadratic()
    shared = dbo.Problem(
        lambda x, y, batch: problem.upper(jnp.zeros(N), y, batch),
        lambda x, y, batch: problem.lower(jnp.ones(N), y, batch),
    )
    inner = h.descent(shared, optax.sgd(0.1), T, start=lambda key, x, y: x)
    x = jnp.arange(1.0, M + 1)
    contraction = np.linalg.matrix_power(np.eye(M) - 0.1 * hessian, T)
    grad, y_end, _, _ = estimate(h.reverse(shared, inner), x, y)
    np.testing.assert_allclose(grad, (y_end - centre) @ contraction, rtol=1e-12)
    # Truncation drops what comes through the start, even at full depth.
    cut = estimate(h.truncated(shared, inner, T), x, y)[0]
    np.testing.assert_array_equal(cut, np.zeros(M))


def test_the_number_of_segments_changes_nothing_but_memory():
    problem, _, x, y = quadratic()
    inner = h.descent(problem, optax.sgd(0.1), T)
    expected = estimate(h.reverse(problem, inner), x, y)[0]
    for segments in (1, 3, T):
        grad = estimate(h.nested(problem, inner, segments), x, y)[0]
        np.testing.assert_allclose(grad, expected, rtol=1e-12)


def test_memory_against_depth():
    problem, x, y, _ = tree_problem()
    samples = jax.tree.map(lambda a: a[0], tree_problem()[3].inner.lower)

    def temporary(make, steps):
        inner = h.descent(problem, optax.sgd(0.1), steps)
        call = jax.jit(make(problem, inner).estimate)
        compiled = call.lower(jax.random.key(0), x, y, (), samples).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    deep = {name: temporary(make, 576) for name, make in EXACT.items()}
    shallow = {name: temporary(EXACT[name], 64) for name in ("forward", "nested")}
    assert deep["forward"] == shallow["forward"]
    assert deep["nested"] < deep["checkpointed"] < deep["reverse"]
    # Nine times the depth: three times the states at the ends of segments.
    assert deep["nested"] < 4 * shallow["nested"]


def test_forward_mode_passes_through_a_loop_of_unknown_length():
    problem, (hessian, cross, centre), x, y = quadratic()

    def to_tolerance(key, x, y, batch):
        def slope(y):
            return jax.grad(problem.lower, 1)(x, y, batch)

        return jax.lax.while_loop(
            lambda y: jnp.linalg.norm(slope(y)) > 1e-13,
            lambda y: y - 0.2 * slope(y),
            y,
        )

    solution = -np.linalg.solve(hessian, cross)
    grad, y_end, _, info = estimate(h.forward(problem, to_tolerance, chunk=3), x, y)
    np.testing.assert_allclose(y_end, solution @ x, rtol=1e-10)
    np.testing.assert_allclose(grad, (y_end - centre) @ solution + x, rtol=1e-10)
    assert int(info.cost.tangents) == N


def test_cost_counts_what_is_called():
    problem, _, x, y = quadratic()
    inner = h.descent(problem, optax.sgd(0.1), T)
    costs = {
        name: [int(n) for n in estimate(make(problem, inner), x, y)[3].cost]
        for name, make in EXACT.items()
    }
    assert costs["reverse"] == [T + 2, 2 * T, 0, 1]
    assert costs["checkpointed"] == [2 * T + 2, 2 * T, 0, 1]
    assert costs["nested"] == [3 * T + 2, 2 * T, 0, 1]
    assert costs["forward"] == [T, 0, N * T, 1]


def test_many_problems_at_once():
    problem, _, x, y = quadratic()
    hyper = h.checkpointed(problem, h.descent(problem, optax.sgd(0.1), T))
    xs = jnp.stack([x, 2 * x, -x])
    keys = jax.random.split(jax.random.key(0), 3)
    several = jax.jit(jax.vmap(hyper.estimate, (0, 0, None, None, None)))
    grads = several(keys, xs, y, (), None)[0]
    alone = [estimate(hyper, row, y)[0] for row in xs]
    np.testing.assert_allclose(grads, jnp.stack(alone), rtol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_a_diverging_solver_is_flagged(name):
    problem, _, x, y = quadratic()
    inner = h.descent(problem, optax.sgd(1e200), T)
    grad, y_end, _, info = estimate(EXACT[name](problem, inner), x, y)
    assert not info.ok
    np.testing.assert_array_equal(grad, np.zeros(N))
    np.testing.assert_array_equal(y_end, y)


def test_dtypes_are_kept():
    inner = h.descent(scalar, optax.sgd(0.5), 3)
    for make in EXACT.values():
        low = jnp.float32(2.0), jnp.float32(0.0)
        grad, y, _, info = estimate(make(scalar, inner), *low)
        assert (grad.dtype, y.dtype, info.value.dtype) == (jnp.float32,) * 3


REFUSED = {
    "integers": (jnp.arange(N), jnp.ones(M), None, "`x` must hold real floating"),
    "integer leaf": (jnp.ones(N), jnp.arange(M), None, "`y` must hold real floating"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_variables(case):
    x, y, batch, message = REFUSED[case]
    problem, *_ = quadratic()
    hyper = h.reverse(problem, h.descent(problem, optax.sgd(0.1), T))
    with pytest.raises(ValueError, match=message):
        hyper.estimate(jax.random.key(0), x, y, (), batch)


def test_refused_settings():
    problem, *_ = quadratic()
    inner = h.descent(problem, optax.sgd(0.1), T)
    with pytest.raises(ValueError, match="whole number steps >= 1, got 0"):
        h.descent(problem, optax.sgd(0.1), 0)
    with pytest.raises(TypeError, match="`optimizer` must be"):
        h.descent(problem, 0.1, 3)
    with pytest.raises(TypeError, match="`inner` must be"):
        h.reverse(problem, optax.sgd(0.1))
    with pytest.raises(ValueError, match="at most all 12 steps, got last=13"):
        h.truncated(problem, inner, 13)
    with pytest.raises(ValueError, match="must divide the 12 inner steps"):
        h.nested(problem, inner, 5)
    with pytest.raises(ValueError, match="whole number chunk >= 1"):
        h.forward(problem, inner, chunk=0)


def test_refused_losses_and_rounds():
    problem, x, y, batch = tree_problem()
    inner = h.descent(problem, optax.sgd(0.1), FEW + 1)
    with pytest.raises(ValueError, match="needs samples for each of 5 inner steps"):
        h.reverse(problem, inner).estimate(jax.random.key(0), x, y, (), batch)
    vector = dbo.Problem(lambda x, y, batch: y, scalar.lower)
    hyper = h.reverse(vector, h.descent(vector, optax.sgd(0.1), 2))
    with pytest.raises(ValueError, match=r"`problem.upper\(x, y, batch\)` must return"):
        hyper.estimate(jax.random.key(0), jnp.ones(2), jnp.ones(2), (), None)
