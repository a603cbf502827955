"""Where MDBO and MA-DSBO stop on the heterogeneous quadratics, and why.

float64, ring of ten, full batches; the gradient at the start is 2.42.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import dbojax as dbo

# Thousands of small products: here the compiler's work pays.
FAST = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@functools.cache
def _toy(equal):
    toy = dbo.tasks.quadratic()
    return dbo.tasks.with_equal_curvature(toy) if equal else toy


def _smoothness(toy):
    """The largest curvature of any node."""
    return float(np.linalg.eigvalsh(np.asarray(toy.batch.lower.a)).max())


def _wire(gamma=1.0):
    w = dbo.topology.metropolis(dbo.topology.ring(10))
    return dbo.channels.exact(dbo.mixing.mixer(w), gamma)


def _path(method, toy, batch, state, steps):
    """The state after some steps and the true norm after each."""

    def step(state, key):
        state, _ = method.step(key, state, batch)
        return state, jnp.linalg.norm(toy.exact.hypergradient(dbo.node_mean(state.x)))

    return jax.lax.scan(step, state, jax.random.split(jax.random.key(0), steps))


@functools.cache
def _mdbo(terms, steps):
    toy = _toy(equal=False)  # on equal curvature the hypergradient is the same

    def run(gain, smoothness, batch):
        method = dbo.algorithms.mdbo(
            toy.problem,
            channel=_wire(0.1),
            tracker_channel=_wire(),
            upper_step=0.5 * 0.1,
            lower_step=gain * 0.1,
            average=0.1,
            smoothness=smoothness,
            terms=terms,
        )
        return _path(method, toy, batch, toys.start(toy, method), steps)

    return jax.jit(run, compiler_options=FAST)


def _wrong_point(toy, terms):
    """Where the mean of the nodes' own hypergradients vanishes on the true y*(x).

    With as many terms as one likes if ``terms`` is None.
    """
    a, b, c = (np.asarray(leaf) for leaf in toy.batch.lower)
    targets, smoothness = np.asarray(toy.batch.upper), _smoothness(toy)
    slope = np.linalg.solve(a.mean(0), b.mean(0))
    start = np.linalg.solve(a.mean(0), c.mean(0))
    matrix, right = 0.1 * np.eye(b.shape[2]), np.zeros(b.shape[2])
    for a_i, b_i, t_i in zip(a, b, targets, strict=True):
        inverse = np.linalg.inv(a_i)
        if terms is not None:
            left = np.linalg.matrix_power(np.eye(len(a_i)) - a_i / smoothness, terms)
            inverse = (np.eye(len(a_i)) - left) @ inverse
        matrix = matrix + b_i.T @ inverse @ slope / len(a)
        right = right - b_i.T @ inverse @ (start - t_i) / len(a)
    return np.linalg.solve(matrix, right)


# After 2400 steps the floors of 8000 are reached to within a hundredth.
MDBO = {10: (3000, 4.18, 1.39e-2), 200: (2400, 5.85, 1e-8)}


@pytest.mark.parametrize("gain", [0.5, 1.0])
@pytest.mark.parametrize("terms", MDBO)
def test_mdbo_is_right_where_curvatures_are_equal_and_wrong_elsewhere(terms, gain):
    steps, wrong, right = MDBO[terms]
    ends = {}
    for equal in (False, True):
        toy = _toy(equal)
        run = _mdbo(terms, steps)
        state, norms = run(gain, _smoothness(toy), toy.batch)
        ends[equal] = float(norms[-1])
        # All agree, so the mean of their own hypergradients has vanished.
        point = toy.exact.hypergradient(_wrong_point(toy, terms))
        assert ends[equal] == pytest.approx(float(jnp.linalg.norm(point)), 0.01, 1e-8)
        assert float(dbo.consensus_error(state.x)) < 0.1
    assert ends[False] == pytest.approx(wrong, rel=0.03)
    if right == 1e-8:
        assert ends[True] < right
    else:
        assert ends[True] == pytest.approx(right, rel=0.03)


def test_mdbo_ends_where_own_hypergradients_cancel():
    """To the last digits, given time; more terms lead to another wrong point."""
    toy = _toy(equal=False)
    state, _ = _mdbo(10, 8000)(0.5, _smoothness(toy), toy.batch)
    expected = _wrong_point(toy, 10)
    np.testing.assert_allclose(dbo.node_mean(state.x), expected, rtol=0, atol=1e-6)
    norms = [
        float(jnp.linalg.norm(toy.exact.hypergradient(_wrong_point(toy, terms))))
        for terms in (10, 200, None)
    ]
    assert norms == pytest.approx([4.18, 5.85, 5.85], rel=0.01)


@functools.cache
def _ma_dsbo(linear_steps, track_lower, carry_linear):
    toy = _toy(equal=False)

    def method(upper_step, lower_step):
        return dbo.algorithms.ma_dsbo(
            toy.problem,
            channel=_wire(),
            upper_step=upper_step,
            lower_step=lower_step,
            linear_step=0.05,
            lower_steps=10,
            linear_steps=linear_steps,
            track_lower=track_lower,
            carry_linear=carry_linear,
        )

    def run(upper_step, lower_step, state):
        return _path(method(upper_step, lower_step), toy, toy.batch, state, 1500)

    start = toys.start(toy, method(0.05, 0.05))
    return jax.jit(run, compiler_options=FAST), start


# (linear steps, step of y, tracked y): floor.
MA_DSBO = {
    (10, 0.05, False): 0.632,
    (50, 0.01, False): 0.165,
    (10, 0.05, True): 0.476,
    (50, 0.01, True): 0.123,
}


@pytest.mark.parametrize("case", MA_DSBO)
def test_ma_dsbo_stops_at_a_floor(case):
    linear_steps, lower_step, tracked = case
    run, start = _ma_dsbo(linear_steps, tracked, False)
    _, norms = run(0.05, lower_step, start)
    assert float(norms[-1]) == pytest.approx(MA_DSBO[case], rel=0.03)


def test_causes_of_the_floor_of_ma_dsbo():
    """A carried tracker of z takes most of it away, a short step of x the rest."""
    run, start = _ma_dsbo(10, True, True)
    _, norms = run(0.05, 0.05, start)
    assert float(norms[-1]) == pytest.approx(0.110, rel=0.03)
    state = start
    for _ in range(4):  # 6000 steps
        state, norms = run(0.005, 0.05, state)
    assert float(norms[-1]) == pytest.approx(0.0155, rel=0.03)
