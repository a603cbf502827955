"""EXTRA, exact diffusion and NIDS: the published forms, and what the dual gain does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import dbojax as dbo

STEP = 0.1
MAKES = {name: getattr(dbo.strategies, name) for name in toys.SYMMETRIC_ONLY}
GRAPHS = {k: w for k, w in toys.graphs().items() if k != "exponential"}
COMPRESSORS = toys.compressors()


def _wire(graph="ring", compressor=None, gamma=0.3):
    mix = dbo.mixing.mixer(GRAPHS[graph])
    if compressor is None:
        return dbo.channels.exact(mix)
    return dbo.channels.reference_point(mix, compressor, gamma)


@functools.cache
def _data(n=toys.N):
    """Curvatures and targets of unlike quadratics, and where their mean is least."""
    rng = np.random.default_rng(3)
    curvature, target = rng.uniform(0.5, 2, (n, 4)), 3 * rng.normal(size=(n, 4))
    best = (curvature * target).sum(0) / curvature.sum(0)
    return curvature, target, np.broadcast_to(best, target.shape)


def _descend(strategy, steps):
    curvature, target, _ = map(jnp.asarray, _data())

    def step(carry, key):
        v, state = carry
        v, state, _ = strategy.update(key, v, curvature * (v - target), state)
        return (v, state), None

    start = jnp.zeros_like(target)
    keys = jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda v: jax.lax.scan(step, (v, strategy.init(v)), keys)[0])(start)


def _published(name, w, steps):
    """The lines of the papers, which have no dual."""
    curvature, target, _ = _data()
    half = (np.eye(len(w)) + w) / 2
    old_v = v = psi = np.zeros(target.shape)
    old_d = np.zeros(target.shape)
    for k in range(steps):
        d = curvature * (v - target)
        if name == "extra":
            new = w @ v - STEP * d
            new = new if k == 0 else v + w @ v - half @ old_v - STEP * (d - old_d)
        elif name == "exact_diffusion":
            after = v - STEP * d
            new, psi = half @ (after + v - psi), after
        else:
            new = half @ (2 * v - old_v - STEP * (d - old_d))
            new = v - STEP * d if k == 0 else new
        old_v, old_d, v = v, d, new
    return v


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", MAKES)
def test_half_a_gain_is_the_published_form(name, graph):
    v, _ = _descend(MAKES[name](_wire(graph), optax.sgd(STEP)), 8)
    np.testing.assert_allclose(v, _published(name, GRAPHS[graph], 8), atol=1e-13)


@pytest.mark.parametrize("name", MAKES)
def test_consensual_optima_are_fixed_points(name):
    curvature, target, best = map(jnp.asarray, _data())
    move = MAKES[name](_wire(), optax.sgd(STEP))
    state, slope = move.init(best), curvature * (best - target)
    at_rest = -STEP * slope  # the dual that cancels each node's own step
    if name == "nids":
        state = state._replace(
            late=state.late._replace(dual=at_rest), started=jnp.array(True)
        )
    else:
        state = state._replace(dual=at_rest)
    moved, after, _ = move.update(jax.random.key(0), best, slope, state)
    np.testing.assert_allclose(moved, best, atol=1e-15)
    duals = [getattr(s, "late", s).dual for s in (after, state)]
    np.testing.assert_allclose(*duals, atol=1e-15)


@pytest.mark.parametrize(
    ("compressor", "name"), toys.star_cover(COMPRESSORS, list(MAKES))
)
def test_duals_add_up_to_zero_whatever_is_sent(compressor, name):
    """So the mean moves along the mean direction, and only there."""
    move = MAKES[name](_wire(compressor=COMPRESSORS[compressor]), optax.sgd(STEP))
    curvature, target, _ = _data()

    @jax.jit
    def run(key):
        v, state = _descend(move, 7)
        return v, state, move.update(key, v, curvature * (v - target), state)[0]

    v, state, moved = jax.device_get(run(jax.random.key(1)))
    np.testing.assert_allclose(
        getattr(state, "late", state).dual.mean(0), 0, atol=1e-13
    )
    expected = v.mean(0) - STEP * (curvature * (v - target)).mean(0)
    np.testing.assert_allclose(moved.mean(0), expected, atol=1e-13)


BIASED = {"top 20 %": dbo.compressors.top_k(0.2), "sign": dbo.compressors.sign()}


@pytest.mark.parametrize("compressor", BIASED)
@pytest.mark.parametrize("name", ["extra", "exact_diffusion"])
def test_biased_reference_points_need_a_small_gain(name, compressor):
    """The half of the published form diverges; a tenth, and a fiftieth, converge."""
    n = 8
    targets = 3 * jax.random.normal(jax.random.key(5), (n, 5))
    mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(n)))
    wire = dbo.channels.reference_point(mix, BIASED[compressor], gamma=0.3)

    @jax.jit
    @jax.vmap
    def end(gain):
        move = MAKES[name](wire, optax.sgd(STEP), dual_gain=gain)

        def step(carry, key):
            v, state = carry
            return move.update(key, v, v - targets, state)[:2], None

        start = jnp.zeros_like(targets), move.init(jnp.zeros_like(targets))
        keys = jax.random.split(jax.random.key(0), 4000)
        return jax.lax.scan(step, start, keys)[0][0]

    error = jnp.abs(end(jnp.array([0.5, 0.1, 0.02])) - targets.mean(0)[None, None]).max(
        (1, 2)
    )
    assert not error[0] < 1e3
    assert (error[1:] < 1e-10).all()


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("compressor", ["qsgd", "top_k"])
def test_gentle_reference_points_bear_the_published_gain(name, compressor):
    wire = _wire(compressor=COMPRESSORS[compressor])
    v, _ = _descend(MAKES[name](wire, optax.sgd(STEP)), 4000)
    np.testing.assert_allclose(v, _data()[2], atol=1e-10)


def test_a_dual_costs_half_of_a_tracker():
    v = jnp.zeros((toys.N, 4))
    sent = {}
    for name in ("extra", "exact_diffusion", "nids", "gradient_tracking"):
        move = getattr(dbo.strategies, name)(_wire(), optax.sgd(STEP))
        sent[name] = move.update(jax.random.key(0), v, v, move.init(v))[2]
    for name in MAKES:
        assert 2 * sent[name].total == sent["gradient_tracking"].total
        assert sent[name].rounds == 1


@pytest.mark.parametrize("name", MAKES)
def test_bad_input_says_what_to_write(name):
    make = MAKES[name]
    directed = dbo.mixing.mixer(toys.graphs()["exponential"])
    with pytest.raises(ValueError, match=r"symmetric weights.*gradient_tracking"):
        make(dbo.channels.exact(directed), optax.sgd(STEP))
    with pytest.raises(ValueError, match=r"dual_gain.* must be > 0; got -1"):
        make(_wire(), optax.sgd(STEP), dual_gain=-1)
    move, v = make(_wire(), optax.sgd(STEP)), jnp.zeros((toys.N, 4))
    mask = dbo.participation(jax.random.key(0), toys.N, 2)
    with pytest.raises(ValueError, match="duals of those present"):
        move.update(jax.random.key(0), v, v, move.init(v), mask)


def _float32_wires():
    """Everything a dual may travel over; with what leaves out most, sparse sums too."""
    n, c = 10, dbo.channels
    ring = dbo.topology.metropolis(dbo.topology.ring(n))
    sparse = dbo.mixing.neighbours(dbo.topology.metropolis(dbo.topology.ring(n, 2)))
    top = dbo.compressors.top_k(0.2)
    network = dbo.networks.fixed(ring)
    return {
        "shifts": c.exact(dbo.mixing.shifts(ring)),
        "neighbours": c.exact(sparse, 0.7),
        "dense": c.exact(dbo.mixing.dense(ring)),
        "averaging": c.exact(dbo.mixing.averaging(n)),
        "reference_point": c.reference_point(sparse, top, 0.3),
        "changing": c.changing(network),
        "changing_reference_point": c.changing_reference_point(
            network, dbo.compressors.identity(), 0.5
        ),
    }


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("wire", _float32_wires())
def test_duals_do_not_drift_in_short_floats(wire, name):
    """Values near one, ten thousand short steps: rounding errors must not add up.

    Taken as V - W V, rounded at the size of V, the flows of all nodes add up to some
    error each time, which the duals would keep for ever: 1e-2 and more here.
    """
    n, d = 10, 120
    targets = 1 + jax.random.normal(jax.random.key(5), (n, d), jnp.float32)
    move = MAKES[name](_float32_wires()[wire], optax.sgd(0.01), dual_gain=0.05)

    @jax.jit
    def run(start):
        def step(carry, key):
            v, state = carry
            return move.update(key, v, v - targets, state)[:2], None

        keys = jax.random.split(jax.random.key(0), 10_000)
        return jax.lax.scan(step, (start, move.init(start)), keys)[0]

    v, state = run(jnp.zeros_like(targets))
    assert v.dtype == jnp.float32
    mean = np.asarray(targets, np.float64).mean(0, keepdims=True)
    assert np.abs(np.asarray(v).mean(0) - mean).max() < 1e-4
    assert np.abs(np.asarray(getattr(state, "late", state).dual).mean(0)).max() < 1e-6


@pytest.mark.parametrize("name", MAKES)
def test_graphs_that_change_need_a_small_gain(name):
    """Over random matchings the published half diverges, and a tenth converges."""
    turns = dbo.topology.random_matchings(dbo.topology.ring(8), 7, seed=0)
    wire = dbo.channels.changing(dbo.networks.sequence(turns))
    rng = np.random.default_rng(0)
    curvature = jnp.asarray(rng.uniform(0.5, 2, (8, 3)))
    target = jnp.asarray(3 * rng.normal(size=(8, 3)))
    best = (curvature * target).sum(0) / curvature.sum(0)

    @jax.jit
    @jax.vmap
    def error(gain):
        move = MAKES[name](wire, optax.sgd(0.02), dual_gain=gain)

        def step(carry, key):
            v, state = carry
            return move.update(key, v, curvature * (v - target), state)[:2], None

        start = jnp.zeros_like(target), move.init(jnp.zeros_like(target))
        keys = jax.random.split(jax.random.key(0), 4000)
        return jnp.abs(jax.lax.scan(step, start, keys)[0][0] - best[None]).max()

    published, small = error(jnp.array([0.5, 0.1]))
    assert not published < 1e8
    assert small < 1e-10


@pytest.mark.parametrize("name", MAKES)
def test_a_server_gives_estimates_and_no_flows(name):
    top = dbo.compressors.top_k(1)
    mean = dbo.mixing.averaging(toys.N)
    c = dbo.channels
    averaged = c.smoothed(_wire(), 0.5)
    for channel in (c.ef21(mean, top), c.server(mean), c.ef14(mean, top), averaged):
        with pytest.raises(ValueError, match=r"between neighbours.*allreduce"):
            MAKES[name](channel, optax.sgd(STEP))
    for gain, kind in ((np.float32(-0.5), ValueError), ("half", TypeError)):
        with pytest.raises(kind, match="dual_gain"):
            MAKES[name](_wire(), optax.sgd(STEP), dual_gain=gain)
