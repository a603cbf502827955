"""Decentralised rivals against their NumPy twins, and their meters."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_network as twins
import toys

import dbojax as dbo

GRAPHS = {name: toys.graphs()[name] for name in ("ring", "erdos_renyi")}
ETA, SMOOTHNESS = 0.2, 5.0


def _wire(graph, gamma=1.0):
    return dbo.channels.exact(dbo.mixing.mixer(GRAPHS[graph]), gamma)


def _assert_point(state, expected):
    for got, wanted in zip((state.x, state.y, state.z), expected, strict=False):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)
    assert np.abs(expected[0]).max() > 1e-3


RULES = {
    "diffusion_cta": (dbo.strategies.diffusion_cta, twins.diffusion_cta),
    "diffusion_atc": (dbo.strategies.diffusion_atc, twins.diffusion_atc),
    "tracking": (dbo.strategies.gradient_tracking, twins.tracking),
    "semi_atc": (dbo.strategies.gradient_tracking_semi_atc, twins.tracking_semi_atc),
    "tracking_atc": (dbo.strategies.gradient_tracking_atc, twins.tracking_atc),
    "extra": (dbo.strategies.extra, twins.extra),
    "exact_diffusion": (dbo.strategies.exact_diffusion, twins.exact_diffusion),
    "nids": (dbo.strategies.nids, twins.nids),
}


@pytest.mark.parametrize("above", RULES)
def test_single_loops_equal_loops_over_nodes_and_edges(above):
    """Another rule and another graph on either level."""
    task, names = toys.task(), list(RULES)
    below = names[(names.index(above) + 3) % len(names)]
    method = dbo.algorithms.sparkle(
        task.problem,
        upper=RULES[above][0],
        lower=RULES[below][0],
        upper_channel=_wire("ring"),
        lower_channel=_wire("erdos_renyi"),
        upper_step=0.02,
        lower_step=0.05,
        linear_step=0.03,
        average=0.3,
    )
    state, _ = toys.run(method, task, 5)
    w, v = GRAPHS["ring"], GRAPHS["erdos_renyi"]
    rules = {
        "x": twins.averaged(RULES[above][1](w, 0.02), 0.3),
        "y": RULES[below][1](v, 0.05),
        "z": RULES[below][1](v, 0.03),
    }
    _assert_point(state, twins.single_loop(toys.reference_nodes(task), 5, rules))


def test_d_soba_equals_loops_over_nodes_and_edges():
    task, w = toys.task(), GRAPHS["ring"]
    method = dbo.algorithms.d_soba(
        task.problem,
        channel=_wire("ring"),
        upper_step=0.02,
        lower_step=0.05,
        average=0.3,
    )
    state, metrics = toys.run(method, task, 5)
    below = twins.diffusion_atc(w, 0.05)
    rules = {
        "x": twins.averaged(twins.diffusion_atc(w, 0.02), 0.3),
        "y": below,
        "z": below,
    }
    _assert_point(state, twins.single_loop(toys.reference_nodes(task), 5, rules))
    assert metrics.traffic.message == 8 * (toys.DX + 2 * toys.DY)
    assert metrics.traffic.rounds == 1


SETTINGS = {
    "upper_step": 0.6 * ETA,
    "lower_step": 0.3 * ETA,
    "smoothness": SMOOTHNESS,
    "terms": 4,
}
TWIN = {"eta": ETA, "b": {"x": 0.6, "y": 0.3}, "terms": 4, "smoothness": SMOOTHNESS}
# Name: (method on a graph, its twin, what travels per entry of x and y).
LOCAL = {
    "mdbo": (
        lambda problem, graph: dbo.algorithms.mdbo(
            problem,
            channel=_wire(graph, ETA),
            tracker_channel=_wire(graph),
            average=0.9 * ETA,
            **SETTINGS,
        ),
        lambda *args: twins.mdbo(*args, a=0.9, **TWIN),
        2,
    ),
    "dsbo": (
        lambda problem, graph: dbo.algorithms.dsbo(
            problem, channel=_wire(graph, ETA), **SETTINGS
        ),
        lambda *args: twins.dsbo(*args, **TWIN),
        1,
    ),
    "gdsbo": (
        lambda problem, graph: dbo.algorithms.gdsbo(
            problem,
            channel=_wire(graph, ETA),
            estimator_channel=_wire(graph),
            average=0.9 * ETA,
            **SETTINGS,
        ),
        lambda *args: twins.gdsbo(*args, a=0.9, **TWIN),
        2,
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", LOCAL)
def test_local_methods_equal_loops_over_nodes_and_edges(name, graph):
    method, twin, messages = LOCAL[name]
    task, w = toys.task(), GRAPHS[graph]
    state, metrics = toys.run(method(task.problem, graph), task, 5)
    _assert_point(state, twin(toys.reference_nodes(task), w, 5))
    assert not np.asarray(state.z).any()
    message = 8 * messages * (toys.DX + toys.DY)
    links = np.count_nonzero(w) - toys.N
    traffic = metrics.traffic
    assert (traffic.message, traffic.total) == (message, message * links)
    assert traffic.rounds == 1
    # Of f in x and y, of g in y; J - 1 products in the series and one across.
    assert (metrics.calls.gradients, metrics.calls.products) == (3, 4)


def test_compression_composes_with_the_trackers_of_mdbo():
    """Reference points that lose nothing are the exact channel; others keep means."""
    task, mix = toys.task(), dbo.mixing.mixer(GRAPHS["ring"])

    def method(compressor):
        def wire(gamma):
            return dbo.channels.reference_point(mix, compressor, gamma)

        return dbo.algorithms.mdbo(
            task.problem,
            channel=wire(ETA),
            tracker_channel=wire(1.0),
            average=0.9 * ETA,
            **SETTINGS,
        )

    state, _ = toys.run(method(dbo.compressors.identity()), task, 5)
    nodes = toys.reference_nodes(task)
    _assert_point(state, twins.mdbo(nodes, GRAPHS["ring"], 5, a=0.9, **TWIN))
    state, metrics = toys.run(method(dbo.compressors.top_k(2)), task, 5)
    moved = state.strategies["y"]
    tracker = moved.strategy.tracker
    np.testing.assert_allclose(tracker.mean(0), moved.average.mean(0), atol=1e-12)
    # Two values of eight bytes and their positions of one, in four messages.
    assert metrics.traffic.message == 4 * 2 * (8 + 1)


def test_the_random_power_is_uniform():
    """One of J + 1 values, all as likely, whose mean is J / (J + 1) of the series."""
    task, terms, draws = toys.task(), 3, 4000
    node = toys.reference_nodes(task)[0]
    x, y = np.ones(toys.DX), np.ones(toys.DY)
    batch = jax.tree.map(lambda leaf: leaf[0], task.batch)
    oracle = dbo.oracles.local_neumann(task.problem, terms, SMOOTHNESS, random=True)

    def draw(key):
        return oracle.directions(key, x, y, jnp.zeros(()), (), batch)[0][0]

    keys = jax.random.split(jax.random.key(0), draws)
    drawn = np.asarray(jax.jit(jax.vmap(draw))(keys))
    sums = [twins.neumann(node, x, y, j, SMOOTHNESS) for j in range(terms + 2)]
    values = [
        sums[0] + terms * (after - before) for before, after in itertools.pairwise(sums)
    ]
    close = np.array([np.abs(drawn - v).max(1) < 1e-12 for v in values])
    np.testing.assert_array_equal(close.sum(0), 1)
    spread = 4 * np.sqrt(draws * 0.25 * 0.75)
    np.testing.assert_allclose(close.sum(1), draws / (terms + 1), rtol=0, atol=spread)
    assert oracle.calls[0].products == terms + 1


def test_bad_settings_say_what_to_write():
    problem = toys.task().problem
    with pytest.raises(ValueError, match="whole number of terms, at least one; got 0"):
        dbo.oracles.local_neumann(problem, 0, 1.0)
    with pytest.raises(ValueError, match=r"smoothness.* must be > 0; got 0"):
        dbo.oracles.local_neumann(problem, 3, 0.0)
    with pytest.raises(TypeError, match="number > 0; got 'a'"):
        dbo.oracles.local_neumann(problem, 3, "a")
    with pytest.raises(TypeError, match="`problem` must be a Problem"):
        dbo.oracles.local_neumann(None, 3, 1.0)
    wire, rule = _wire("ring"), dbo.strategies.extra
    for wrong in ("extra", dbo.strategies.extra(wire, optax.sgd(0.1))):
        with pytest.raises(TypeError, match="`lower` makes a strategy from a channel"):
            dbo.algorithms.sparkle(
                problem,
                upper=rule,
                lower=wrong,
                upper_channel=wire,
                lower_channel=wire,
                upper_step=0.1,
                lower_step=0.1,
            )
    move = dbo.strategies.diffusion_cta(_wire("ring"), dbo.algorithms.local_step(0.1))
    with pytest.raises(ValueError, match="0 < weight <= 1, got 2"):
        dbo.strategies.gossiped_average(move, _wire("ring"), 2.0)
    with pytest.raises(TypeError, match="must be a Strategy"):
        dbo.algorithms.single_loop(problem, x=move, y=move, z=0.1)


def test_an_average_from_the_first_starts_where_a_worker_comes_in():
    """Workers that are absent in the first round start with their own first one."""
    mean = dbo.channels.server(dbo.mixing.averaging(2))
    plain = dbo.strategies.allreduce(mean, dbo.algorithms.local_step(1.0))
    move = dbo.strategies.moving_average(plain, 0.25, from_first=True)
    v, key = jnp.zeros(2), jax.random.key(0)
    state = move.init(v)
    for mask, direction in (([True, False], [8.0, 8.0]), ([True, True], [0.0, 4.0])):
        mask = dbo.base.Participation(jnp.array(mask), sum(mask))
        v, state, _ = move.update(key, v, jnp.array(direction), state, mask)
    np.testing.assert_array_equal(state.average, [6.0, 4.0])
