"""What every estimator owes its caller: clear refusals, and a state of its own."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbojax as dbo

h = dbo.hypergradients
PROBLEM = dbo.Problem(
    lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x),
    lambda x, y, batch: jnp.sum((y - jnp.sum(x)) ** 2),
)
X, Y = jnp.ones(4), jnp.zeros(2)


def descent(problem=PROBLEM, **settings):
    return h.descent(problem, optax.sgd(0.1), 3, **settings)


UNROLLED = {
    "reverse": h.reverse,
    "checkpointed": h.checkpointed,
    "nested": h.nested,
    "truncated": lambda p, i: h.truncated(p, i, 2),
    "forward": h.forward,
    "forward_gradient": lambda p, i: h.forward_gradient(p, i, 4, 2),
    "online": lambda p, i: h.online_forward_gradient(p, i, 3, 4, 2),
    "pes": lambda p, i: h.pes(p, i, 3, 4, chunk=2),
    "zeroth_order": lambda p, i: h.zeroth_order(p, i, 4, chunk=2),
    "es": lambda p, i: h.es(p, i, 4, chunk=2),
    "cg": lambda p, i: h.cg(p, 3, inner=i, warm_start=True),
    "soba": lambda p, i: h.soba(p, 0.1, inner=i),
}
ALL = UNROLLED | {
    "darts": lambda p, i: h.darts(p, 0.1),
    "penalty": lambda p, i: h.penalty(p, 10.0, optax.adam(0.1), 3),
    "two_phase": lambda p, i: h.two_phase(
        h.truncated(p, i, 1), 2, h.online_forward_gradient(p, i, 3, 4, 2)
    ),
}
each_unrolled = pytest.mark.parametrize("name", UNROLLED)
each = pytest.mark.parametrize("name", ALL)


def trace(hyper, x=X, y=Y, state=None, batch=None):
    state = hyper.init(x, y) if state is None else state
    return jax.eval_shape(hyper.estimate, jax.random.key(0), x, y, state, batch)


@each_unrolled
def test_a_start_that_is_not_like_y_is_refused(name):
    starts = {
        "structure": lambda key, x, y: {"a": y},
        "shapes": lambda key, x, y: jnp.zeros(1),
        "dtypes": lambda key, x, y: jnp.zeros(2, int),
    }
    problem = dbo.Problem(
        PROBLEM.upper, lambda x, y, b: sum(jnp.sum(a**2) for a in jax.tree.leaves(y))
    )
    for what, start in starts.items():
        hyper = UNROLLED[name](problem, descent(problem, start=start))
        with pytest.raises(ValueError, match=f"starts from` must have the {what}"):
            trace(hyper)


def test_a_solver_whose_result_is_not_like_y_is_refused():
    for make in (h.forward, h.forward_gradient, h.zeroth_order, h.es, h.hessian_free):
        parts = {"inner": lambda key, x, y, batch: jnp.zeros(1)}
        with pytest.raises(ValueError, match="solver's result` must have the shapes"):
            trace(make(PROBLEM, **parts))


@each
def test_objectives_that_cannot_be_derived_are_refused(name):
    vector = PROBLEM._replace(lower=lambda x, y, b: (y - 1) ** 2)
    with pytest.raises(ValueError, match=r"`problem.lower.*must return a scalar"):
        trace(ALL[name](vector, descent(vector)))
    counting = PROBLEM._replace(upper=lambda x, y, b: jnp.sum(y > 0))
    with pytest.raises(ValueError, match=r"floating-point number; got int64"):
        trace(ALL[name](counting, descent(counting)))


@each
def test_empty_variables_are_refused(name):
    free = dbo.Problem(lambda x, y, b: 0.0, lambda x, y, b: 0.0)
    hyper = ALL[name](free, descent(free))
    for x, y, which in ((jnp.zeros(0), Y, "x"), (X, {}, "y")):
        state = hyper.init(x, y)
        with pytest.raises(ValueError, match=f"`{which}` must hold at least one"):
            hyper.estimate(jax.random.key(0), x, y, state, None)


@pytest.mark.parametrize(
    "name", ["online", "pes", "cg", "soba", "penalty", "two_phase"]
)
def test_a_state_of_another_estimator_is_refused(name):
    hyper = ALL[name](PROBLEM, descent())
    other = ALL["pes" if name == "online" else "online"](PROBLEM, descent())
    for state in ((), other.init(X, Y)):
        with pytest.raises(ValueError, match="`state` must have the structure"):
            trace(hyper, state=state)
    with pytest.raises(ValueError, match="`state` must have the shapes"):
        trace(hyper, state=hyper.init(X, jnp.zeros(3)))


@each
def test_a_state_may_be_donated(name):
    hyper = ALL[name](PROBLEM, descent())
    arrays = jax.tree.leaves((X, Y, hyper.init(X, Y)))
    places = {array.unsafe_buffer_pointer() for array in arrays}
    assert len(places) == len(arrays)


def test_a_guide_that_is_not_like_x_is_refused():
    guide = h.reverse(PROBLEM, descent())

    def column(*args):
        found, *rest = guide.estimate(*args)
        return found[:, None], *rest

    odd = guide._replace(estimate=column)
    with pytest.raises(ValueError, match="guide's hypergradient` must have the shapes"):
        trace(h.forward_gradient(PROBLEM, descent(), guide=odd))


def test_rounds_without_an_axis_are_refused():
    batch = dbo.Rounds(None, jnp.zeros(()))
    with pytest.raises(ValueError, match="samples for each of 3 inner steps"):
        trace(h.reverse(PROBLEM, descent()), batch=batch)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: h.forward(PROBLEM, i),
        lambda i: h.forward_gradient(PROBLEM, i),
        lambda i: h.forward_scalars(PROBLEM, i),
        lambda i: h.zeroth_order(PROBLEM, i),
        lambda i: h.es(PROBLEM, i),
        lambda i: h.cg(PROBLEM, inner=i),
        lambda i: h.soba(PROBLEM, 0.1, inner=i),
    ],
)
def test_what_is_no_inner_solver_is_refused(make):
    with pytest.raises(TypeError, match="`inner` must be an Inner"):
        make(optax.sgd(0.1))


@pytest.mark.parametrize("value", [None, "1", np.float32(-1), np.nan, optax.sgd(0.1)])
def test_settings_that_are_no_positive_numbers_are_refused(value):
    for make in (h.darts, h.soba):
        with pytest.raises(ValueError, match="step_size > 0 and finite, got"):
            make(PROBLEM, value)
    with pytest.raises(ValueError, match="step > 0 and finite, got"):
        h.zeroth_order(PROBLEM, descent(), step=value)


def test_problems_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="`problem` must be a Problem"):
        h.forward(descent(), PROBLEM)


def test_each_chunk_of_exact_forward_mode_runs_the_solver():
    for chunk, runs in ((1, 4), (3, 2), (4, 1), (9, 1)):
        hyper = h.forward(PROBLEM, descent(), chunk)
        cost = jax.jit(hyper.estimate)(jax.random.key(0), X, Y, (), None)[-1].cost
        assert [int(n) for n in cost] == [3 * runs, 0, 3 * 4, runs]


def test_sums_of_short_perturbations_keep_their_digits(key):
    hyper = h.pes(PROBLEM, descent(), 3, 4, chunk=2)
    state = hyper.init(X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16))
    assert state.perturbations.dtype == jnp.float32


@pytest.mark.parametrize("name", ["cg", "normal_cg", "gmres", "bicgstab", "neumann"])
def test_settings_stand_in_the_order_of_the_linear_solver(name):
    settings = list(inspect.signature(getattr(h.linear, name)).parameters)
    taken = list(inspect.signature(getattr(h, name)).parameters)
    assert taken[1 : len(settings) + 1] == settings


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_as_many_coefficients_as_directions(shape, key):
    halves = h.forward_scalars(PROBLEM, descent(), 4, 2)
    with pytest.raises(ValueError, match="for each of 4 directions; got shape"):
        halves.combine(key, X, jnp.ones(shape))
