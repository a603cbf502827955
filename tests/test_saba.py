"""SABA: exact once the tables are full, unbiased before, and linear to the solution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbojax as dbo
from dbojax.base import Rounds
from dbojax.oracles.saba import SabaState, Table
from dbojax.tasks import samplers
from dbojax.tasks.data import Samples

D, MU, RHO = 3, 0.5, 0.5
SIZES = {"one node": ((6,), (8,)), "three nodes": ((4, 6, 3), (8, 5, 6))}


def _mean(values, mask):
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.sum(mask)


def upper(x, y, samples):
    """Residuals, and a pull of x to every input."""
    inputs, labels, mask = samples
    pull = jnp.sum((x[None] - inputs) ** 2, 1)
    return _mean((inputs @ y - labels) ** 2 / 2 + RHO / 2 * pull, mask)


def lower(x, y, samples):
    """Residuals with a ridge; curvature and the coupling to x differ by sample."""
    inputs, labels, mask = samples
    residuals = (inputs @ y - labels) ** 2 / 2
    return _mean(residuals - labels * (x @ y), mask) + MU / 2 * y @ y


PROBLEM = dbo.Problem(upper, lower)


def draw_samples(sizes, seed):
    """Unequal nodes, the padding in front and full of nonsense."""
    rng, width = np.random.default_rng(seed), max(sizes)
    mask = np.arange(width)[None] >= width - np.array(sizes)[:, None]
    inputs = rng.normal(size=(*mask.shape, D))
    labels = 1 + 0.5 * rng.normal(size=mask.shape)
    inputs[~mask], labels[~mask] = 1e3, -1e3
    return Samples(*map(jnp.asarray, (inputs, labels, mask)))


def finite_sum(case):
    return dbo.Batch(*map(draw_samples, SIZES[case], (1, 2)))


def true_hypergradient(data):
    """The dense formula for means over nodes of means over each node's samples."""

    def moments(samples):
        nodes = [
            (a[m], label[m])
            for a, label, m in zip(*map(np.asarray, samples), strict=True)
        ]
        parts = [
            (a.T @ a / len(a), label @ a / len(a), label.mean(), a.mean(0))
            for a, label in nodes
        ]
        return [np.mean(part, axis=0) for part in zip(*parts, strict=True)]

    (p, q, _, centre), (h, c, slope, _) = map(moments, data)
    h = h + MU * np.eye(D)

    def hypergradient(x):
        y = jnp.linalg.solve(h, c + slope * x)
        return RHO * (x - centre) + slope * jnp.linalg.solve(h, p @ y - q)

    return hypergradient


def widths(data):
    """Lengths of the sample axes, with or without a node axis."""
    return [samples.mask.shape[-1] for samples in data]


def one_node(tree, node=0):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[node]), tree)


@jax.jit
def pick(samples, index):
    """The drawn samples of one node."""
    index = jnp.asarray(index)
    data = jax.tree.map(lambda leaf: leaf[index], samples)
    return dbo.Indexed(index, data, jnp.sum(samples.mask))


def point(seed=0):
    return tuple(map(jnp.asarray, np.random.default_rng(seed).normal(size=(3, D))))


