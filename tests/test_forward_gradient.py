"""Forward gradients against reverse mode, closed forms and their own laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_directions import within

import dbojax as dbo
from dbojax.hypergradients import (
    Inner,
    descent,
    directions,
    forward_gradient,
    forward_scalars,
    online_forward_gradient,
    reverse,
    spread,
    truncated,
    two_phase,
    zeroth_order,
)

T = 3
SCALAR = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2, lambda x, y, b: (y - x) ** 2 / 2)
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1, eps_root=1e-8),
}


def lower(x, y, batch):
    """A quadratic in y alone, in several leaves."""
    bent = jnp.vdot(x["w"] * y["a"], y["a"]) / 2 - x["s"] * jnp.vdot(batch, y["a"])
    return bent + y["c"] ** 2 * (1 + x["s"]) / 2 - y["c"] * y["a"][0]


def upper(x, y, batch):
    return jnp.vdot(y["a"], y["a"]) / 2 - y["c"] * batch[0] + x["s"] ** 2 / 10


PROBLEM = dbo.Problem(upper, lower)
X = {"s": jnp.array(0.3), "w": jnp.array([0.5, 1.0, 2.0])}
Y = {"a": jnp.array([0.2, -0.7, 1.1]), "c": jnp.array(0.4)}
SIZE = 4


@pytest.fixture
def batch():
    return dbo.Batch(upper=jnp.array([1.0, -2.0, 0.5]), lower=jnp.array([0.3, 2.0, -1]))


def estimate(hyper, key, x=X, y=Y, state=None, batch=None):
    state = hyper.init(x, y) if state is None else state
    return jax.jit(hyper.estimate)(key, x, y, state, batch)


def close(a, b, rtol=1e-9, atol=1e-11):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), a, b)


def by_hand(optimizer, steps, batch, y=Y):
    """h and y_T as a Python loop."""

    def h(x):
        at, memory = y, optimizer.init(y)
        for t in range(steps):
            samples = batch.inner if isinstance(batch, dbo.Rounds) else None
            sample = samples.lower[t] if samples else batch.lower
            gradient = jax.grad(lower, 1)(x, at, sample)
            updates, memory = optimizer.update(gradient, memory, at)
            at = optax.apply_updates(at, updates)
        upper = batch.outer if isinstance(batch, dbo.Rounds) else batch
        return PROBLEM.upper(x, at, upper.upper)

    return h


def test_one_entry_of_x_leaves_nothing_to_chance(key):
    inner = descent(SCALAR, optax.sgd(0.5), 3)
    hyper = forward_gradient(SCALAR, inner, 2, chunk=1)
    x, y = jnp.array(2.0), jnp.array(0.0)
    g, y, _, info = estimate(hyper, key, x, y)
    assert (float(g), float(y), float(info.value)) == (0.65625, 1.75, 0.28125)
    assert float(info.variance) == 0
    assert bool(info.ok)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slopes_are_those_of_the_gradient(name, key, batch):
    inner = descent(PROBLEM, OPTIMIZERS[name], T)
    halves = forward_scalars(PROBLEM, inner, 4, chunk=2)
    w, y, value = jax.jit(halves.coefficients)(key, X, Y, batch)
    h = by_hand(OPTIMIZERS[name], T, batch)
    wanted, gradient = jax.jit(jax.value_and_grad(h))(X)
    own = directions.direction_key(key)
    v = directions.rademacher.draw(own, SIZE, 4, jnp.float64)(jnp.arange(4))
    close(w, v @ dbo.trees.ravel(gradient))
    close(value, wanted)
    combined = jax.jit(halves.combine)(key, X, w)
    close(dbo.trees.ravel(combined), w @ v / 4)
    hyper = forward_gradient(PROBLEM, inner, 4, chunk=2)
    found, y_found, _, info = estimate(hyper, key, batch=batch)
    close(found, combined)
    close(y_found, y)
    close(info.value, wanted)


def test_every_step_may_have_its_own_samples(key, batch):
    scale = 1 + jnp.arange(float(T)) / T
    own = jax.tree.map(lambda a: a[None] * scale[:, None], batch)
    rounds = dbo.Rounds(outer=batch, inner=own)
    inner = descent(PROBLEM, optax.sgd(0.2), T)
    hyper = forward_gradient(PROBLEM, inner, SIZE, SIZE, directions.orthogonal)
    found, _, _, _ = estimate(hyper, key, batch=rounds)
    close(found, jax.jit(jax.grad(by_hand(optax.sgd(0.2), T, rounds)))(X))


def test_a_momentum_without_tangent_is_seen(key, batch):
    inner = descent(PROBLEM, optax.sgd(0.05, momentum=0.9), 30)

    def forgetful(key, state, x, t, batch):
        still = jax.lax.stop_gradient(state.optimizer)
        return inner.step(key, state._replace(optimizer=still), x, t, batch)

    exact, wrong = (
        estimate(
            forward_gradient(PROBLEM, one, SIZE, SIZE, directions.orthogonal),
            key,
            batch=batch,
        )[0]
        for one in (inner, inner._replace(step=forgetful))
    )
    close(exact, estimate(reverse(PROBLEM, inner), key, batch=batch)[0])
    ratio = float(dbo.trees.norm(wrong) / dbo.trees.norm(exact))
    assert abs(ratio - 1) > 0.2


def test_lemma_of_the_paper_for_an_unrolled_solver(key, batch):
    inner = descent(PROBLEM, optax.sgd(0.2), 3)
    exact = dbo.trees.ravel(estimate(reverse(PROBLEM, inner), key, batch=batch)[0])
    hyper = forward_gradient(PROBLEM, inner, 2, chunk=2)

    def error(key):
        found, _, _, info = hyper.estimate(key, X, Y, (), batch)
        return jnp.sum((dbo.trees.ravel(found) - exact) ** 2), info.variance

    errors, told = jax.jit(jax.vmap(error))(jax.random.split(key, 2000))
    wanted = (SIZE - 1) / 2 * float(exact @ exact)
    assert within(errors, wanted)
    assert within(told, wanted)


def test_memory_does_not_grow_with_depth(key, batch):
    def temporary(make, steps):
        hyper = make(descent(PROBLEM, optax.sgd(0.1, momentum=0.9), steps))
        lowered = jax.jit(hyper.estimate).lower(key, X, Y, hyper.init(X, Y), batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    flat = {
        temporary(lambda i: forward_gradient(PROBLEM, i, 4, chunk=2), steps)
        for steps in (16, 64, 256)
    }
    assert len(flat) == 1
    assert temporary(lambda i: reverse(PROBLEM, i), 256) > 4 * flat.pop()


def test_chunks_do_not_matter(key, batch):
    inner = descent(PROBLEM, OPTIMIZERS["momentum"], T)
    results = [
        estimate(forward_gradient(PROBLEM, inner, 8, chunk), key, batch=batch)
        for chunk in (1, 4, 8)
    ]
    for hypergrad, y, _, info in results[1:]:
        close((hypergrad, y, info.variance), (*results[0][:2], results[0][3].variance))


def mesh(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("d",), auto, devices=jax.devices()[:devices])


@pytest.mark.parametrize("scalars", [True, False])
def test_devices_do_not_matter_and_exchange_little(scalars, key, batch):
    inner = descent(PROBLEM, OPTIMIZERS["momentum"], T)
    guide = truncated(PROBLEM, inner, 1)
    one, many = (
        forward_gradient(PROBLEM, inner, 16, 2, guide=guide, over=over)
        for over in (None, spread(mesh(8), "d", scalars))
    )
    hypergrad, y, _, info = estimate(one, key, batch=batch)
    program = jax.jit(many.estimate).lower(key, X, Y, (), batch).compile()
    other, y_other, _, info_other = program(key, X, Y, (), batch)
    close((other, y_other), (hypergrad, y), rtol=1e-12)
    close((info_other.variance, info_other.value), (info.variance, info.value))
    collectives = [
        line
        for line in program.as_text().splitlines()
        if any(f" {word}(" in line for word in ("all-gather", "all-reduce"))
    ]
    assert sum("all-reduce(" in line for line in collectives) == (0 if scalars else 1)
    assert any("f64[16]" in line for line in collectives)


def test_shared_directions_send_a_mean_of_scalars(key, batch):
    inner = descent(PROBLEM, optax.sgd(0.2), 3)
    halves = forward_scalars(PROBLEM, inner, 4, chunk=4)
    batches = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), batch)

    @jax.jit
    def both(key):
        w = jax.vmap(halves.coefficients, (None, None, None, 0))(key, X, Y, batches)[0]
        each = jax.vmap(halves.combine, (None, None, 0))(key, X, w)
        return halves.combine(key, X, w.mean(axis=0)), dbo.node_mean(each)

    close(*both(key))


def fixed_guide(u):
    """An estimator that always says the same, and counts."""

    def tell(key, x, y, state, batch):
        return (
            u,
            y,
            state + 1,
            dbo.base.Info(
                jnp.zeros(()),
                jnp.array(True),
                dbo.hypergradients.common.cost(dbo.base.Calls(gradients=3)),
            ),
        )

    return dbo.Hypergradient(lambda x, y: jnp.zeros((), jnp.int32), tell)


@pytest.mark.parametrize("cosine", [0.48, 1.0])
def test_a_guide_takes_its_part_out_of_the_error(cosine, key):
    n, b = 40, 5
    g = jnp.zeros(n).at[0].set(3.0)
    u = 7 * (jnp.zeros(n).at[0].set(cosine).at[1].set((1 - cosine**2) ** 0.5))
    problem = dbo.Problem(lambda x, y, batch: y, None)
    hyper = forward_gradient(
        problem, lambda key, x, y, batch: g @ jnp.sin(x), b, b, guide=fixed_guide(u)
    )
    x, y = jnp.zeros(n), jnp.zeros(())

    def one(key):
        found, _, state, info = hyper.estimate(key, x, y, hyper.init(x, y), None)
        return found, info.variance, state, info

    found, told, state, info = jax.jit(jax.vmap(one))(jax.random.split(key, 3000))
    wanted = (n - 1) / b * (1 - cosine**2) * 9
    assert within(found, g)
    assert within(jnp.sum((found - g[None]) ** 2, axis=1), wanted)
    assert within(told, wanted)
    assert int(state[0]) == 1
    assert (int(info.cost.gradients[0]), int(info.cost.tangents[0])) == (3, b + 1)
    np.testing.assert_array_equal(info.value, jnp.zeros(3000))


def test_a_guide_of_zero_changes_nothing(key, batch):
    inner = descent(PROBLEM, optax.sgd(0.2), T)
    zero = fixed_guide(jax.tree.map(jnp.zeros_like, X))
    exact = estimate(reverse(PROBLEM, inner), key, batch=batch)[0]
    guided = estimate(
        forward_gradient(PROBLEM, inner, 4, 2, guide=zero), key, batch=batch
    )[0]
    own = directions.direction_key(key, guides=1)
    v = directions.rademacher.draw(own, SIZE, 4, jnp.float64)(jnp.arange(4))
    close(dbo.trees.ravel(guided), (v @ dbo.trees.ravel(exact)) @ v / 4)


def test_a_guide_sees_the_same_inner_randomness(key):
    n = 40
    problem = dbo.Problem(lambda x, y, batch: y @ jnp.sin(x), None)

    def random_solver(key, x, y, batch):
        return jax.random.normal(key, (n,))

    guide = dbo.hypergradients.forward(problem, random_solver, chunk=n)
    hyper = forward_gradient(problem, random_solver, 1, 1, guide=guide)
    found, *_ = estimate(hyper, key, jnp.ones(n), jnp.zeros(n))
    exact, *_ = estimate(guide, key, jnp.ones(n), jnp.zeros(n))
    close(found, exact)


def test_guides_of_guides_draw_directions_of_their_own(key):
    n = 6
    g = jnp.arange(1.0, n + 1)
    problem = dbo.Problem(lambda x, y, batch: g @ x, None)
    hyper = None
    for _ in range(3):
        hyper = forward_gradient(problem, lambda key, x, y, b: y, 1, 1, guide=hyper)
    x = jnp.zeros(n)

    def one(key):
        return hyper.estimate(key, x, x, hyper.init(x, x), None)[0]

    found = jax.jit(jax.vmap(one))(jax.random.split(key, 4000))
    assert within(found, g)


def until_still(key, x, y, batch):
    """Descent on |y - tanh x|^2 / 2 until it does not move."""

    def more(pair):
        y, before = pair
        return jnp.max(jnp.abs(y - before)) > 1e-13

    def step(pair):
        return pair[0] - 0.5 * (pair[0] - jnp.tanh(x)), pair[0]

    return jax.lax.while_loop(more, step, (y, y + 1))[0]


def test_a_loop_of_unknown_length_is_passed(key):
    problem = dbo.Problem(lambda x, y, b: jnp.sum(jnp.cos(y)), None)
    x, y = jnp.linspace(-1.0, 1.0, 4), jnp.ones(4)
    hyper = forward_gradient(problem, until_still, 4, 2, directions.orthogonal)
    found, end, _, info = estimate(hyper, key, x, y)
    close(found, -np.sin(np.tanh(x)) / np.cosh(x) ** 2)
    close(end, np.tanh(x))
    assert (int(info.cost.solves), int(info.cost.tangents)) == (2, 4)
    with pytest.raises(ValueError, match="while_loop"):
        jax.grad(lambda x: jnp.sum(until_still(key, x, y, None)))(x)


def test_passing_y_on_truncates(key, batch):
    law = directions.orthogonal
    inner = descent(PROBLEM, optax.sgd(0.2), 3)
    hyper = forward_gradient(PROBLEM, inner, SIZE, SIZE, law)
    _, y, state, _ = estimate(hyper, key, batch=batch)
    found, end, _, _ = estimate(hyper, key, y=y, state=state, batch=batch)
    twice = descent(PROBLEM, optax.sgd(0.2), 6)
    wanted, y_wanted, _, _ = estimate(truncated(PROBLEM, twice, 3), key, batch=batch)
    close((found, end), (wanted, y_wanted))
    exact = estimate(reverse(PROBLEM, twice), key, batch=batch)[0]
    assert float(jnp.abs(exact["s"] - found["s"])) > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_online_estimates_go_through_the_whole_episode(name, key, batch):
    optimizer = OPTIMIZERS[name]
    inner = descent(PROBLEM, optimizer, 2, start=lambda key, x, y: Y)
    hyper = online_forward_gradient(
        PROBLEM, inner, 3, SIZE, SIZE, directions.orthogonal
    )

    @jax.jit
    def episodes(key):
        def step(carry, key):
            hypergrad, y, state, info = hyper.estimate(key, X, *carry, batch)
            return (y, state), (hypergrad, y, info)

        keys = jax.random.split(key, 4)
        return jax.lax.scan(step, (Y, hyper.init(X, Y)), keys)[1]

    hypergrads, ys, info = episodes(key)
    third = jax.tree.map(lambda a: a[2], (hypergrads, ys))
    whole = reverse(PROBLEM, descent(PROBLEM, optimizer, 6))
    wanted, y, _, wanted_info = estimate(whole, key, batch=batch)
    close(third, (wanted, y), rtol=1e-8)
    close(info.value[2], wanted_info.value)
    # The fourth starts anew.
    close(*(jax.tree.map(lambda a, t=t: a[t], (hypergrads, ys)) for t in (0, 3)))
    assert bool(info.ok.all())


def test_online_directions_stay_for_an_episode(key):
    problem = dbo.Problem(lambda x, y, b: jnp.sum(x * b) + jnp.sum(y), None)
    inner = Inner(
        lambda key, x, y: (y, jnp.zeros((), jnp.int32)),
        lambda key, state, x, t, batch: (
            state[0] * 0.5,
            state[1] + t.astype(jnp.int32),
        ),
        lambda state: state[0],
        2,
    )
    hyper = online_forward_gradient(problem, inner, 2, 4, chunk=2)
    x, g = jnp.zeros(5), jnp.arange(1.0, 6.0)

    @jax.jit
    def run(key):
        def step(carry, key):
            found, y, state, _ = hyper.estimate(key, x, *carry, g)
            return (y, state), (found, state.inner[1])

        start = jnp.ones(3), hyper.init(x, jnp.ones(3))
        return jax.lax.scan(step, start, jax.random.split(key, 4))[1]

    found, steps = run(key)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2], found[3])
    assert float(jnp.abs(found[0] - found[2]).max()) > 0
    # The solver's own count goes on too: 0 + 1, then 2 + 3, and again.
    np.testing.assert_array_equal(steps, [1, 6, 1, 6])
    many = jax.jit(jax.vmap(run))(jax.random.split(key, 1500))[0][:, 1]
    assert within(many, g)


def test_two_phases_take_turns(key, batch):
    inner = descent(PROBLEM, optax.sgd(0.2), T)
    first = fixed_guide(jax.tree.map(jnp.ones_like, X))
    second = online_forward_gradient(PROBLEM, inner, 3, 4, chunk=4)
    hyper = two_phase(first, 2, second)
    keys = jax.random.split(key, 4)

    @jax.jit
    def run(keys):
        def step(state, key):
            found, _, state, info = hyper.estimate(key, X, Y, state, batch)
            return state, (found, info)

        return jax.lax.scan(step, hyper.init(X, Y), keys)

    # Under vmap both run and one is chosen.
    drop = jax.jit(jax.vmap(run))(keys[None])
    state, (found, info) = jax.tree.map(lambda a: a[0], drop)
    assert int(state.done) == int(state.first) == 2
    assert int(state.second.age) == 2
    np.testing.assert_array_equal(np.isinf(info.variance), [True, True, False, False])
    assert info.residual is None
    late = estimate(second, keys[2], batch=batch)
    close(jax.tree.map(lambda a: a[1], found), jax.tree.map(jnp.ones_like, X))
    close(jax.tree.map(lambda a: a[2], found), late[0])
    close(info.value[1:3], jnp.stack([0 * late[3].value, late[3].value]))
    np.testing.assert_array_equal(info.cost.tangents, [0, 0, 4 * T, 4 * T])
    assert hyper.calls.tangents == second.calls.tangents


def random_start(key, x, y):
    return jax.tree.map(lambda a: a + jax.random.normal(key, a.shape), y)


def test_all_estimators_see_the_same_inner_randomness(key, batch):
    inner = descent(PROBLEM, optax.sgd(0.2), 2, start=random_start)
    makers = [
        lambda: reverse(PROBLEM, inner),
        lambda: forward_gradient(PROBLEM, inner, 2, 2),
        lambda: zeroth_order(PROBLEM, inner, 2, chunk=2),
        lambda: online_forward_gradient(PROBLEM, inner, 2, 2, 2),
    ]
    ends = [estimate(make(), key, batch=batch)[1] for make in makers]
    for a, b in itertools.pairwise(ends):
        close(a, b, rtol=1e-13)


MAKERS = {
    "guided": lambda p, i: forward_gradient(p, i, 4, 2, guide=truncated(p, i, 1)),
    "online": lambda p, i: online_forward_gradient(p, i, 3, 4, 2),
    "zeroth_order": lambda p, i: zeroth_order(p, i, 4, chunk=2),
    "pes": lambda p, i: dbo.hypergradients.pes(p, i, 3, 4, chunk=2),
}
each_maker = pytest.mark.parametrize("name", MAKERS)


@each_maker
def test_a_diverging_solver_is_flagged_and_finite(name, key):
    hyper = MAKERS[name](SCALAR, descent(SCALAR, optax.sgd(1e200), 4))
    x, y = jnp.array(2.0), jnp.array(0.5)
    hypergrad, end, state, info = estimate(hyper, key, x, y)
    assert not bool(info.ok)
    assert np.isfinite(hypergrad)
    assert float(end) == 0.5
    assert not np.isnan(info.variance)
    if hasattr(state, "age"):
        assert int(state.age) == 0


@each_maker
def test_a_zero_gradient_is_fine(name, key):
    flat = dbo.Problem(lambda x, y, b: 0 * jnp.sum(y), SCALAR.lower)
    hyper = MAKERS[name](flat, descent(SCALAR, optax.sgd(0.5), 2))
    hypergrad, _, _, info = estimate(hyper, key, jnp.array(2.0), jnp.array(0.0))
    assert float(hypergrad) == 0
    assert float(info.variance) == 0
    assert bool(info.ok)


@each_maker
def test_bad_variables_are_refused(name, key):
    hyper = MAKERS[name](SCALAR, descent(SCALAR, optax.sgd(0.5), 2))
    whole = jnp.arange(3)
    with pytest.raises(ValueError, match="real floating-point arrays"):
        hyper.estimate(key, whole, jnp.zeros(3), (), None)
    vector = MAKERS[name](
        dbo.Problem(lambda x, y, b: y, SCALAR.lower),
        descent(SCALAR, optax.sgd(0.5), 2),
    )
    x = jnp.zeros(3)
    with pytest.raises(ValueError, match="must return a scalar"):
        vector.estimate(key, x, x, vector.init(x, x), None)


def test_short_floats_come_back_as_they_went_in(key):
    x, y = jnp.ones(9, jnp.bfloat16), jnp.zeros(9, jnp.bfloat16)
    problem = dbo.Problem(
        lambda x, y, b: jnp.mean((y - 1) ** 2), lambda x, y, b: jnp.sum((y - x) ** 2)
    )
    hyper = forward_gradient(problem, descent(problem, optax.sgd(0.125), 2), 4, 2)
    hypergrad, end, _, info = estimate(hyper, key, x, y)
    assert (hypergrad.dtype, end.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert info.variance.dtype == jnp.float32


INNER = descent(SCALAR, optax.sgd(0.5), 2)
EXACT = reverse(SCALAR, INNER)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: forward_gradient(SCALAR, INNER, 6, 4), r"chunk \* devices = 4 \* 1"),
        (
            lambda: forward_gradient(SCALAR, INNER, 8, 2, over=spread(mesh(8), "d")),
            "Write directions=16",
        ),
        (lambda: forward_gradient(SCALAR, INNER, 0), "directions >= 1, got 0"),
        (lambda: forward_gradient(SCALAR, INNER, 4, 0.5), "chunk >= 1, got 0.5"),
        (lambda: forward_scalars(SCALAR, INNER, 6, 4), "multiple of chunk"),
        (lambda: spread(mesh(2), "nodes"), "one of the mesh's axes"),
        (lambda: online_forward_gradient(SCALAR, INNER, 0), "episode >= 1, got 0"),
        (lambda: online_forward_gradient(SCALAR, INNER, 2, 6, 4), "a multiple of"),
        (
            lambda: two_phase(EXACT, 0, EXACT),
            "steps >= 1",
        ),
    ],
)
def test_messages(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: forward_gradient(SCALAR, INNER, law=1), "`law` must be a Law"),
        (lambda: forward_gradient(SCALAR, INNER, guide=1), "must be a Hypergradient"),
        (lambda: forward_gradient(SCALAR, INNER, over=mesh(2)), "`over` must be"),
        (lambda: forward_gradient(1, INNER), "must be a Problem"),
        (lambda: online_forward_gradient(SCALAR, abs, 2), "must be a Inner"),
        (lambda: two_phase(1, 2, EXACT), "must be a Hypergradient"),
    ],
)
def test_messages_about_kinds(make, match):
    with pytest.raises(TypeError, match=match):
        make()
