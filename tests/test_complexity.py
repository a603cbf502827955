"""Gradients that C2DFB computes until the hypergradient is small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import toys

import dbojax as dbo

BOUND = 4  # exponent of the published upper bound, O~(eps^-4)
ACCURACIES = (0.1, 0.03, 0.01)
CONSTANT = 2.0  # lambda = CONSTANT / eps


@functools.cache
def _calls(eps, constant, steps=3000):
    """Gradients of one node until the true norm is at most ``eps``; inf if never."""
    task = toys.task()
    mix = dbo.mixing.mixer(toys.graphs()["ring"])
    method = dbo.algorithms.c2dfb(
        task.problem,
        outer=dbo.channels.exact(mix, 0.6),
        inner=dbo.channels.reference_point(mix, dbo.compressors.top_k(2), 0.3),
        penalty=constant / eps,
        inner_steps=10,
        upper_step=0.02,
        lower_step=0.1,
    )

    def step(state, key):
        state, metrics = method.step(key, state, task.batch)
        norm = jnp.linalg.norm(task.exact.hypergradient(dbo.node_mean(state.x)))
        return state, (norm, metrics.calls)

    keys = jax.random.split(jax.random.key(0), steps)
    run = jax.jit(lambda state: jax.lax.scan(step, state, keys)[1])
    norms, calls = run(toys.start(task, method))
    reached = np.flatnonzero(np.asarray(norms) <= eps)
    return (reached[0] + 1) * calls.gradients if reached.size else np.inf


def test_calls_grow_slower_than_the_bound():
    calls = np.array([_calls(eps, CONSTANT) for eps in ACCURACIES])
    assert np.isfinite(calls).all()
    assert (np.diff(calls) > 0).all()
    assert 0 < np.polyfit(-np.log(ACCURACIES), np.log(calls), 1)[0] < BOUND


def test_a_penalty_that_is_too_small_never_gets_there():
    """Its bias, proportional to 1 / lambda, is larger than eps."""
    assert _calls(ACCURACIES[-1], CONSTANT / 50) == np.inf