def filled(oracle, data, points, width=1):
    """Memory after all true samples were drawn, at one point after the other."""
    memory = jax.jit(oracle.init)(*points[0][:2])[1]
    directions = jax.jit(oracle.directions)
    where = [np.flatnonzero(samples.mask) for samples in data]
    for turn in range(-(-max(map(len, where)) // width)):
        batch = dbo.Batch(
            *(
                pick(samples, np.roll(held, -turn * width)[:width])
                for samples, held in zip(data, where, strict=True)
            )
        )
        x, y, z = points[turn % len(points)]
        _, memory = directions(None, x, y, z, memory, batch)
    return memory


@jax.jit
def _full_terms(x, y, z, data):
    """Of f in x and y, of g in y, and both products with z."""
    slope = jax.grad(lower, 1)
    gradient, pull = jax.vjp(lambda x, y: slope(x, y, data.lower), x, y)
    cross, hessian = pull(z)
    return (*jax.grad(upper, (0, 1))(x, y, data.upper), gradient, hessian, cross)


@jax.jit
def _exact_directions(x, y, z, data):
    return dbo.oracles.soba(PROBLEM).directions(None, x, y, z, (), data)[0]


@pytest.mark.parametrize(("node", "width"), [(0, 1), (1, 2), (2, 3), (1, 3)])
def test_after_a_pass_at_one_point_the_tables_are_exact(node, width):
    data = one_node(finite_sum("three nodes"), node)
    oracle, (x, y, z) = dbo.oracles.saba(PROBLEM, *widths(data)), point()
    memory = filled(oracle, data, [(x, y, z)], width)
    means = (*memory.upper.mean, *memory.lower.mean)
    for mean, exact in zip(means, _full_terms(x, y, z, data), strict=True):
        np.testing.assert_allclose(mean, exact, atol=1e-12)
    for table, samples in zip(memory, data, strict=True):
        for last, mean in zip(*map(jax.tree.leaves, table[:2]), strict=True):
            true = last[np.asarray(samples.mask)]
            np.testing.assert_allclose(mean, true.mean(0), atol=1e-12)
            np.testing.assert_array_equal(last[~np.asarray(samples.mask)], 0)
    batch = dbo.Batch(*(pick(s, np.flatnonzero(s.mask)[:width]) for s in data))
    estimate, _ = jax.jit(oracle.directions)(None, x, y, z, memory, batch)
    exact = _exact_directions(x, y, z, data)
    for one, other in zip(estimate, exact, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("known", ["nothing", "other points"])
def test_whatever_the_tables_hold_the_estimate_is_unbiased(known, width):
    data = one_node(finite_sum("three nodes"), 1)
    oracle, (x, y, z) = dbo.oracles.saba(PROBLEM, *widths(data)), point()
    _, memory = oracle.init(x, y)
    if known == "other points":
        memory = filled(oracle, data, [point(1), point(2), point(3)])
    draws = [
        list(itertools.combinations(np.flatnonzero(samples.mask), width))
        for samples in data
    ]
    pairs = np.array([(*a, *b) for a, b in itertools.product(*draws)])

    def estimate(pair):
        batch = dbo.Batch(
            pick(data.upper, pair[:width]), pick(data.lower, pair[width:])
        )
        return oracle.directions(None, x, y, z, memory, batch)[0]

    estimates = jax.jit(jax.vmap(estimate))(pairs)
    exact = _exact_directions(x, y, z, data)
    for each, full in zip(*jax.tree.map(np.asarray, (estimates, exact)), strict=True):
        np.testing.assert_allclose(each.mean(0), full, atol=1e-12)
        assert np.abs(each - full[None]).max() > 1e-2


def composed(oracle, n, steps):
    channel = dbo.channels.exact(dbo.mixing.averaging(n))
    x, y, z = (dbo.strategies.allreduce(channel, optax.sgd(a)) for a in steps)
    return dbo.algorithms.compose(PROBLEM, oracle, dbo.algorithms.Phase(x, y, z))


def history(oracle, data, steps, count, every):
    """True hypergradient norms at the mean of x, every so many steps."""
    n = len(data.lower.mask)
    method, hypergradient = composed(oracle, n, steps), true_hypergradient(data)
    sampler = samplers.paired(*(samplers.indexed(level, 1) for level in data))
    draws = jax.random.key(5)

    def step(state, t):
        state, _ = method.step(jax.random.key(0), state, sampler(draws, t))
        return state, None

    def chunk(state, start):
        state, _ = jax.lax.scan(step, state, start + jnp.arange(every))
        return state, jnp.linalg.norm(hypergradient(dbo.node_mean(state.x)))

    start = method.init(*(dbo.replicate(jnp.zeros(D), n) for _ in range(2)))
    starts = every * jnp.arange(count // every)
    state, norms = jax.jit(lambda s: jax.lax.scan(chunk, s, starts))(start)
    return state, np.asarray(norms)


@pytest.mark.parametrize("case", SIZES)
def test_saba_is_linear_where_soba_with_the_same_steps_and_draws_stops(case):
    data, steps, every = finite_sum(case), (0.02, 0.02, 0.02), 100
    saba = dbo.oracles.saba(PROBLEM, *widths(data))
    state, norms = history(saba, data, steps, 8_000, every)
    assert norms[-10:].max() < 1e-8
    assert dbo.consensus_error((state.x, state.y, state.z)) < 1e-12

    # Above rounding, the logarithm of the error is a line over many decades.
    line = np.log10(norms[: np.argmax(norms < 1e-12)])
    turns = np.arange(len(line))
    slope, start = np.polyfit(turns, line, 1)
    assert line[0] - line[-1] > 8
    assert slope / every < -1e-3
    assert np.std(line - slope * turns - start) < 0.1 * (line[0] - line[-1])

    soba = dbo.oracles.soba(PROBLEM)
    _, plain = history(soba, data, steps, 8_000, every)
    assert plain[-40:].min() > 1e-4
    assert np.median(plain[-40:]) > 1e-2
    assert plain[-40:].min() > 100 * norms[-40:].max()
    assert np.median(plain[-40:]) > 0.2 * np.median(plain[-60:-40])


def in_numpy(data, batches, steps):
    """Loops over nodes and samples; five lists of dictionaries are the tables."""
    n, point = len(data.lower.mask), np.zeros((3, D))
    table = [{} for _ in range(n)]
    nodes = [
        [tuple(np.asarray(leaf[i]) for leaf in level) for level in data]
        for i in range(n)
    ]
    for batch in batches:
        x, y, z = point
        total = np.zeros((3, D))
        for i in range(n):
            (a, t, mask_f), (b, s, mask_g) = nodes[i]
            drawn = {"f": batch.upper.indices[i], "g": batch.lower.indices[i]}
            size = {"f": mask_f.sum(), "g": mask_g.sum()}
            terms = {
                "f_x": lambda j, a=a: RHO * (x - a[j]),  # noqa: B023
                "f_y": lambda j, a=a, t=t: (a[j] @ y - t[j]) * a[j],  # noqa: B023
                "g_y": lambda j, b=b, s=s: (
                    (b[j] @ y - s[j]) * b[j] + MU * y - s[j] * x  # noqa: B023
                ),
                "hessian": lambda j, b=b: (b[j] @ z) * b[j] + MU * z,  # noqa: B023
                "cross": lambda j, s=s: -s[j] * z,  # noqa: B023
            }
            mean = {}
            for name, term in terms.items():
                level = "f" if name[0] == "f" else "g"
                rows = table[i].setdefault(name, {})
                known = sum(rows.values(), np.zeros(D)) / size[level]
                chosen = [int(j) for j in drawn[level]]
                changes = [term(j) - rows.get(j, np.zeros(D)) for j in chosen]
                mean[name] = known + sum(changes) / len(chosen)
                rows |= {j: term(j) for j in chosen}
            total[0] += mean["f_x"] - mean["cross"]
            total[1] += mean["g_y"]
            total[2] += mean["hessian"] - mean["f_y"]
        point = point - np.array(steps)[:, None] * total / n
    return point


@pytest.mark.parametrize("width", [1, 2])
def test_five_steps_are_those_of_loops(width):
    data, steps = finite_sum("three nodes"), (0.05, 0.1, 0.2)
    sampler = samplers.paired(*(samplers.indexed(level, width) for level in data))
    draw = jax.jit(sampler)
    batches = [draw(jax.random.key(2), t) for t in range(5)]
    method = composed(dbo.oracles.saba(PROBLEM, *widths(data)), 3, steps)
    state = method.init(*(dbo.replicate(jnp.zeros(D), 3) for _ in range(2)))
    step = jax.jit(method.step)
    for batch in batches:
        state, metrics = step(jax.random.key(0), state, batch)
    want = in_numpy(*jax.tree.map(np.asarray, (data, batches)), steps)
    assert np.abs(want).max(1).min() > 1e-2
    for got, row in zip((state.x, state.y, state.z), want, strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(row, got.shape), atol=1e-12)
    show = jax.jit(jax.vmap(upper))
    shown = np.asarray(show(state.x, state.y, batches[-1].upper.data))
    np.testing.assert_allclose(metrics.upper, shown.mean(), rtol=1e-12)
    assert metrics.calls == dbo.base.Calls(gradients=3, products=2)


def test_trees_on_both_levels_are_flat_vectors_in_disguise():
    data = one_node(finite_sum("one node"))
    batch = dbo.Batch(*(pick(samples, np.array([0, 3])) for samples in data))

    def join(tree):
        return jnp.concatenate([tree["a"], tree["b"][None]])

    def fork(v):
        return {"a": v[:2], "b": v[2]}

    problem = dbo.Problem(
        *(lambda x, y, b, f=f: f(join(x), join(y), b) for f in PROBLEM)
    )
    flat = dbo.oracles.saba(PROBLEM, *widths(data))
    forked = dbo.oracles.saba(problem, *widths(data))

    @jax.jit
    def both(start, points):
        _, memory = flat.init(*start)
        _, forked_memory = forked.init(*map(fork, start))
        for x, y, z in points:
            flat_out, memory = flat.directions(None, x, y, z, memory, batch)
            forked_out, forked_memory = forked.directions(
                None, fork(x), fork(y), fork(z), forked_memory, batch
            )
        return [join(tree) for tree in forked_out], flat_out

    joined, vectors = both(point()[:2], (point(1), point(2)))
    for tree, vector in zip(joined, vectors, strict=True):
        np.testing.assert_allclose(tree, vector, atol=1e-13)


def test_one_draw_may_serve_both_levels():
    samples = one_node(draw_samples((5,), 3))
    oracle, (x, y, z) = dbo.oracles.saba(PROBLEM, 5, 5), point()
    _, memory = oracle.init(x, y)
    one, directions = pick(samples, np.array([4, 1])), jax.jit(oracle.directions)
    whole = directions(None, x, y, z, memory, one)
    split = directions(None, x, y, z, memory, dbo.Batch(one, one))
    jax.tree.map(np.testing.assert_array_equal, whole, split)


def test_other_oracles_see_the_samples_of_an_indexed_batch():
    data, (x, y, z) = one_node(finite_sum("one node")), point()
    batch = dbo.Batch(*(pick(samples, np.array([1, 2])) for samples in data))
    bare = dbo.Batch(batch.upper.data, batch.lower.data)
    for oracle in (dbo.oracles.soba(PROBLEM), dbo.oracles.penalty(PROBLEM, 5.0)):
        directions = jax.jit(oracle.directions)
        seen = directions(None, x, y, z, (), batch)
        known = directions(None, x, y, z, (), bare)
        jax.tree.map(np.testing.assert_array_equal, seen, known)


def test_inner_rounds_take_indexed_batches_too():
    data = finite_sum("three nodes")
    sampler = samplers.paired(*(samplers.indexed(level, 2) for level in data))
    batch = jax.jit(samplers.fresh_rounds(sampler, 2))(jax.random.key(0), 0)
    assert isinstance(batch, Rounds)
    channel = dbo.channels.exact(dbo.mixing.averaging(3))
    move = dbo.strategies.allreduce(channel, optax.sgd(0.1))
    phases = (dbo.algorithms.Phase(y=move, times=2), dbo.algorithms.Phase(move, z=move))
    oracle = dbo.oracles.saba(PROBLEM, *widths(data))
    method = dbo.algorithms.compose(PROBLEM, oracle, *phases)
    state = method.init(*(dbo.replicate(jnp.zeros(D), 3) for _ in range(2)))
    state, _ = jax.jit(method.step)(jax.random.key(0), state, batch)
    drawn = [set(np.ravel(part.lower.indices[..., 0, :])) for part in batch]
    known = state.memory.lower.last.gradient[0].any(-1)
    assert set(np.flatnonzero(known)) == drawn[0] | drawn[1]


def test_memory_has_the_dtypes_of_the_variables():
    x, y = jnp.zeros(2, jnp.float32), jnp.zeros(3, jnp.float16)
    _, memory = dbo.oracles.saba(PROBLEM, 4, 5).init(x, y)
    assert isinstance(memory, SabaState)
    assert isinstance(memory.lower, Table)
    shapes = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(memory.lower)]
    y_rows, x_rows = ((5, 3), "float16"), ((5, 2), "float32")
    y_mean, x_mean = ((3,), "float16"), ((2,), "float32")
    rows, means = [y_rows, y_rows, x_rows], [y_mean, y_mean, x_mean]
    assert shapes == rows + means + means


def test_in_float32_the_running_mean_stays_that_of_the_table():
    rng, eps = np.random.default_rng(0), np.finfo(np.float32).eps
    near = jnp.asarray(1 + 20 * eps * rng.random((30_000, 7)), jnp.float32)
    problem = dbo.Problem(lambda x, y, b: x * b[0], lambda x, y, b: y * b[0])
    oracle, zero = dbo.oracles.saba(problem, 7, 7), jnp.zeros((), jnp.float32)

    def draw(memory, at):
        values, j = at
        one = dbo.Indexed(j[None], values[j][None], jnp.array(7))
        return oracle.directions(None, zero, zero, zero, memory, one)[1], None

    draws = near, jnp.asarray(rng.integers(7, size=len(near)))
    scan = jax.jit(lambda memory: jax.lax.scan(draw, memory, draws)[0])
    memory = scan(oracle.init(zero, zero)[1])
    for table in (memory.upper, memory.lower):
        last, mean = table.last[0], table.mean[0]
        assert last.dtype == mean.dtype == jnp.float32
        assert abs(np.mean(last, dtype=np.float64) - mean) <= 4 * eps


def test_an_index_beyond_the_table_is_not_a_number():
    data, (x, y, z) = one_node(finite_sum("one node")), point()
    oracle = dbo.oracles.saba(PROBLEM, 6, 7)
    _, memory = oracle.init(x, y)
    batch = dbo.Batch(pick(data.upper, np.array([0])), pick(data.lower, np.array([7])))
    (d_x, d_y, _), _ = jax.jit(oracle.directions)(None, x, y, z, memory, batch)
    assert np.isnan([d_x, d_y]).all()


def _directions(upper, lower):
    oracle, (x, y, z) = dbo.oracles.saba(PROBLEM, 6, 2), point()
    memory = oracle.init(x, y)[1]
    return lambda: oracle.directions(None, x, y, z, memory, dbo.Batch(upper, lower))


_DATA = one_node(finite_sum("one node"))
_GOOD = dbo.Batch(*(pick(samples, np.array([0])) for samples in _DATA))
_LONG = pick(_DATA.lower, np.array([0, 1, 2]))
MESSAGES = {
    "no samples": (lambda: dbo.oracles.saba(PROBLEM, 0, 3), "`num_upper` .* got 0"),
    "half a sample": (lambda: dbo.oracles.saba(PROBLEM, 3, 2.5), "`num_lower` .* 2.5"),
    "bare upper": (
        _directions(_GOOD.upper.data, _GOOD.lower),
        r"upper level .* got Samples. Draw .*samplers.indexed.upper",
    ),
    "bare lower": (_directions(_GOOD.upper, None), "lower level .* got NoneType"),
    "one index": (
        _directions(_GOOD.upper._replace(indices=0), _GOOD.lower),
        r"upper level needs one index per sample .* got \(\)",
    ),
    "other length": (
        _directions(_GOOD.upper, _LONG._replace(indices=jnp.arange(2))),
        r"lower level needs one index per sample .* got \(2,\)",
    ),
    "too many": (_directions(_GOOD.upper, _LONG), "1 to num_lower=2 .* got 3"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    build, words = MESSAGES[case]
    with pytest.raises(ValueError, match=words):
        build()


def test_a_composed_method_says_how_to_draw():
    data = finite_sum("three nodes")
    method = composed(dbo.oracles.saba(PROBLEM, *widths(data)), 3, (0.1, 0.1, 0.1))
    state = method.init(*(dbo.replicate(jnp.zeros(D), 3) for _ in range(2)))
    with pytest.raises(ValueError, match=r"samplers\.indexed"):
        method.step(jax.random.key(0), state, data)


def test_the_method_is_soba_with_this_oracle():
    data, n = finite_sum("three nodes"), 3
    settings = {"mix": dbo.mixing.averaging(n), "upper_step": 0.02, "lower_step": 0.03}
    num_upper, num_lower = widths(data)
    sampler = samplers.paired(*(samplers.indexed(level, 2) for level in data))
    named = dbo.algorithms.saba(
        PROBLEM, num_upper=num_upper, num_lower=num_lower, **settings
    )
    own = composed(dbo.oracles.saba(PROBLEM, *widths(data)), n, (0.02, 0.03, 0.03))
    start = [dbo.replicate(jnp.ones(D), n) for _ in range(2)]
    batch = jax.jit(sampler)(jax.random.key(1), 0)

    def first(method):
        @jax.jit
        def run(key, batch):
            return method.step(key, method.init(*start), batch)[0]

        return run(jax.random.key(0), batch)

    got, want = first(named), first(own)
    for a, b in zip((got.x, got.y, got.z), (want.x, want.y, want.z), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-15)
