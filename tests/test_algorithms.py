"""Algorithms against their slow NumPy twins, their limits and their meters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toys

import dbojax as dbo

GRAPHS = toys.graphs()


def _channel(graph, name, gamma=0.3):
    mix = dbo.mixing.mixer(GRAPHS[graph])
    if name == "exact":
        return dbo.channels.exact(mix, gamma)
    kind = {
        "reference": dbo.channels.reference_point,
        "naive": dbo.channels.error_feedback,
    }[name]
    return kind(mix, dbo.compressors.top_k(2), gamma)


def _c2dfb(task, graph, inner):
    return dbo.algorithms.c2dfb(
        task.problem,
        outer=_channel(graph, "exact", 0.6),
        inner=_channel(graph, inner),
        penalty=10.0,
        inner_steps=3,
        upper_step=0.05,
        lower_step=0.04,
    )


def _ma_dsbo(task, channel):
    return dbo.algorithms.ma_dsbo(
        task.problem,
        channel=channel,
        upper_step=0.05,
        lower_step=0.04,
        linear_step=0.03,
        lower_steps=3,
        linear_steps=2,
        average=0.3,
    )


def _assert_point(state, expected):
    for got, wanted in zip((state.x, state.y, state.z), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)
    assert np.abs(expected[0]).max() > 1e-3


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("inner", ["exact", "reference", "naive"])
def test_c2dfb_equals_loops_over_nodes_and_edges(graph, inner):
    task = toys.task()
    state, _ = toys.run(_c2dfb(task, graph, inner), task, 5)
    expected = reference.c2dfb(
        toys.reference_nodes(task),
        GRAPHS[graph],
        5,
        rounds=3,
        penalty=10.0,
        upper_step=0.05,
        lower_step=0.04,
        gamma_outer=0.6,
        gamma_inner=0.3,
        compress=reference.identity if inner == "exact" else reference.top_k(2),
        naive=inner == "naive",
    )
    _assert_point(state, expected)


@pytest.mark.parametrize("graph", GRAPHS)
def test_ma_dsbo_equals_loops_over_nodes_and_edges(graph):
    task = toys.task()
    state, _ = toys.run(_ma_dsbo(task, _channel(graph, "exact", 1.0)), task, 5)
    expected = reference.ma_dsbo(
        toys.reference_nodes(task),
        GRAPHS[graph],
        5,
        lower_steps=3,
        linear_steps=2,
        upper_step=0.05,
        lower_step=0.04,
        linear_step=0.03,
        average=0.3,
    )
    _assert_point(state, expected)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_composed_single_loop_equals_loops_over_nodes_and_edges(graph):
    task = toys.task()
    method = toys.single_loop(
        task,
        dbo.strategies.gradient_tracking,
        _channel(graph, "exact", 1.0),
        upper_step=0.02,
        lower_step=0.05,
    )
    state, _ = toys.run(method, task, 5)
    expected = reference.single_loop(
        toys.reference_nodes(task),
        GRAPHS[graph],
        5,
        upper_step=0.02,
        lower_step=0.05,
        linear_step=0.05,
    )
    _assert_point(state, expected)


METHODS = {
    "c2dfb": lambda task, channel: dbo.algorithms.c2dfb(
        task.problem, outer=channel, inner=channel, upper_step=0.05, lower_step=0.04
    ),
    "ma_dsbo": _ma_dsbo,
    "single_loop": lambda task, channel: toys.single_loop(
        task, dbo.strategies.gradient_tracking, channel, 0.02, 0.05
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_complete_graph_is_the_centralised_method(name):
    """With equal curvature, node means are the iterates of one node with mean data."""
    task = dbo.tasks.with_equal_curvature(toys.task())
    wide = METHODS[name](task, dbo.channels.exact(dbo.mixing.averaging(toys.N)))
    mean = jax.tree.map(lambda leaf: leaf.mean(0, keepdims=True), task.batch)
    single = task._replace(n=1, batch=mean)
    alone = METHODS[name](single, dbo.channels.exact(dbo.mixing.averaging(1)))
    many, _ = toys.run(wide, task, 5)
    one, _ = toys.run(alone, single, 5)
    for v, w in ((many.x, one.x), (many.y, one.y), (many.z, one.z)):
        np.testing.assert_allclose(v.mean(0), w[0], atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["reference_point", "error_feedback"])
def test_the_identity_compressor_is_the_exact_channel(name, kind):
    task, mix = toys.task(), dbo.mixing.mixer(GRAPHS["ring"])
    lossy = getattr(dbo.channels, kind)(mix, dbo.compressors.identity(), 0.5)
    a, _ = toys.run(METHODS[name](task, lossy), task, 5)
    b, _ = toys.run(METHODS[name](task, dbo.channels.exact(mix, 0.5)), task, 5)
    _assert_point(a, (b.x, b.y, b.z))


@pytest.mark.parametrize("name", METHODS)
def test_the_contract(name, key):
    """Shapes and dtypes stay, one trace serves all steps, jit changes nothing."""
    task = toys.task()
    channel = _channel("ring", "reference")
    method = METHODS[name](task, channel)
    state = toys.start(task, method)
    step = jax.jit(chex.assert_max_traces(method.step, n=1))
    compiled, metrics = step(key, state, task.batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(compiled, state)
    for _ in range(2):
        compiled, _ = step(key, compiled, task.batch)
    plain, _ = method.step(key, state, task.batch)
    chex.assert_trees_all_close(step(key, state, task.batch)[0], plain, atol=1e-12)
    assert int(compiled.step) == 3
    assert metrics.traffic.total == metrics.traffic.message * 2 * toys.N


@pytest.mark.parametrize("name", METHODS)
def test_step_sizes_can_be_swept_under_vmap(name):
    task = toys.task()
    channel = _channel("ring", "exact", 0.5)
    keys = jax.random.split(jax.random.key(0), 4)

    def final(scale):
        makers = {
            "c2dfb": lambda: dbo.algorithms.c2dfb(
                task.problem,
                outer=channel,
                inner=channel,
                upper_step=scale,
                lower_step=scale,
            ),
            "ma_dsbo": lambda: dbo.algorithms.ma_dsbo(
                task.problem,
                channel=channel,
                upper_step=scale,
                lower_step=scale,
                linear_step=scale,
            ),
            "single_loop": lambda: toys.single_loop(
                task, dbo.strategies.diffusion_cta, channel, scale, scale
            ),
        }
        method = makers[name]()
        state, _ = jax.lax.scan(
            lambda s, k: method.step(k, s, task.batch), toys.start(task, method), keys
        )
        return state.x

    swept, alone = jax.jit(lambda rates: (jax.vmap(final)(rates), final(0.05)))(
        jnp.array([0.01, 0.05])
    )
    np.testing.assert_allclose(swept[1], alone, atol=1e-12)
    assert not np.allclose(swept[0], swept[1])


def _message(method, task):
    return toys.run(method, task, 1)[1]


def test_meters_of_c2dfb_follow_the_formula():
    """2 dx + 2 K 2 k numbers per edge; K + 1 rounds; 3 K + 3 gradients, no product."""
    task, rounds, kept = toys.task(), 3, 2
    metrics = _message(_c2dfb(task, "ring", "reference"), task)
    message = 2 * toys.DX * 8 + 4 * rounds * kept * (8 + 1)
    assert metrics.traffic == dbo.Traffic(message, message * 2 * toys.N, rounds + 1)
    assert metrics.calls == dbo.Calls(gradients=3 + 3 * rounds, products=0)


def test_meters_of_ma_dsbo_follow_the_formula():
    task = toys.task()
    metrics = _message(_ma_dsbo(task, _channel("ring", "exact")), task)
    message = 8 * (3 * toys.DY + 2 * 2 * toys.DY + toys.DX)
    assert metrics.traffic == dbo.Traffic(message, message * 2 * toys.N, 3 + 2 + 1)
    assert metrics.calls == dbo.Calls(gradients=3 + 2 + 1, products=2 + 1)


NEWSGROUPS = {"dense": (None, 417.4e6), "top 20%": (0.2, 167.6e6)}


@pytest.mark.parametrize("case", NEWSGROUPS)
def test_traffic_at_the_size_of_20_newsgroups(case):
    """Shapes alone: nothing of this size is ever allocated."""
    kept, expected = NEWSGROUPS[case]
    mix = dbo.mixing.mixer(GRAPHS["ring"])
    dense = dbo.channels.exact(mix)
    inner = dense
    if kept:
        inner = dbo.channels.reference_point(mix, dbo.compressors.top_k(kept), 0.3)
    problem = dbo.Problem(
        lambda x, y, b: jnp.sum(y), lambda x, y, b: jnp.sum(y**2) + jnp.sum(x)
    )
    method = dbo.algorithms.c2dfb(
        problem, outer=dense, inner=inner, upper_step=0.1, lower_step=0.1
    )
    x = jax.ShapeDtypeStruct((toys.N, 130107), jnp.float32)
    y = jax.ShapeDtypeStruct((toys.N, 130107, 20), jnp.float32)
    state = jax.eval_shape(method.init, x, y)
    _, metrics = jax.eval_shape(method.step, jax.random.key(0), state, None)
    assert metrics.traffic.message == pytest.approx(expected, abs=0.05e6)


def test_fresh_batches_reach_every_inner_round():
    """`Rounds` gives the k-th inner batch to the k-th round and the outer one to x."""
    task, mix = toys.task(), dbo.mixing.averaging(toys.N)
    wire = dbo.channels.exact(mix)
    method = dbo.algorithms.c2dfb(
        task.problem,
        outer=wire,
        inner=wire,
        inner_steps=3,
        upper_step=0.05,
        lower_step=0.05,
    )
    state, step = toys.start(task, method), jax.jit(method.step)
    same = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), task.batch)
    plain, _ = step(jax.random.key(0), state, task.batch)
    fresh, _ = step(jax.random.key(0), state, dbo.Rounds(task.batch, same))
    chex.assert_trees_all_close(fresh, plain, atol=1e-14)
    scaled = jax.tree.map(lambda leaf: leaf.at[2].multiply(2.0), same)
    other, _ = step(jax.random.key(0), state, dbo.Rounds(task.batch, scaled))
    np.testing.assert_allclose(other.x, plain.x)
    assert not np.allclose(other.y, plain.y)
    few = jax.tree.map(lambda leaf: leaf[:2], same)
    with pytest.raises(ValueError, match=r"each of 3 rounds on axis 0; got 2"):
        step(jax.random.key(0), state, dbo.Rounds(task.batch, few))


def test_metrics_tell_the_truth():
    task = toys.task()
    method = _c2dfb(task, "star", "reference")
    state, metrics = toys.run(method, task, 30)
    upper = np.mean(
        [
            task.problem.upper(state.x[i], state.y[i], task.batch.upper[i])
            for i in range(toys.N)
        ]
    )
    assert metrics.upper[-1] == pytest.approx(upper)
    for name in ("x", "y", "z"):
        v = np.asarray(getattr(state, name))
        error = np.linalg.norm(v - v.mean(0))
        assert getattr(metrics.consensus, name)[-1] == pytest.approx(error)
    direction = np.asarray(state.strategies["x"].direction)
    assert metrics.hypergrad_norm[-1] == pytest.approx(
        np.linalg.norm(direction.mean(0))
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_state_can_be_donated(name, key):
    task = toys.task()
    method = METHODS[name](task, _channel("ring", "reference"))
    state = toys.start(task, method)
    jax.jit(method.step, donate_argnums=1)(key, state, task.batch)
    assert state.x.is_deleted()


def test_a_start_of_plain_numbers_is_traced_once(key):
    problem = dbo.Problem(lambda x, y, b: x**2 + y**2, lambda x, y, b: (y - x) ** 2)
    mix, top = dbo.mixing.mixer(GRAPHS["ring"]), dbo.compressors.top_k(1)
    method = dbo.algorithms.c2dfb(
        problem,
        outer=dbo.channels.exact(mix),
        inner=dbo.channels.reference_point(mix, top, 0.3),
        upper_step=0.1,
        lower_step=0.1,
    )
    state = method.init(dbo.replicate(1.0, toys.N), dbo.replicate(1.0, toys.N))
    step = jax.jit(chex.assert_max_traces(method.step, n=1))
    for _ in range(3):
        state, _ = step(key, state, None)


SETTINGS = {
    "NumPy float64": np.float64,
    "JAX float64": lambda value: jnp.asarray([value], jnp.float64)[0],
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_no_setting_changes_the_dtype_of_the_state(kind, key):
    task, number = toys.task(), SETTINGS[kind]
    wire = _channel("ring", "exact", number(0.5))
    penalised = dbo.algorithms.c2dfb(
        task.problem,
        outer=wire,
        inner=wire,
        penalty=number(10.0),
        upper_step=number(0.05),
        lower_step=number(0.05),
    )
    averaged = dbo.algorithms.ma_dsbo(
        task.problem,
        channel=wire,
        upper_step=number(0.05),
        lower_step=number(0.05),
        linear_step=number(0.05),
        average=number(0.3),
    )
    short, batch = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32),
        ((task.x0, task.y0), task.batch),
    )
    for method in (penalised, averaged):
        state = method.init(*dbo.replicate(short, toys.N))
        after, _ = jax.eval_shape(method.step, key, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_bad_batches_and_starts_say_what_to_write(key):
    task = toys.task()
    method = _c2dfb(task, "ring", "exact")
    state = toys.start(task, method)
    few = jax.tree.map(lambda leaf: leaf[:4], task.batch)
    with pytest.raises(ValueError, match="`batch` needs 6 nodes on axis 0"):
        method.step(key, state, few)
    inner = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), few)
    with pytest.raises(ValueError, match=r"`batch\.inner` needs 6 nodes on axis 1"):
        method.step(key, state, dbo.Rounds(task.batch, inner))
    inner = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), task.batch)
    with pytest.raises(ValueError, match="for each of 3 rounds on axis 0; got 2"):
        method.step(key, state, dbo.Rounds(task.batch, inner))
    with pytest.raises(TypeError, match="`state` must be a BilevelState"):
        method.step(state, key, task.batch)
    whole = dbo.replicate(jnp.arange(3), toys.N)
    with pytest.raises(ValueError, match=r"`x` must hold real .* got dtypes \['int"):
        method.init(whole, state.y)
    with pytest.raises(ValueError, match=r"`y` must hold real .* got dtypes \['int"):
        method.init(state.x, whole)


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_objectives_that_are_not_scalars_are_refused(level, key):
    task = toys.task()
    vector = task.problem._replace(**{level: lambda x, y, batch: y**2})
    method = _c2dfb(task._replace(problem=vector), "ring", "exact")
    with pytest.raises(ValueError, match=rf"`problem\.{level}.*must return a scalar"):
        method.step(key, toys.start(task, method), task.batch)


def test_bad_compositions_are_refused():
    task, channel = toys.task(), _channel("ring", "exact")
    compose, phase = dbo.algorithms.compose, dbo.algorithms.Phase
    move = dbo.strategies.diffusion_cta(channel, dbo.algorithms.local_step(0.1))
    oracle = dbo.oracles.soba(task.problem)
    with pytest.raises(ValueError, match="exactly one phase"):
        compose(task.problem, oracle, phase(x=move, y=move))
    with pytest.raises(ValueError, match="exactly one phase"):
        compose(task.problem, oracle, phase(x=move, y=move, z=move), phase(y=move))
    with pytest.raises(TypeError, match="`problem` must be a Problem"):
        compose(tuple(task.problem), oracle, phase(x=move, y=move, z=move))
    with pytest.raises(TypeError, match=r"`Phase\.x` must be a Strategy.*got Channel"):
        compose(task.problem, oracle, phase(x=channel, y=move, z=move))
    with pytest.raises(TypeError, match="got 'adam'"):
        dbo.algorithms.local_step("adam")
    with pytest.raises(ValueError, match=r"times=2\.0"):
        compose(task.problem, oracle, phase(x=move, y=move, z=move, times=2.0))
    with pytest.raises(ValueError, match="at least once"):
        dbo.algorithms.c2dfb(
            task.problem,
            outer=channel,
            inner=channel,
            inner_steps=0,
            upper_step=0.1,
            lower_step=0.1,
        )


def test_different_node_counts_are_refused():
    task = toys.task()
    method = _c2dfb(task, "ring", "exact")
    x, y = dbo.replicate(task.x0, toys.N), dbo.replicate(task.y0, toys.N + 1)
    with pytest.raises(ValueError, match="`x` holds 6 nodes on axis 0 and `y` 7"):
        method.init(x, y)
    with pytest.raises(ValueError, match=r"holds 5 nodes on axis 0, but .* has 6"):
        method.init(dbo.replicate(task.x0, 5), dbo.replicate(task.y0, 5))
