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


TOO_SMALL = CONSTANT / 50


@functools.cache
def _runs(steps=3000):
    """(eps, constant) -> gradients of one node until the norm is eps; inf if never.

    All penalties side by side in one program.
    """
    task = toys.task()
    mix = dbo.mixing.mixer(toys.graphs()["ring"])
    keys = jax.random.split(jax.random.key(0), steps)
    cases = [(eps, CONSTANT) for eps in ACCURACIES] + [(ACCURACIES[-1], TOO_SMALL)]

    def run(penalty):
        method = dbo.algorithms.c2dfb(
            task.problem,
            outer=dbo.channels.exact(mix, 0.6),
            inner=dbo.channels.reference_point(mix, dbo.compressors.top_k(2), 0.3),
            penalty=penalty,
            inner_steps=10,
            upper_step=0.02,
            lower_step=0.1,
        )

        def step(state, key):
            state, metrics = method.step(key, state, task.batch)
            norm = jnp.linalg.norm(task.exact.hypergradient(dbo.node_mean(state.x)))
            return state, (norm, metrics.calls)

        return jax.lax.scan(step, toys.start(task, method), keys)[1]

    penalties = jnp.array([constant / eps for eps, constant in cases])
    runs = jax.jit(jax.vmap(run), compiler_options=toys.THOROUGH)
    norms, calls = runs(penalties)
    found = {}
    for (eps, constant), path in zip(cases, np.asarray(norms), strict=True):
        reached = np.flatnonzero(path <= eps)
        count = (reached[0] + 1) * calls.gradients if reached.size else np.inf
        found[eps, constant] = count
    return found


def test_calls_grow_slower_than_the_bound():
    calls = np.array([_runs()[eps, CONSTANT] for eps in ACCURACIES])
    assert np.isfinite(calls).all()
    assert (np.diff(calls) > 0).all()
    assert 0 < np.polyfit(-np.log(ACCURACIES), np.log(calls), 1)[0] < BOUND


def test_a_penalty_that_is_too_small_never_gets_there():
    """Its bias, proportional to 1 / lambda, is larger than eps."""
    assert _runs()[ACCURACIES[-1], TOO_SMALL] == np.inf
