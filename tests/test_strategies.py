"""Strategies: who reaches the optimum of the average, and who stops short."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import dbojax as dbo

STRATEGIES = toys.strategies()
GRAPHS = toys.graphs()
TRACKING = ["tracking", "tracking_semi_atc", "tracking_atc"]
STEP = 0.1


def _targets(n=toys.N):
    return 3 * jax.random.normal(jax.random.key(5), (n, 4))


def _descend(strategy, targets, steps, channel_key=0):
    """Follow D = V - b_i from a common start of zero."""

    def step(carry, key):
        v, state = carry
        v, state, _ = strategy.update(key, v, v - targets, state)
        return (v, state), None

    start = jnp.zeros_like(targets)
    keys = jax.random.split(jax.random.key(channel_key), steps)
    carry = (start, strategy.init(start))
    return jax.jit(lambda c: jax.lax.scan(step, c, keys)[0])(carry)


OVER_GRAPHS = [
    (name, graph)
    for name, graph in itertools.product(STRATEGIES, GRAPHS)
    if name != "allreduce" and toys.fits(name, graph)
]


def _exact(graph="ring"):
    return dbo.channels.exact(dbo.mixing.mixer(GRAPHS[graph]))


def _slow(name, w, targets, steps):
    """The update lines of the methods, with W as a matrix."""
    v, tracker, last = (np.zeros(targets.shape) for _ in range(3))
    r, dual = np.zeros(targets.shape), np.zeros(targets.shape)
    for k in range(steps):
        d = v - targets
        if name == "moving_average":
            r = 0.5 * r + 0.5 * d
            d = r
        change, last = d - last, d
        if name in toys.SYMMETRIC_ONLY:
            v, dual = _slow_dual(name, w, v, d, dual, first=k == 0)
        elif name == "diffusion_cta":
            v = w @ v - STEP * d
        elif name == "diffusion_atc":
            v = w @ (v - STEP * d)
        elif name == "allreduce":
            v = v - STEP * w @ d
        elif name == "tracking_atc":
            tracker = w @ (tracker + change)
            v = w @ (v - STEP * tracker)
        else:
            tracker = w @ tracker + change
            semi = name in ("tracking_semi_atc", "gradient_push")
            v = w @ (v - STEP * tracker) if semi else w @ v - STEP * tracker
    return v


def _slow_dual(name, w, v, d, dual, first):
    if name == "nids" and first:
        return v - STEP * d, dual
    sent = v if name == "extra" else v - STEP * d - dual
    moved = w @ v - STEP * d - dual if name == "extra" else (sent + w @ sent) / 2
    return moved, dual + toys.DUAL_GAIN * (sent - w @ sent)


@pytest.mark.parametrize(
    ("name", "graph"),
    [*OVER_GRAPHS, ("allreduce", "complete")],
)
def test_update_lines(name, graph):
    targets = _targets()
    strategy = STRATEGIES[name](toys.wire(name, GRAPHS[graph]), optax.sgd(STEP))
    v, _ = _descend(strategy, targets, 5)
    slow = _slow(name, GRAPHS[graph], np.asarray(targets), 5)
    np.testing.assert_allclose(v, slow, atol=1e-13)


WITHOUT_BIAS = [
    (name, graph)
    for name, graph in OVER_GRAPHS
    if name in (*TRACKING, *toys.SYMMETRIC_ONLY, "gradient_push")
]


@pytest.mark.parametrize(("name", "graph"), WITHOUT_BIAS)
def test_what_corrects_the_bias_reaches_the_mean(name, graph):
    targets = _targets()
    strategy = STRATEGIES[name](toys.wire(name, GRAPHS[graph]), optax.sgd(STEP))
    v, _ = _descend(strategy, targets, 2000)
    mean = jnp.broadcast_to(targets.mean(0)[None], targets.shape)
    np.testing.assert_allclose(v, mean, atol=1e-10)


@pytest.mark.parametrize("name", ["diffusion_cta", "diffusion_atc"])
def test_diffusion_stops_in_proportion_to_its_step(name):
    targets = _targets()
    errors = []
    for step in (0.02, 0.01):
        strategy = STRATEGIES[name](_exact(), optax.sgd(step))
        v, _ = _descend(strategy, targets, 4000)
        errors.append(float(jnp.linalg.norm(v - targets.mean(0)[None])))
    assert errors[1] > 1e-2
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("compressor", "name"), toys.star_cover(toys.compressors(), TRACKING)
)
def test_the_trackers_mean_is_the_directions_mean(compressor, name):
    targets = _targets()
    channel = dbo.channels.reference_point(
        dbo.mixing.mixer(GRAPHS["ring"]), toys.compressors()[compressor], 0.2
    )
    _, state = _descend(STRATEGIES[name](channel, optax.sgd(STEP)), targets, 7)
    np.testing.assert_allclose(
        state.tracker.mean(0), state.direction.mean(0), atol=1e-12
    )


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("n", [1, toys.N])
def test_one_node_and_full_averaging_are_plain_descent(name, n):
    targets = _targets(n)
    channel = toys.wire(name, np.full((n, n), 1 / n))
    v, _ = _descend(STRATEGIES[name](channel, optax.sgd(STEP)), targets, 9)
    central, r = np.zeros(4), np.zeros(4)
    for _ in range(9):
        d = central - np.asarray(targets).mean(0)
        r = 0.5 * r + 0.5 * d if name == "moving_average" else d
        central = central - STEP * r
    np.testing.assert_allclose(v.mean(0), central, atol=1e-13)


@pytest.mark.parametrize("name", STRATEGIES)
def test_any_optax_transform_makes_the_local_step(name):
    """Adam on every node by itself, on trees, with a schedule."""
    n = toys.N
    tx = optax.adam(optax.exponential_decay(0.1, 10, 0.9))
    move = STRATEGIES[name](toys.wire(name, GRAPHS["complete"]), tx)
    v = {"a": jnp.ones((n, 3)), "b": jnp.arange(n * 2.0).reshape(n, 2)}
    moved, state, _ = move.update(jax.random.key(0), v, v, move.init(v))
    again, _, _ = move.update(jax.random.key(0), moved, v, state)
    assert jax.tree.structure(again) == jax.tree.structure(v)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(again))
    assert not np.allclose(moved["a"], again["a"])


def test_trackers_can_travel_on_another_channel():
    targets = _targets()
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    values = dbo.channels.reference_point(mix, dbo.compressors.top_k(2), 0.3)
    move = dbo.strategies.gradient_tracking(values, optax.sgd(STEP), _exact())
    start = jnp.zeros_like(targets)
    _, _, traffic = move.update(jax.random.key(0), start, targets, move.init(start))
    assert traffic.message == 2 * (8 + 1) + 4 * 8
    v, _ = _descend(move, targets, 800)
    np.testing.assert_allclose(v, jnp.broadcast_to(targets.mean(0), v.shape), atol=1e-9)


ROUNDS = {"tracking": 1, "tracking_semi_atc": 1, "tracking_atc": 2, "diffusion_cta": 1}


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_count_what_must_wait(name):
    targets = _targets()
    move = STRATEGIES[name](_exact(), optax.sgd(STEP))
    traffic = move.update(jax.random.key(0), targets, targets, move.init(targets))[2]
    messages = 1 if name == "diffusion_cta" else 2
    assert traffic.rounds == ROUNDS[name]
    assert traffic.message == messages * 4 * 8


def test_bad_input_says_what_to_write():
    move = dbo.strategies.gradient_tracking(_exact(), optax.sgd(STEP))
    v = {"a": jnp.ones((toys.N, 2))}
    with pytest.raises(ValueError, match="structure of `v`"):
        move.update(jax.random.key(0), v, v["a"], move.init(v))
    wrong = {"a": jnp.ones((toys.N, 3))}
    with pytest.raises(ValueError, match="shapes of `v`"):
        move.update(jax.random.key(0), v, wrong, move.init(v))
    short = {"a": jnp.ones((toys.N, 2), jnp.float32)}
    with pytest.raises(ValueError, match=r"dtypes of `v`, \['float64'\]; got"):
        move.update(jax.random.key(0), v, short, move.init(v))
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    for make in (dbo.strategies.diffusion_atc, dbo.strategies.allreduce):
        with pytest.raises(TypeError, match=r"`channel` must be a Channel.* got Mix"):
            make(mix, optax.sgd(STEP))
    with pytest.raises(TypeError, match="`tracker_channel` must be a Channel"):
        dbo.strategies.gradient_tracking(_exact(), optax.sgd(STEP), mix)
    with pytest.raises(TypeError, match=r"`optimizer` must be .* got float"):
        dbo.strategies.gradient_tracking(_exact(), 0.1)
    with pytest.raises(ValueError, match="0 < weight <= 1, got 0"):
        dbo.strategies.moving_average(move, 0)
    with pytest.raises(TypeError, match=r"`projected.strategy.` must be a Strategy"):
        dbo.strategies.projected(mix, dbo.strategies.ball(1.0))
    with pytest.raises(ValueError, match="radius > 0, got 0"):
        dbo.strategies.ball(0)


def test_allreduce_refuses_channels_that_leave_nodes_apart():
    mix, top = dbo.mixing.averaging(toys.N), dbo.compressors.top_k(1)
    apart = [
        _exact("ring"),
        dbo.channels.exact(mix, gamma=0.5),
        dbo.channels.reference_point(mix, top, 0.5),
        dbo.channels.error_feedback(mix, top, 1.0),
    ]
    for channel in apart:
        with pytest.raises(ValueError, match=r"all nodes the same, e.g. .*averaging"):
            dbo.strategies.allreduce(channel, optax.sgd(STEP))


def test_projection_onto_a_ball_moves_only_what_lies_outside():
    mean = _exact("complete")
    move = dbo.strategies.projected(
        dbo.strategies.allreduce(mean, optax.sgd(STEP)), dbo.strategies.ball(2.0)
    )
    v = {"a": jnp.full((toys.N, 3), 0.5), "b": jnp.zeros((toys.N, 2))}
    still = jax.tree.map(jnp.zeros_like, v)
    moved, state, _ = move.update(jax.random.key(0), v, still, move.init(v))
    jax.tree.map(np.testing.assert_array_equal, moved, v)
    far = jax.tree.map(lambda leaf: leaf - 100.0, v)
    moved, _, _ = move.update(jax.random.key(0), v, far, state)
    one = jax.tree.map(lambda leaf: leaf[0], moved)
    assert float(dbo.trees.norm(one)) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_norms_are_wide_enough_for_short_floats(dtype):
    v = {"a": jnp.full((3, 4), 300.0, dtype)}
    assert float(dbo.trees.norm(v)) == pytest.approx(300 * 12**0.5, rel=1e-6)


def test_copies_need_a_whole_number_of_nodes():
    with pytest.raises(ValueError, match="whole number n >= 1"):
        dbo.replicate(jnp.ones(3), 2.0)
