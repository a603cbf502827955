"""Which strategy on which level: the robust part of SPARKLE's claims.

One toy stands for four on which the same came out; `benchmarks/reproduce/sparkle.py`
has the numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo

NODES, STEPS, TARGET = 10, 700, 1e-5
RULES = {
    "GT": dbo.strategies.gradient_tracking,
    "EXTRA": dbo.strategies.extra,
    "ED": dbo.strategies.exact_diffusion,
    "D-SOBA": dbo.strategies.diffusion_atc,
}
RING = dbo.topology.metropolis(dbo.topology.ring(NODES))
COMPLETE = np.full((NODES, NODES), 1 / NODES)
# Ten runs at once, in one program for all tests of a method.
UPPER, LOWER = map(np.ravel, np.meshgrid([0.2, 0.8], [0.02, 0.04, 0.08, 0.12, 0.16]))
# Graph above, graph below.
PAIRS = [(RING, RING), (RING, COMPLETE), (COMPLETE, RING), (COMPLETE, COMPLETE)]


@functools.cache
def _program(name):
    """Norms of the true hypergradient, (runs, steps), and bytes of one message."""
    task, message = dbo.tasks.quadratic(n=NODES, dx=3, dy=5, seed=1), []

    def norms(w, v, upper_step, lower_step, sigma):
        noisy = dbo.tasks.with_gradient_noise(task, sigma)
        method = dbo.algorithms.sparkle(
            noisy.problem,
            upper=RULES[name],
            lower=RULES[name],
            upper_channel=dbo.channels.exact(dbo.mixing.dense(w)),
            lower_channel=dbo.channels.exact(dbo.mixing.dense(v)),
            upper_step=upper_step,
            lower_step=lower_step,
            average=0.3,
        )
        draw = noisy.sampler(1)

        def step(state, key):
            state, metrics = method.step(key, state, draw(key, 0))
            message[:] = [metrics.traffic.message]
            slope = task.exact.hypergradient(dbo.node_mean(state.x))
            return state, jnp.linalg.norm(slope)

        start = method.init(*dbo.replicate((task.x0, task.y0), NODES))
        # The same noise in every run, so that differences have another cause.
        keys = jax.random.split(jax.random.key(0), STEPS)
        return jax.lax.scan(step, start, keys)[1]

    program = jax.jit(jax.vmap(norms))
    return lambda *args: (np.asarray(program(*args)), message[0])


def _fewest(name):
    """Steps on a ring until all later norms are at the target, the best of the grid.

    And the bytes that one node hands to one link until then.
    """
    ring = np.broadcast_to(RING, (UPPER.size, *RING.shape))
    norms, message = _program(name)(ring, ring, UPPER, LOWER, 0 * UPPER)
    later = np.maximum.accumulate(np.nan_to_num(norms, nan=np.inf)[:, ::-1], 1)[:, ::-1]
    steps = int((~(later <= TARGET)).sum(1).min()) + 1
    assert steps <= STEPS
    return steps, steps * message


def _over_graphs(name, sigma):
    """Root mean square of the second half over each pair of graphs, equal steps."""
    above, below = (
        np.array([pair[level] for pair in PAIRS] + [RING] * (UPPER.size - len(PAIRS)))
        for level in (0, 1)
    )
    fixed = np.full(UPPER.size, 0.2), np.full(UPPER.size, 0.04)
    norms, _ = _program(name)(above, below, *fixed, np.full(UPPER.size, sigma))
    return np.sqrt((norms[: len(PAIRS), STEPS // 2 :] ** 2).mean(1))


@pytest.mark.parametrize("name", ["EXTRA", "ED"])
def test_one_message_per_step_is_enough(name):
    """No more steps than tracking at their own best step sizes, at half the bytes."""
    steps, sent = _fewest(name)
    tracked_steps, tracked = _fewest("GT")
    assert steps < tracked_steps
    assert sent < tracked / 2


@pytest.mark.parametrize("name", ["GT", "EXTRA", "ED"])
def test_noise_floors_do_not_know_the_graph(name):
    """Within a few hundredths, where diffusion loses more than half."""
    floors = _over_graphs(name, 1.0)
    np.testing.assert_allclose(floors[:-1], floors[-1], rtol=0.03)


def test_the_bias_of_diffusion_comes_from_the_lower_level():
    """A ring below hurts more than a ring above, and either more than the noise."""
    _, above, below, neither = _over_graphs("D-SOBA", 0.0)
    assert neither < 0.01 < 0.1 < above
    assert below > 1.5 * above
    noisy = _over_graphs("D-SOBA", 1.0)
    assert noisy[0] > 2 * noisy[-1]
