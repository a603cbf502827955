"""Bilevel methods over links that fail and nodes that leave: where they end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import dbojax as dbo

TASK, N = toys.task(), toys.N
UPPER, LOWER = toys.steps(TASK, 0.1, 0.6)
RING = dbo.networks.fixed(toys.graphs()["ring"])
LOSSY = dbo.networks.lossy(RING, 0.2)
START, STOP = 600, 650
LEFT = dbo.networks.away(LOSSY, [1, 4], START, STOP)


def _norms(name, channel, count):
    method = toys.single_loop(TASK, toys.strategies()[name], channel, UPPER, LOWER)
    return toys.hypergradient_norms(method, TASK, count)


def test_tracking_survives_losses_and_leaves():
    """The sum of the trackers is kept, and with it the exact solution."""
    state, norms = _norms("tracking", dbo.channels.changing(LEFT), 1700)
    # It is felt: not monotone, and back on its way.
    assert norms[START:STOP].min() > 1e-5
    assert norms[-1] < 1e-6
    assert float(dbo.consensus_error((state.x, state.y, state.z))) < 1e-6
    np.testing.assert_allclose(state.x, np.tile(TASK.exact.x_star, (N, 1)), atol=1e-5)
    for memory in state.strategies.values():
        tracked, mean = memory.tracker.mean(0), memory.direction.mean(0)
        np.testing.assert_allclose(tracked, mean, atol=1e-12)


def test_diffusion_has_no_memory_to_lose_and_its_floor_all_the_same():
    _, norms = _norms("diffusion_atc", dbo.channels.changing(LEFT), 1200)
    assert norms[-200:].min() > 0.1


def _receivers_make_up(network, rate):
    """Wrong: each message is lost by itself, and who misses one keeps its own value."""
    me = np.arange(N)[:, None]

    def weights(key, step):
        kept = network.weights(key, step)
        lost = (jax.random.uniform(key, kept.shape) < rate) & (network.nodes != me)
        gone = jnp.where(lost, kept, 0)
        return (kept - gone).at[:, 0].add(gone.sum(axis=1))

    return network._replace(weights=weights)


def test_losses_that_do_not_return_to_their_sender_move_the_solution():
    """All agree, on the wrong point: rows sum to one, columns do not."""
    wrong = dbo.channels.changing(_receivers_make_up(RING, 0.2))
    state, norms = _norms("tracking", wrong, 1200)
    assert float(dbo.consensus_error(state.x)) < 1e-6
    assert norms[-200:].min() > 0.1
    # The trackers are at rest, and no longer tell of the directions.
    tracker, direction = state.strategies["x"][:2]
    assert float(jnp.linalg.norm(tracker)) < 1e-4
    assert float(jnp.linalg.norm(direction.mean(0))) > 0.1


def test_messages_that_vanish_take_their_values_along(key):
    """Worse: what is lost is gone, and gossip ends at zero."""

    def weights(key, step):
        whole = RING.weights(key, step)
        linked = RING.nodes != np.arange(N)[:, None]
        return jnp.where(
            linked & (jax.random.uniform(key, whole.shape) < 0.2), 0, whole
        )

    channel = dbo.channels.push(RING._replace(weights=weights))
    right = dbo.channels.push(LOSSY)

    def one(channel):
        def send(carry, key):
            return channel.send(key, *carry)[:2], None

        return send

    @jax.jit
    def run(key, v):
        keys = jax.random.split(key, 300)
        return [
            jax.lax.scan(one(c), (v, c.init(v)), keys)[0][0] for c in (channel, right)
        ]

    gone, kept = run(key, jnp.arange(1.0, N + 1))
    assert float(jnp.abs(gone).max()) < 1e-3
    np.testing.assert_allclose(kept, (N + 1) / 2, atol=1e-10)


def _penalised(penalty):
    """Where x rests in closed form, and the true hypergradient there."""
    a, b, c = (np.asarray(leaf).mean(0) for leaf in TASK.batch.lower)
    t, dx = np.asarray(TASK.batch.upper).mean(0), b.shape[1]
    # y = slope_y x + start_y minimises f / lambda + g, and z = slope_z x + start_z g.
    both = a + np.eye(len(a)) / penalty
    slope_y, start_y = np.linalg.solve(both, b), np.linalg.solve(both, c + t / penalty)
    slope_z, start_z = np.linalg.solve(a, b), np.linalg.solve(a, c)
    hessian = 0.1 * np.eye(dx) + penalty * b.T @ (slope_z - slope_y)
    x = np.linalg.solve(hessian, penalty * b.T @ (start_y - start_z))
    return x, float(jnp.linalg.norm(TASK.exact.hypergradient(x)))


def test_c2dfb_over_losses_ends_where_its_penalty_says():
    """Compressed, a fifth of the links lost: no bias but that of 1 / lambda."""
    top = dbo.compressors.top_k(0.4)
    method = dbo.algorithms.c2dfb(
        TASK.problem,
        outer=dbo.channels.changing(LOSSY, 0.6),
        inner=dbo.channels.changing_reference_point(LOSSY, top, 0.4),
        upper_step=0.4,
        lower_step=LOWER / 2,
        penalty=10.0,
        inner_steps=4,
    )
    state, norms = toys.hypergradient_norms(method, TASK, 400)
    x, floor = _penalised(10.0)
    np.testing.assert_allclose(state.x, np.tile(x, (N, 1)), atol=1e-6)
    assert norms[-1] == pytest.approx(floor, rel=1e-4)
    assert floor > 1e-2
    assert floor / _penalised(20.0)[1] == pytest.approx(2, rel=0.1)


def test_clocks_go_on_where_memories_are_forgotten():
    """A method that restarts its trackers sees the same network as its rivals."""
    method = dbo.algorithms.ma_dsbo(
        TASK.problem,
        channel=dbo.channels.changing(RING),
        upper_step=UPPER,
        lower_step=LOWER,
        linear_step=LOWER,
        lower_steps=2,
        linear_steps=3,
    )
    state, _ = toys.run(method, TASK, 4)
    clocks = jax.tree.leaves(
        state.strategies["z"], is_leaf=lambda leaf: isinstance(leaf, dbo.base.Clock)
    )
    counts = [int(c.step) for c in clocks if isinstance(c, dbo.base.Clock)]
    assert counts == [12, 12]
