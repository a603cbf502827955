"""Push-sum and gradient push: what columns alone can keep is enough."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from test_networks import DIRECTED, RING, N, digraph, digraphs, seen, values

import dbojax as dbo

nets = dbo.networks
STEP = 0.1


def _push(network, step=STEP):
    return dbo.strategies.gradient_push(dbo.channels.push(network), optax.sgd(step))


def _shares(network, v, rounds, key):
    """Push-sum: values and ones on their way."""
    channel = dbo.channels.push(network)

    def one(carry, key):
        held, state = carry
        held, state, _ = channel.send(key, held, state)
        return (held, state), held[1]

    @jax.jit
    def run(v):
        held = v, jnp.ones(len(v))
        keys = jax.random.split(key, rounds)
        return jax.lax.scan(one, (held, channel.init(held)), keys)

    (held, _), weights = run(v)
    return held, np.asarray(weights)


@pytest.mark.parametrize("name", [name for name in DIRECTED if "absences" not in name])
def test_push_sum_finds_the_exact_average(name, key):
    v = values(N, 3)
    (shares, weight), weights = _shares(DIRECTED[name], v, 700, key)
    assert weights.min() > 0
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=1e-12)
    means = np.tile(v.mean(0), (N, 1))
    np.testing.assert_allclose(shares / weight[:, None], means, atol=1e-10)
    equal = DIRECTED[name].doubly
    # Without the ones what a node holds is not the mean.
    assert (np.abs(shares - means).max() < 1e-10) == equal
    assert (np.ptp(weight) < 1e-10) == equal


def test_who_gives_and_hears_nobody_runs_dry(key):
    """Why losses need a graph with spare links: steps are divided by these weights."""
    cycle = np.roll(np.eye(N, dtype=bool), 1, axis=1)
    network = nets.fixed(dbo.topology.push_weights(cycle))
    for gone, least in (([], 1.0), ([1], 2.0**-20)):
        network_ = nets.away(network, gone, 0, 20)
        _, weights = _shares(network_, values(N, 1), 20, key)
        assert weights.min() == pytest.approx(least)


def _follow(move, targets, key, steps):
    def one(carry, key):
        v, state = carry
        v, state, _ = move.update(key, v, v - targets, state)
        return (v, state), (state.weight, state.tracker, state.direction)

    @jax.jit
    def run(key):
        start = jnp.zeros_like(targets)
        keys = jax.random.split(key, steps)
        return jax.lax.scan(one, (start, move.init(start)), keys)

    (v, _), kept = run(key)
    return v, kept


@pytest.mark.parametrize("name", ["push", "push with losses"])
def test_gradient_push_equals_loops_over_links(name, key):
    network, targets = DIRECTED[name], np.asarray(values(N, 3))
    v, _ = _follow(_push(network), jnp.asarray(targets), key, 5)
    slow, weight = np.zeros(targets.shape), np.ones(N)
    tracker, last = np.zeros(targets.shape), np.zeros(targets.shape)
    for a in seen(network, 5, key):
        d = slow - targets
        shares = np.zeros(targets.shape)
        arrived, new_weight = np.zeros(targets.shape), np.zeros(N)
        for j in range(N):
            tracker[j] += d[j] - last[j]
            for i in range(N):
                shares[i] += a[i, j] * (weight[j] * slow[j] - STEP * tracker[j])
                new_weight[i] += a[i, j] * weight[j]
                arrived[i] += a[i, j] * tracker[j]
        tracker, last, weight = arrived, d, new_weight
        slow = shares / weight[:, None]
    np.testing.assert_allclose(v, slow, atol=1e-12)


@pytest.mark.parametrize("name", ["push in turns", "push with absences"])
def test_gradient_push_reaches_the_mean_and_keeps_its_sums(name, key):
    targets = 3 * values(N, 3)
    v, (weight, tracker, direction) = _follow(_push(DIRECTED[name]), targets, key, 600)
    np.testing.assert_allclose(v, np.tile(targets.mean(0), (N, 1)), atol=1e-10)
    assert weight.min() > 0
    np.testing.assert_allclose(weight.mean(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(tracker.sum(axis=1), direction.sum(axis=1), atol=1e-11)


def test_an_optimizer_steps_where_the_values_are(key):
    """Momentum follows the estimate of the mean direction, not what a node holds."""
    targets, heavy = 3 * values(N, 3), optax.sgd(0.05, momentum=0.8)
    channel = dbo.channels.push(DIRECTED["push"])
    move = dbo.strategies.gradient_push(channel, heavy)
    v, (weight, _, _) = _follow(move, targets, key, 600)
    np.testing.assert_allclose(v, np.tile(targets.mean(0), (N, 1)), atol=1e-10)
    assert np.ptp(np.asarray(weight)[-1]) > 0.1


def test_one_packet_per_update(key):
    move, v = _push(DIRECTED["push"]), values(N, 3)
    state = jax.eval_shape(move.init, v)
    moved, after, traffic = jax.eval_shape(move.update, key, v, v, state)
    message = 8 * (3 + 3 + 1)
    assert traffic == dbo.Traffic(message, message * int(digraph().sum()), 1)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    short = v.astype(jnp.bfloat16)
    moved, after, _ = jax.eval_shape(
        move.update, key, short, short, jax.eval_shape(move.init, short)
    )
    assert moved.dtype == after.tracker.dtype == jnp.bfloat16
    assert after.weight.dtype == jnp.float32


def test_shares_of_short_floats_add_up_to_what_was_shared(key):
    """Rounded weights would blow values up; what is left is the rounding of sums."""
    network = nets.lossy(DIRECTED["push"], 0.3)
    v = jnp.ones((N, 64), jnp.bfloat16)
    (held, ones), _ = _shares(network, v, 2000, key)
    ratio = np.asarray(held, float).mean(1) / np.asarray(ones, float)
    assert held.dtype == jnp.bfloat16
    assert 0.8 < ratio.min() < ratio.max() < 1.25


@pytest.mark.parametrize("name", [n for n in toys.strategies() if n != "gradient_push"])
def test_no_other_strategy_takes_a_channel_that_pushes(name):
    channel = dbo.channels.push(nets.fixed(RING))
    with pytest.raises(ValueError, match=r"gradient_push\(channel, optimizer\)` alone"):
        toys.strategies()[name](channel, optax.sgd(0.1))


def test_averages_of_slopes_do_not_travel_by_pushing():
    channel = dbo.channels.push(nets.fixed(RING))
    p = toys.task().problem
    scalars = dbo.hypergradients.forward_scalars(p, lambda key, x, y, b: x, 2, 2)
    with pytest.raises(ValueError, match="hands out shares"):
        dbo.algorithms.fg2u_shared(p, scalars, channel, 0.1)


def test_gradient_push_takes_no_other_channel(key):
    exact = dbo.channels.exact(dbo.mixing.mixer(RING))
    with pytest.raises(ValueError, match=r"keeps values.*gradient_tracking"):
        dbo.strategies.gradient_push(exact, optax.sgd(0.1))
    with pytest.raises(TypeError, match="`channel` must be a Channel"):
        dbo.strategies.gradient_push(nets.fixed(RING), optax.sgd(0.1))
    with pytest.raises(TypeError, match="`optimizer` must be"):
        dbo.strategies.gradient_push(dbo.channels.push(nets.fixed(RING)), 0.1)
    with pytest.raises(ValueError, match="symmetric weights"):
        dbo.strategies.extra(
            dbo.channels.changing(DIRECTED["one_peer"]), optax.sgd(0.1)
        )
    move, v = _push(nets.fixed(RING)), values(N, 2)
    with pytest.raises(ValueError, match="Gradient push needs all nodes"):
        move.update(key, v, v, move.init(v), mask=dbo.participation(key, N, 3))


def _few_links():
    """Directed, of unequal degrees, and strongly connected also without 1 and 4."""
    edges = dbo.topology.exponential(N)
    edges[[0, 3, 2], [1, 4, 0]] = False
    return nets.fixed(dbo.topology.push_weights(edges))


SOLVED = {
    "in turns": nets.sequence(digraphs()),
    "lost and left": nets.away(nets.lossy(_few_links(), 0.2), [1, 4], 600, 650),
}


@pytest.mark.parametrize("name", SOLVED)
def test_the_bilevel_quadratic_is_solved_over_directed_graphs(name):
    task, channel = toys.task(), dbo.channels.push(SOLVED[name])
    method = toys.single_loop(
        task, dbo.strategies.gradient_push, channel, *toys.steps(task, 0.1, 0.6)
    )
    state, norms = toys.hypergradient_norms(method, task, 1700)
    assert norms[0] > 1
    assert norms[-1] < 1e-6
    assert float(dbo.consensus_error((state.x, state.y, state.z))) < 1e-6
