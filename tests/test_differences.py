"""Products as differences of gradients, against exact ones and closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import dbojax as dbo
from dbojax import oracles

FORMS = [{}, {"reuse": True, "at_once": False}]  # each flag both ways


def _curved():
    """A problem with all derivatives, on trees, and a point in the midst of it."""
    rng = np.random.default_rng(2)
    mixed = rng.normal(size=(4, 3))

    def upper(x, y, batch):
        return jnp.sum(jnp.sin(x["a"])) * jnp.sum(y["v"] ** 2) + y["s"] * batch

    def lower(x, y, batch):
        inner = jnp.tanh(y["v"] @ mixed) + x["a"] * y["s"]
        return jnp.sum(jnp.cosh(inner - batch)) + jnp.sum(y["v"] ** 4) + y["s"] ** 2

    x = {"a": jnp.array(rng.normal(size=3))}
    y = {"v": jnp.array(rng.normal(size=4) / 2), "s": jnp.array(0.3)}
    z = {"v": jnp.array(rng.normal(size=4)), "s": jnp.array(-0.7)}
    return dbo.Problem(upper, lower), x, y, z, jnp.array(0.4)


def _quadratic():
    toy = dbo.tasks.quadratic(n=1, dx=3, dy=5)
    batch = jax.tree.map(lambda leaf: leaf[0], toy.batch)
    rng = np.random.default_rng(3)
    x, y, z = (jnp.array(rng.normal(size=d)) for d in (3, 5, 5))
    return toy, batch, x, y, z


def _distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.sum(np.square(np.subtract(u, v))) for u, v in pairs) ** 0.5


def _slope(sizes, errors):
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def _by_form(problem, radius, items=True):
    """Directions of each form of the oracle, in one compiled program."""

    def directions(x, y, z, batch):
        made = [oracles.finite_difference(problem, radius, **f) for f in FORMS]
        return [oracle.directions(None, x, y, z, (), batch)[0] for oracle in made]

    if not items:
        return directions
    compiled = jax.jit(directions)
    return lambda *point: zip(FORMS, compiled(*point), strict=True)


def test_the_order_of_the_differences_is_two():
    problem, x, y, z, batch = _curved()
    radii = np.array([0.08, 0.04, 0.02, 0.01])

    def exact():
        gradient = jax.grad(problem.lower, (0, 1))
        (_, slope), (cross, hessian) = jax.jvp(
            lambda y: gradient(x, y, batch), (y,), (z,)
        )
        f_x, f_y = jax.grad(problem.upper, (0, 1))(x, y, batch)
        minus = functools.partial(jax.tree.map, jnp.subtract)
        return minus(f_x, cross), slope, minus(hessian, f_y)

    @jax.jit
    def errors():
        def at(radius):
            found = _by_form(problem, radius, items=False)(x, y, z, batch)
            return [jax.tree.map(jnp.subtract, d, exact()) for d in found]

        off = jax.vmap(at)(radii)
        return [[jax.vmap(dbo.trees.norm)(d) for d in form] for form in off]

    for form, by_name in zip(FORMS, errors(), strict=True):
        for name, off in zip("xyz", by_name, strict=True):
            if name == "y" and not form:
                assert max(off) < 1e-13
            else:
                assert off[-1] > 1e-8  # above rounding, or the fit means nothing
                assert _slope(radii, off) == pytest.approx(2, abs=0.05)


def test_closed_forms_of_powers():
    problem = dbo.Problem(
        lambda x, y, b: 0.0 * y, lambda x, y, b: y**4 / 4 + x * y**3 / 3
    )
    x, y, z = jnp.array(0.0), jnp.array(1.0), jnp.array(2.0)
    for form, (d_x, d_y, d_z) in _by_form(problem, 0.2)(x, y, z, None):
        mean = 12 * 0.01 if form else 0  # delta = 0.2 / 2
        np.testing.assert_allclose(d_z, 6.08, rtol=1e-13)
        np.testing.assert_allclose(d_x, -(2 + 8 / 3 * 0.01), rtol=1e-13)
        np.testing.assert_allclose(d_y, 1 + mean, rtol=1e-13)


def test_quadratics_have_the_directions_of_soba():
    toy, batch, x, y, z = _quadratic()
    start, _ = oracles.finite_difference(toy.problem).init(x, y)
    np.testing.assert_array_equal(start, jnp.zeros(5))
    a, b, c = batch.lower
    for _, (d_x, d_y, d_z) in _by_form(toy.problem, 0.5)(x, y, z, batch):
        np.testing.assert_allclose(d_x, 0.1 * x + b.T @ z, atol=1e-12)
        np.testing.assert_allclose(d_y, a @ y - b @ x - c, atol=1e-12)
        np.testing.assert_allclose(d_z, a @ z - (y - batch.upper), atol=1e-12)


def test_no_auxiliary_variable_no_difference_and_no_nan():
    problem, x, y, z, batch = _curved()
    f_x, f_y = jax.jit(jax.grad(problem.upper, (0, 1)))(x, y, batch)
    both = jax.tree.map(lambda leaf: jnp.stack([0 * leaf, leaf]), z)
    found = jax.vmap(_by_form(problem, 0.01, items=False), (None, None, 0, None))
    for d_x, _, d_z in jax.jit(found)(x, y, both, batch):
        np.testing.assert_array_equal(d_x["a"][0], f_x["a"])
        np.testing.assert_array_equal(d_z["v"][0], -f_y["v"])
        assert np.abs(d_x["a"][1] - f_x["a"]).max() > 0.1


def test_directions_can_be_differentiated_where_z_is_zero():
    """In z that gives the product itself, whose slope is the Hessian."""
    problem, x, y, z, batch = _curved()
    oracle = oracles.finite_difference(problem, reuse=True)

    @jax.jit
    def slopes(at):
        def along(y, at):
            d_z = oracle.directions(None, x, y, at, (), batch)[0][2]
            return sum(map(jnp.vdot, jax.tree.leaves(d_z), jax.tree.leaves(z)))

        gradient = jax.grad(problem.lower, 1)
        product = jax.jvp(lambda y: gradient(x, y, batch), (y,), (z,))[1]
        return jax.grad(along, (0, 1))(y, at), product

    (in_y, in_z), product = slopes(jax.tree.map(jnp.zeros_like, z))
    assert _distance(in_z, product) < 1e-9
    expected = jax.tree.map(lambda leaf: -2 * jnp.sum(jnp.sin(x["a"])) * leaf, z)
    np.testing.assert_allclose(in_y["v"], expected["v"], atol=1e-9)


def test_both_sides_see_one_batch():
    """Noise of size 1000 in the lower gradient cancels; of two draws it would stay."""
    problem, x, y, z, batch = _curved()
    noisy = dbo.Problem(
        problem.upper,
        lambda x, y, b: problem.lower(x, y, batch) + b @ y["v"] + b[:3] @ x["a"],
    )
    noise = 1000 * jax.random.normal(jax.random.key(0), (4,))
    oracle = oracles.finite_difference(noisy)
    directions = jax.jit(
        lambda noise: oracle.directions(None, x, y, z, (), dbo.Batch(batch, noise))[0]
    )
    plain, (d_x, d_y, d_z) = directions(0 * noise), directions(noise)
    np.testing.assert_allclose(d_y["v"] - plain[1]["v"], noise, rtol=1e-10)
    np.testing.assert_allclose(d_x["a"], plain[0]["a"], atol=1e-8)
    np.testing.assert_allclose(d_z["v"], plain[2]["v"], atol=1e-8)


def _once_only():
    """g(x, y) = |y - x|^4 / 4; its backward pass runs outside JAX and is counted."""
    passes = []

    @jax.custom_vjp
    def once(v):
        return (v @ v) ** 2 / 4

    def host(v, slope):
        passes.append(1)
        return np.asarray(slope * (v @ v) * v)

    def backward(v, slope):
        like = jax.ShapeDtypeStruct(v.shape, v.dtype)
        return (jax.pure_callback(host, like, v, slope, vmap_method="sequential"),)

    once.defvjp(lambda v: (once(v), v), backward)
    problem = dbo.Problem(lambda x, y, b: y @ y / 2, lambda x, y, b: once(y - x))
    return problem, passes


@pytest.mark.parametrize(
    ("make", "passes"),
    {
        "own gradient": (oracles.finite_difference, 3),
        "reused": (lambda p: oracles.finite_difference(p, reuse=True), 2),
        "in turn": (lambda p: oracles.finite_difference(p, at_once=False), 3),
        "one step": (lambda p: oracles.one_step_difference(p, 0.1), 3),
        "perturbed": (lambda p: oracles.perturbed(p, 0.1), 2),
        "storm": (lambda p: oracles.storm(oracles.perturbed(p, 0.1), 0.5), 4),
    }.values(),
)
def test_the_lower_objective_is_differentiated_once(make, passes):
    problem, counted = _once_only()
    oracle, x, y = make(problem), jnp.zeros(3), jnp.array([1.0, 2.0, 2.0])
    z, memory = oracle.init(x, y)
    z = jnp.array([2.0, 0.0, -1.0]) if z.shape else z
    directions = jax.jit(jax.vmap(oracle.directions, (None, 0, 0, 0, 0, None)))
    rows = dbo.replicate((x, y, z, memory), 2)
    (_, d_y, _), _ = jax.block_until_ready(directions(None, *rows, None))
    assert len(counted) == 2 * passes
    np.testing.assert_allclose(d_y, jnp.stack([9 * y, 9 * y]), rtol=1e-3)


def test_what_nobody_asks_for_is_not_computed():
    problem, counted = _once_only()
    oracle, x, y = oracles.finite_difference(problem), jnp.zeros(3), jnp.ones(3)
    only = jax.jit(lambda z: oracle.directions(None, x, y, z, (), None)[0][1])
    jax.block_until_ready(only(jnp.ones(3)))
    assert len(counted) == 1


def test_soba_cannot_do_without_second_derivatives():
    problem, _ = _once_only()
    x = y = z = jnp.ones(3)
    with pytest.raises(ValueError, match=r"[Pp]ure callbacks do not support"):
        oracles.soba(problem).directions(None, x, y, z, (), None)


def test_calls_count_each_gradient():
    problem = toys.task().problem
    cases = {
        oracles.finite_difference(problem): (3, 1, 3),
        oracles.finite_difference(problem, reuse=True): (3, 0, 3),
        oracles.one_step_difference(problem, 0.1): (4, 1, 0),
        oracles.perturbed(problem, 0.1): (3, 1, 2),
    }
    for oracle, counts in cases.items():
        assert oracle.calls == tuple(dbo.Calls(gradients=n) for n in counts)


def test_one_step_puts_the_step_for_the_inverse_hessian():
    toy, batch, x, y, _ = _quadratic()
    oracle = oracles.one_step_difference(toy.problem, 0.3)
    z, memory = oracle.init(x, y)
    (d_x, d_y, d_z), _ = jax.jit(oracle.directions)(None, x, y, z, memory, batch)
    a, b, c = batch.lower
    np.testing.assert_allclose(
        d_x, 0.1 * x + b.T @ (0.3 * (y - batch.upper)), atol=1e-11
    )
    np.testing.assert_allclose(d_y, a @ y - b @ x - c, atol=1e-12)
    np.testing.assert_array_equal(d_z, jnp.zeros(()))
    at_target = jax.jit(oracle.directions)(None, x, batch.upper, z, memory, batch)[0]
    np.testing.assert_array_equal(at_target[0], 0.1 * x)  # grad_y f = 0


def test_one_step_agrees_with_darts_where_the_lower_level_is_solved():
    """One evaluates f at y, the other at y minus a step along the lower gradient."""

    def lower(x, y, b):
        return jnp.sum(jnp.cosh(y - jnp.sin(x))) + jnp.sum((y - jnp.sin(x)) ** 4)

    problem = dbo.Problem(lambda x, y, b: jnp.sum((y - 1) ** 3), lower)
    x = jnp.array([0.3, -1.0, 0.8])

    @jax.jit
    def both(y):
        oracle = oracles.one_step_difference(problem, 0.2, radius=0.05)
        own = oracle.directions(None, x, y, jnp.zeros(()), (), None)[0][0]
        darts = dbo.hypergradients.darts(problem, 0.2, epsilon=0.05)
        return own, darts.estimate(jax.random.key(0), x, y, (), None)[0]

    np.testing.assert_allclose(*both(jnp.sin(x)), rtol=1e-10)
    own, darts = both(jnp.sin(x) + 0.3)
    assert np.abs(own - darts).max() > 0.01


def test_perturbed_is_the_penalty_with_both_lower_variables_exchanged():
    problem, x, y, z, batch = _curved()
    oracle, other = oracles.perturbed(problem, 0.2), oracles.penalty(problem, 5.0)
    start, memory = oracle.init(x, y)
    jax.tree.map(np.testing.assert_array_equal, start, y)
    d_x, d_y, d_z = jax.jit(oracle.directions)(None, x, y, z, memory, batch)[0]
    swapped = jax.jit(other.directions)(None, x, z, y, (), batch)[0]
    wanted, swapped_z, swapped_y = swapped
    for a, b in ((d_x, wanted), (d_y, swapped_y), (d_z, swapped_z)):
        assert _distance(a, b) < 1e-12


def test_the_bias_of_perturbed_is_proportional_to_delta():
    toy, batch, x, _, _ = _quadratic()
    a, b, c = batch.lower
    deltas, errors = [0.04, 0.02, 0.01, 0.005], []
    directions = jax.jit(
        lambda delta, y, z: oracles.perturbed(toy.problem, delta).directions(
            None, x, y, z, (), batch
        )[0]
    )
    for delta in deltas:
        y = toy.exact.solution(x)
        tilted = jnp.linalg.solve(
            a + delta * jnp.eye(5), b @ x + c + delta * batch.upper
        )
        d_x, d_y, d_z = directions(delta, y, tilted)
        np.testing.assert_allclose(d_y, 0, atol=1e-12)
        np.testing.assert_allclose(d_z, 0, atol=1e-12)
        errors.append(_distance(d_x, toy.exact.hypergradient(x)))
    assert _slope(deltas, errors) == pytest.approx(1, abs=0.1)


ORACLES = {
    "finite difference": (lambda p: oracles.finite_difference(p, 0.1), 1e-7),
    "perturbed": (lambda p: oracles.perturbed(p, 1e-3), 1e-3),
}


@pytest.mark.parametrize(("make", "bound"), ORACLES.values(), ids=ORACLES)
def test_with_a_server_they_reach_the_solution(make, bound):
    task = toys.task()
    channel = dbo.channels.ef21(
        dbo.mixing.averaging(task.n), dbo.compressors.top_k(0.6)
    )

    def moves(step):
        return dbo.strategies.allreduce(channel, step)

    method = dbo.algorithms.compose(
        task.problem,
        make(task.problem),
        dbo.algorithms.Phase(
            x=moves(optax.sgd(0.1)), y=moves(optax.sgd(0.2)), z=moves(optax.sgd(0.2))
        ),
    )
    _, norms = toys.hypergradient_norms(method, task, 1500)
    assert norms[0] > 1
    assert norms[-1] < bound


@pytest.mark.parametrize("once", [True, False])
def test_memory_is_that_of_gradients(once):
    """Activations of a wide batch; weights of the network are 1% of them."""
    widths, batch = (32, 64, 64, 64), jnp.ones((4096, 32), jnp.float32)

    def features(y):
        held = batch
        for kernel in y:
            held = jnp.tanh(held @ kernel)
        return held

    problem = dbo.Problem(
        lambda x, y, b: jnp.mean(features(y) ** 2),
        lambda x, y, b: jnp.mean(features(y) * x),
    )
    y = [jnp.ones(shape, jnp.float32) for shape in itertools.pairwise(widths)]
    x = jnp.ones((), jnp.float32)

    def temporary(function, *args):
        compiled = jax.jit(function).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    oracle = oracles.finite_difference(problem, at_once=once)
    plain = temporary(jax.grad(problem.lower, (0, 1)), x, y, None)
    used = temporary(oracle.directions, None, x, y, y, (), None)
    assert used <= (2.2 if once else 1.2) * plain


def test_long_products_are_asked_for():
    problem = dbo.Problem(
        lambda x, y, b: jnp.sum(y), lambda x, y, b: jnp.sum(jnp.tanh(x @ y))
    )
    x, y = jnp.ones((3, 2)), jnp.ones((2, 4))
    oracle = oracles.finite_difference(problem, reuse=True)
    text = str(jax.make_jaxpr(oracle.directions)(None, x, y, y, (), None))
    assert text.count("Precision.HIGHEST") >= text.count("dot_general[") > 0


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda p, v: oracles.finite_difference(p, v), "radius"),
        (lambda p, v: oracles.one_step_difference(p, 0.1, v), "radius"),
        (lambda p, v: oracles.one_step_difference(p, v), "step_size"),
        (lambda p, v: oracles.perturbed(p, v), "delta"),
    ],
)
def test_bad_settings(make, setting):
    problem = toys.task().problem
    for value in (0, -1.0, float("nan"), float("inf"), "0.1", None):
        with pytest.raises(ValueError, match=f"{setting} > 0 and finite, got"):
            make(problem, value)
    with pytest.raises(TypeError, match="`problem` must be a Problem"):
        make(problem.lower, 0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, int])
def test_short_floats_are_refused(dtype):
    problem, good = toys.task().problem, jnp.zeros(3)
    bad = good.astype(dtype)
    for make in (
        oracles.finite_difference,
        lambda p: oracles.one_step_difference(p, 0.1),
        lambda p: oracles.perturbed(p, 0.1),
    ):
        for x, y in ((bad, good), (good, {"a": good, "b": bad})):
            with pytest.raises(ValueError, match=r"must be float32 or float64; got"):
                make(problem).directions(None, x, y, y, (), None)
            with pytest.raises(ValueError, match=r"must be float32 or float64; got"):
                make(problem).init(x, y)


def test_radius_of_float32_keeps_four_digits():
    problem, *point = _curved()
    soba = jax.jit(oracles.soba(problem).directions)
    exact = soba(None, *point[:3], (), point[3])[0]
    x, y, z, batch = jax.tree.map(lambda a: jnp.array(np.float32(a)), point)
    oracle = oracles.finite_difference(problem)
    found = jax.jit(oracle.directions)(None, x, y, z, (), batch)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    for a, b in zip(found, exact, strict=True):
        assert _distance(a, b) < 5e-4 * _distance(b, jax.tree.map(np.zeros_like, b))
