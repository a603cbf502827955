"""Rounds with a server: both modes alike, absent clients untouched, bytes, messages."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbojax as dbo

A, S = dbo.algorithms, dbo.submodels
CLIENTS, D, H, OUT = 5, 3, 6, 2
CAPACITIES = [1.0, 0.5, 0.5, 0.34, 0.34]
PARTICIPANTS = {1.0: 1, 0.5: 1, 0.34: 2}


def features(x, inputs):
    return jnp.tanh(inputs @ x["kernel"] + x["bias"][None])


def upper(x, y, batch):
    inputs, targets = batch
    return jnp.mean((features(x, inputs) @ y - targets) ** 2)


def lower(x, y, batch):
    return upper(x, y, batch) + 0.1 * jnp.sum(y**2)


PROBLEM = dbo.Problem(upper, lower)
LABELS = {"kernel": "_ h", "bias": "h"}, "h _"


def start():
    rng = np.random.default_rng(0)
    x = {"kernel": rng.normal(size=(1, D, H)), "bias": rng.normal(size=(1, H))}
    return x, rng.normal(size=(1, H, OUT))


def batch():
    rng = np.random.default_rng(1)

    def samples():
        return rng.normal(size=(CLIENTS, 4, D)), rng.normal(size=(CLIENTS, 4, OUT))

    return dbo.Batch(samples(), samples())


def fleet(capacities=CAPACITIES, **more):
    x, y = start()
    layout = S.layout(jax.tree.map(lambda a: a[0], x), y[0], *LABELS)
    return S.fleet(layout, capacities, **({"participants": PARTICIPANTS} | more))


def method(make=A.rafbo, problem=PROBLEM, fleet=fleet(), **settings):  # noqa: B008
    steps = {"upper_step": 0.05, "lower_step": 0.1, "local_steps": 2}
    return make(problem, fleet, **(steps | settings))


@functools.cache
def after_three(name, uplink="dense", **settings):
    present = PARTICIPANTS if uplink != "memories of all" else None
    settings |= {"uplink": UPLINKS[uplink], "fleet": fleet(participants=present)}
    return run(method(MAKERS[name], radius=2.0, **settings))


def with_oracle(make):
    return functools.partial(A.rafbo, oracle=make)


MAKERS = {
    "one step": with_oracle(
        functools.partial(dbo.oracles.one_step_difference, step_size=0.1)
    ),
    "solver": with_oracle(
        lambda problem: dbo.oracles.from_hypergradient(
            dbo.hypergradients.reverse(
                problem, dbo.hypergradients.descent(problem, optax.sgd(0.1), 2)
            )
        )
    ),
    "rafbo": A.rafbo,
    "rabo": A.rabo,
    "soba": lambda problem, fleet, **more: A.federated(
        problem, dbo.oracles.soba, fleet, **more
    ),
}


def run(algorithm, rounds=3, data=None):
    @jax.jit
    def rounds_of(state, data):
        def step(state, turn):
            return algorithm.step(jax.random.key(turn), state, data)

        return jax.lax.scan(step, state, jnp.arange(rounds))

    return rounds_of(algorithm.init(*start()), batch() if data is None else data)


def close(a, b, tolerance=1e-12):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


def variables(state):
    return state.x, state.y, state.z


UPLINKS = {
    "dense": None,
    "own units": dbo.compressors.qsgd(7),
    "memories of all": dbo.channels.ef21(
        dbo.mixing.averaging(CLIENTS), dbo.compressors.top_k(0.3)
    ),
}


@pytest.mark.parametrize(
    ("name", "uplink"),
    [
        ("rafbo", "dense"),
        ("rafbo", "own units"),
        ("rafbo", "memories of all"),
        ("rabo", "dense"),
        ("one step", "dense"),
        ("solver", "dense"),
    ],
)
def test_smaller_networks_give_the_numbers_of_masked_ones(name, uplink):
    state, metrics = after_three(name, uplink)
    other, told = after_three(name, uplink, extracted=False)
    close(variables(state), variables(other))
    close(metrics, told)
    assert metrics.traffic == told.traffic
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.x, start()[0])
    assert min(moved.values()) > 1e-3


def widened(problem_of):
    """A linen network of the same mathematics, which knows its width."""

    def problem(units):
        module = nn.Dense(units["h"])

        def loss(x, y, batch):
            inputs, targets = batch
            hidden = jnp.tanh(module.apply({"params": x}, inputs))
            return jnp.mean((hidden @ y - targets) ** 2)

        return problem_of(loss)

    return problem


def test_modules_that_know_their_width_are_built_anew():
    make = widened(
        lambda loss: dbo.Problem(
            loss, lambda x, y, b: loss(x, y, b) + 0.1 * jnp.sum(y**2)
        )
    )
    state, _ = run(method(problem=make({"h": H}), smaller=make, radius=2.0))
    close(variables(state), variables(after_three("rafbo")[0]))
    with pytest.raises(ValueError, match=r"(?s)do not take a sub-model.*smaller="):
        run(method(problem=make({"h": H})))


def test_a_labelled_batch_is_cut_with_the_variables():
    def loss(x, y, batch):
        inputs, targets = batch
        return jnp.mean((inputs @ (y * x) - targets) ** 2) + jnp.sum(y**2)

    layout = S.layout(np.ones(D), np.ones(D), "f", "f", ("_ f", "_"))
    some = S.fleet(layout, CAPACITIES)
    data = jax.tree.map(lambda a: a[..., 0] if a.shape[-1] == OUT else a, batch()[0])
    steps = {"upper_step": 0.1, "lower_step": 0.1}
    ends = []
    for extracted in (True, False):
        algorithm = A.rafbo(dbo.Problem(loss, loss), some, extracted=extracted, **steps)
        state = algorithm.init(np.ones((1, D)), np.ones((1, D)))
        ends.append(jax.jit(algorithm.step)(jax.random.key(0), state, data)[0])
    close(variables(ends[0]), variables(ends[1]))


def once_differentiable(value, slope):
    """A function whose gradient comes from the host, which nothing differentiates."""

    @jax.custom_vjp
    def of(v):
        return value(v)

    def backward(v, g):
        shape = jax.ShapeDtypeStruct(v.shape, v.dtype)
        found = jax.pure_callback(slope, shape, v, vmap_method="sequential")
        return (g * found,)

    of.defvjp(lambda v: (value(v), v), backward)
    return of


@pytest.mark.parametrize("make", [A.rafbo, A.rabo])
def test_no_second_derivative_is_taken(make):
    square = once_differentiable(lambda v: jnp.sum(v**2) / 2, np.asarray)
    problem = dbo.Problem(
        lambda x, y, b: jnp.sum((y - b) ** 2) / 2, lambda x, y, b: square(y - x)
    )
    units = S.fleet(S.coordinates(np.ones(3), np.ones(3)), [1.0, 1.0])
    steps = {"upper_step": 0.1, "lower_step": 0.5}
    algorithm = make(problem, units, **steps)
    state = algorithm.init(np.zeros((1, 3)), np.zeros((1, 3)))
    data = np.stack([np.full(3, 1.0), np.full(3, 3.0)])
    state, _ = dbo.run(algorithm, jax.random.key(0), state, data, 200)
    np.testing.assert_allclose(state.x, 2.0, atol=1e-6)
    exact = make(problem, units, oracle=dbo.oracles.soba, **steps)
    with pytest.raises(ValueError, match="Pure callbacks do not support"):
        jax.eval_shape(exact.step, jax.random.key(0), state, data)


def drawn_in_round_zero(algorithm_fleet):
    key_draw, *_ = jax.random.split(jax.random.key(0), 3)
    parts = S.draw(algorithm_fleet, key_draw, 0)
    return sorted(int(i) for part in parts for i in part.clients)


@pytest.mark.parametrize("name", ["rafbo", "rabo"])
def test_absent_clients_are_neither_read_nor_written(name):
    here = drawn_in_round_zero(fleet())
    absent = [i for i in range(CLIENTS) if i not in here]
    assert absent
    spoilt = jax.tree.map(np.copy, batch())
    for leaf in jax.tree.leaves(spoilt):
        leaf[absent] = np.nan
    algorithm = method(MAKERS[name], radius=2.0, uplink=None)
    first = algorithm.init(*start())
    if name == "rabo":
        y = first.y.at[jnp.array(absent)].set(jnp.nan)
        first = first._replace(y=y)
    step = jax.jit(algorithm.step)
    state, metrics = step(jax.random.key(0), first, spoilt)
    clean, _ = step(jax.random.key(0), algorithm.init(*start()), batch())
    close((state.x, metrics.upper), (clean.x, metrics.upper))
    assert np.isfinite(metrics.hypergrad_norm)
    if name == "rabo":
        assert np.isnan(state.y[np.array(absent)]).all()
        rows = np.array(here)
        close(state.y[rows], clean.y[rows])
        assert (np.abs(state.y[rows] - first.y[rows]).max((1, 2)) > 1e-4).all()


def test_what_nobody_holds_does_not_move():
    static = fleet(participants={0.34: 2}, minimum=0, rule=S.static())
    state, metrics = run(method(fleet=static))
    x, y = start()
    kept = int(np.ceil(0.34 * H))
    for before, after in (
        (x["bias"][0], state.x["bias"][0]),
        (y[0, :, 0], state.y[0, :, 0]),
    ):
        np.testing.assert_array_equal(before[kept:], after[kept:])
        assert (before[:kept] != after[:kept]).all()
    np.testing.assert_array_equal(state.z[0, kept:], 0)
    assert (metrics.coverage.x == 0).all()
    assert (metrics.coverage.y == 0).all()


def test_coverage_is_that_of_the_masks():
    _, metrics = after_three("rafbo")
    some = fleet()
    for turn in range(3):
        key_draw, *_ = jax.random.split(jax.random.key(turn), 3)
        held = np.zeros(H, int)
        for part in S.draw(some, key_draw, turn):
            kept = part.kept.get("h", np.tile(np.arange(H), (len(part.clients), 1)))
            for row in np.asarray(kept):
                held[row] += 1
        assert metrics.coverage.x[turn] == metrics.coverage.y[turn] == held.min()


def test_bytes_are_those_of_the_arrays_that_cross():
    def size(units, personal):
        x = units * (D + 1)
        return 8 * (x if personal else x + 2 * units * OUT)

    for name in ("rafbo", "rabo"):
        _, metrics = after_three(name)
        each = [size(units, name == "rabo") for units in (6, 3, 3, 3)]
        assert metrics.traffic == dbo.Traffic(each[0], 2 * sum(each), 2, each[0])
    _, packed = after_three("rafbo", "own units")
    wire = UPLINKS["own units"]
    x, y = start()
    one = [jax.tree.map(lambda a: a[0], v) for v in (x, y, y)]
    sent = [
        jax.eval_shape(
            lambda v: wire.compress(jax.random.key(0), v, wire.init(v))[0], v
        )
        for v in one
    ]
    assert packed.traffic.message == sum(map(dbo.trees.nbytes, sent))


def test_dividing_by_everyone_slows_rare_entries_down():
    ends = {}
    half = fleet([1.0, 0.5, 0.5, 0.5, 0.5], participants={1.0: 1, 0.5: 3})
    for divide_by in (A.covered, A.everyone):
        algorithm = method(
            fleet=half, divide_by=divide_by, local_steps=1, extracted=False
        )
        ends[divide_by] = (
            run(algorithm, rounds=1)[0].x["bias"][0] - start()[0]["bias"][0]
        )
    key_draw, *_ = jax.random.split(jax.random.key(0), 3)
    held = np.zeros(H)
    for part in S.draw(half, key_draw, 0):
        for row in part.kept.get("h", np.arange(H)[None]):
            held[np.asarray(row)] += 1
    assert held.min() < 4
    close(ends[A.everyone], ends[A.covered] * held / 4)


def test_unlike_local_steps_are_normalised():
    unlike = {"local_steps": (3, 1, 2), "fleet": fleet(participants=None)}
    # Directions that do not depend on the point: moves are proportional to the steps.
    flat = dbo.Problem(
        lambda x, y, b: sum(jnp.sum(leaf) for leaf in jax.tree.leaves((x, y))),
        lambda x, y, b: jnp.sum(y),
    )
    plain = run(method(problem=flat, **unlike), rounds=1)[0].x["bias"][0]
    fair = run(method(problem=flat, normalise=True, **unlike), rounds=1)[0].x["bias"][0]
    before = start()[0]["bias"][0]
    close(before - fair, np.full(H, 0.05 * 9 / 5))
    assert np.ptp(before - plain) > 0.01


def test_a_sample_is_drawn_for_each_local_step():
    # x moves by the sum of what was drawn, whatever the point.
    flat = dbo.Problem(
        lambda x, y, b: b * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(x)),
        lambda x, y, b: jnp.sum(y),
    )

    x, y = start()
    layout = S.layout(jax.tree.map(lambda a: a[0], x), y[0], *LABELS)
    alike = S.fleet(layout, [1.0] * CLIENTS)  # a third of the program of unlike ones

    def moved(local_steps, sample):
        algorithm = method(
            problem=flat, fleet=alike, local_steps=local_steps, sample=sample
        )
        end = run(algorithm, rounds=1)[0].x["bias"][0]
        return np.asarray(start()[0]["bias"][0] - end)

    def drawn(key, data):
        del data
        return jax.random.normal(key)

    np.testing.assert_allclose(
        moved(2, lambda key, data: 1.0), 2 * moved(1, lambda key, data: 1.0)
    )
    assert np.abs(moved(2, drawn) - 2 * moved(1, drawn)).max() > 1e-3


def test_server_steps_are_optax_transforms():
    fast = run(method(server_steps=(optax.adam(0.01), 1.0, 1.0)), rounds=1)[0]
    moves = np.abs(np.asarray(fast.x["kernel"][0] - start()[0]["kernel"][0]))
    np.testing.assert_allclose(moves[moves > 0], 0.01, rtol=1e-3)
    assert (moves > 0).all()


def test_bad_input_is_refused_before_any_compute():
    x, y = start()
    good, own = method(), method(A.rabo)
    remembering = method(uplink=UPLINKS["memories of all"])

    def step(make, state):
        return jax.eval_shape(method(make).step, jax.random.key(0), state, batch())

    cases = [
        ("whole number >= 1, or one for each of 3", lambda: method(local_steps=(1, 2))),
        ("`inner_steps` is a whole number", lambda: method(inner_steps=-1)),
        ("write extracted=False", lambda: method(keep=True)),
        ("one mean, as server channels", lambda: method(uplink=gossip())),
        ("holds 2 rows", lambda: good.init(twice(x), twice(y))),
        ("structure for which the layout", lambda: good.init(y, y)),
        ("does not fit its label", lambda: good.init(x, y[:, :4])),
        ("Every leaf of `batch` needs 5 nodes", lambda: run(good, data=y)),
        ("radius > 0", lambda: method(radius=-1.0)),
        ("for each of 3", lambda: method(local_steps=2.0)),
        ("Let all take part", lambda: remembering.init(x, y)),
        ("is that of another one", lambda: step(A.rabo, good.init(x, y))),
        ("is that of another one", lambda: step(A.rafbo, own.init(x, y))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="`fleet` must be"):
        method(fleet=3)
    with pytest.raises(TypeError, match="`uplink` must be"):
        method(uplink=0.1)


def twice(tree):
    return jax.tree.map(lambda a: np.concatenate([a, a]), tree)


def gossip():
    w = dbo.topology.metropolis(dbo.topology.ring(CLIENTS))
    return dbo.channels.exact(dbo.mixing.mixer(w))
