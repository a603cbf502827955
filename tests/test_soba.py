"""SOBA with a server and its compressed descendants: loops, limits, golden values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_server as slow
import toys

import dbojax as dbo

A, C = dbo.algorithms, dbo.compressors
N, D = 4, 6
STEPS = {"upper_step": 0.05, "lower_step": 0.1, "linear_step": 0.08}
# Not unbiased at all: what is compared below are the update lines, not the laws.
TOP = C.top_k(2)._replace(omega=lambda d: 1.5)
OMEGA = {"x": 1.5, "y": 1.5, "z": 1.5}


def _task():
    return dbo.tasks.worker_quadratic(n=N, d=D, seed=3)


class Workers:
    """The task's directions, worker by worker, in NumPy."""

    def __init__(self, task):
        self.n = task.n
        self.a, self.b, self.c = (np.asarray(leaf) for leaf in task.batch.lower)
        self.t = np.asarray(task.batch.upper)

    def directions(self, i, step, x, y, z):
        del step
        d_y = self.a[i] @ y - self.b[i] @ x - self.c[i]
        d_z = self.a[i] @ z - (y - self.t[i])
        return 0.1 * x + self.b[i].T @ z, d_y, d_z


def _method(name, task, compressor=TOP, mix=None, **settings):
    mix = dbo.mixing.averaging(task.n) if mix is None else mix
    levels = {} if name in ("soba", "ma_soba") else dict.fromkeys(LEVELS, compressor)
    return getattr(A, name)(task.problem, mix=mix, **levels, **(STEPS | settings))


LEVELS = ("upper", "lower")
TOP_LOOP = slow.by_vector(slow.top_k(2))
SERVER_AVERAGE = {
    "average": 1.0,
    "upper_step": optax.chain(optax.ema(0.7, debias=False), optax.sgd(0.05)),
}
# name: (factory, its settings, loop, its settings)
LOOPS = {
    "soba": ("soba", {}, slow.c_soba, {}),
    "ma_soba": (
        "ma_soba",
        {"average": 0.3},
        slow.c_soba,
        {"average": 0.3, "use_new": False},
    ),
    "c_soba": ("c_soba", {}, slow.c_soba, {"compress": TOP_LOOP}),
    "cm_soba": (
        "cm_soba",
        {"average": 0.3},
        slow.c_soba,
        {"compress": TOP_LOOP, "average": 0.3},
    ),
    "cm_soba, old average": (
        "cm_soba",
        {"average": 0.3, "new_average": False},
        slow.c_soba,
        {"compress": TOP_LOOP, "average": 0.3, "use_new": False},
    ),
    "c_soba, clipped": (
        "c_soba",
        {"clip": 0.3},
        slow.c_soba,
        {"compress": TOP_LOOP, "radius": 0.3},
    ),
    "c_soba-msc": (
        "c_soba",
        {"compressor": C.multi_step(TOP, 3)},
        slow.c_soba,
        {"compress": slow.msc(TOP_LOOP, 1.5, 3)},
    ),
    "ef_soba": (
        "ef_soba",
        {"average": 0.3},
        slow.ef_soba,
        {"compress": TOP_LOOP, "average": 0.3, "delta": 0.4},
    ),
    "ef_soba, average at the server": (
        "ef_soba",
        SERVER_AVERAGE,
        slow.ef_soba,
        {"compress": TOP_LOOP, "average": 0.3, "delta": 0.4, "raw": True},
    ),
    "ef_soba, new memory": (
        "ef_soba",
        {"average": 0.3, "gain": None, "rate": 0.7},
        slow.ef_soba,
        {"compress": TOP_LOOP, "average": 0.3, "delta": 0.7, "ef21": True},
    ),
    "ef_soba-msc": (
        "ef_soba",
        {"average": 0.3, "compressor": C.multi_step(TOP, 3)},
        slow.ef_soba,
        {
            "compress": slow.msc(TOP_LOOP, 1.5, 3),
            "average": 0.3,
            "delta": 1 / (1 + slow.msc_omega(1.5, 3)),
        },
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_five_steps_equal_the_loop_over_workers(name):
    task = _task()
    factory, settings, loop, loop_settings = LOOPS[name]
    state, _ = toys.run(_method(factory, task, **settings), task, 5)
    start = [np.asarray(v) for v in (task.x0, task.y0, task.y0)]
    visited = loop(Workers(task), start, 5, **(STEPS | loop_settings))
    for got, want in zip((state.x, state.y, state.z), visited[:3], strict=True):
        np.testing.assert_allclose(got, np.tile(want[-1], (N, 1)), atol=1e-12)
    for row in (state.x, state.y, state.z):
        np.testing.assert_array_equal(row, np.broadcast_to(row[:1], row.shape))


def test_nothing_left_out_makes_c_soba_soba_bit_for_bit():
    task = _task()
    want, _ = toys.run(_method("soba", task), task, 40)
    got, _ = toys.run(_method("c_soba", task, C.identity()), task, 40)
    for a, b in zip((got.x, got.y, got.z), (want.x, want.y, want.z), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_left_out_makes_ef_soba_cm_soba():
    task = _task()
    want, _ = toys.run(_method("cm_soba", task, C.identity()), task, 40)
    got, _ = toys.run(_method("ef_soba", task, C.identity()), task, 40)
    for a, b in zip((got.x, got.y, got.z), (want.x, want.y, want.z), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    average, _ = toys.run(_method("ma_soba", task, new_average=True), task, 40)
    np.testing.assert_array_equal(want.x, average.x)


def test_a_wide_clip_never_acts_and_a_narrow_one_does():
    task = _task()
    free, _ = toys.run(_method("soba", task), task, 300)
    wide, _ = toys.run(_method("soba", task, clip=50.0), task, 300)
    np.testing.assert_array_equal(free.z, wide.z)
    length = float(jnp.linalg.norm(free.z[0]))
    narrow, _ = toys.run(_method("soba", task, clip=length / 2), task, 300)
    assert float(jnp.linalg.norm(narrow.z[0])) == pytest.approx(length / 2, rel=1e-12)


def test_with_y_and_z_converged_x_moves_along_the_slope_of_the_value():
    """Against central differences of the closed form, at a point of no meaning."""
    task = _task()
    x = jnp.asarray(np.linspace(-1.0, 2.0, D))
    task = task._replace(x0=x)
    state, _ = toys.run(_method("soba", task, upper_step=0.0), task, 1000)
    workers, point = Workers(task), [np.asarray(v[0]) for v in state[:3]]
    direction = np.mean([workers.directions(i, 0, *point)[0] for i in range(N)], 0)
    steps = 1e-5 * np.eye(D)
    value = jax.jit(jax.vmap(task.exact.value))
    at = np.asarray(x)[None]
    slope = (np.asarray(value(at + steps)) - value(at - steps)) / 2e-5
    np.testing.assert_allclose(direction, slope, rtol=1e-7, atol=1e-8)


# --- golden values, section 6.1 of the specification -------------------------------

GOLDEN_STEPS = 6000
RANDOM = C.random_k(2)
GOLDEN = {"upper_step": 0.005, "lower_step": 0.02, "linear_step": 0.02, "clip": 50.0}
AT_SERVER = {
    "average": 1.0,
    "upper_step": optax.chain(optax.ema(0.9, debias=False), optax.sgd(0.005)),
}
# name: (factory, settings, mean norm if alike, range of it over seeds if not)
ROWS = {
    "soba": ("soba", {}, 1.4e-5, (1.26e-4, 1.85e-4)),
    "c_soba": ("c_soba", {}, 1.4e-5, (0.083, 0.130)),
    "cm_soba": ("cm_soba", {}, 1.1e-5, (0.108, 0.123)),
    "cm_soba-msc": (
        "cm_soba",
        {"compressor": C.multi_step(RANDOM, 10)},
        1.1e-5,
        (1.9e-2, 2.6e-2),
    ),
    "ef_soba": ("ef_soba", {}, 1.1e-5, (1.1e-4, 1.7e-4)),
    "ef_soba, average at the server": ("ef_soba", AT_SERVER, 1.1e-5, (1.1e-4, 1.7e-4)),
    "ef_soba, new memory": ("ef_soba", {"gain": None}, 8.7e-6, (1.0e-4, 1.5e-4)),
    "ef_soba-msc": (
        "ef_soba",
        {"compressor": C.multi_step(RANDOM, 5)},
        1.1e-5,
        (1.1e-4, 1.7e-4),
    ),
}
# Alike with seed 0, then different with seeds 0, 1 and 2.
PROBLEMS = [(0.0, 0), (1.0, 0), (1.0, 1), (1.0, 2)]


def _floors(name):
    """Mean norm of the last 200 iterates on each of the problems, in one program."""
    factory, settings, *_ = ROWS[name]
    tasks = [
        dbo.tasks.worker_quadratic(heterogeneity=h, seed=seed) for h, seed in PROBLEMS
    ]
    settings = {"compressor": RANDOM} | GOLDEN | settings
    method = _method(factory, tasks[0], **settings)
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *(t.batch for t in tasks))

    def run(batch, key):
        a, b, c = (leaf.mean(0) for leaf in batch.lower)
        slope, shift = jnp.linalg.solve(a, b), jnp.linalg.solve(a, c)

        def step(state, key):
            state, _ = method.step(key, state, batch)
            x = state.x[0]
            miss = slope @ x + shift - batch.upper.mean(0)
            return state, jnp.linalg.norm(0.1 * x + slope.T @ miss)

        keys = jax.random.split(key, GOLDEN_STEPS)
        start = toys.start(tasks[0], method)
        return jax.lax.scan(step, start, keys)[1][-200:].mean()

    keys = jnp.stack([jax.random.key(seed) for _, seed in PROBLEMS])
    floors = jax.jit(jax.vmap(run), compiler_options=toys.THOROUGH)
    return np.asarray(floors(batches, keys))


def test_golden_problems_have_their_fingerprints():
    task = dbo.tasks.worker_quadratic()
    a = np.asarray(task.batch.lower.a)
    b = np.linalg.solve(a, np.asarray(task.batch.lower.b))
    start = np.linalg.solve(a, np.asarray(task.batch.lower.c)[..., None])
    sums = [v.sum() for v in (a, b, start, np.asarray(task.batch.upper))]
    want = [202.585126817, 83.486939404, 7.371127206, 146.794979947]
    np.testing.assert_allclose(sums, want, rtol=1e-9)
    for h, norm in ((0.0, 2.236067977), (1.0, 2.459368297)):
        task = dbo.tasks.worker_quadratic(heterogeneity=h)
        start = np.linalg.norm(jax.jit(task.exact.hypergradient)(task.x0))
        assert float(start) == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_golden_floors(name):
    alike, different = ROWS[name][2:]
    floors = _floors(name)
    assert alike / 1.5 < floors[0] < alike * 1.5
    assert (different[0] / 1.5 < floors[1:]).all()
    assert (floors[1:] < different[1] * 1.5).all()
    if name == "soba":
        np.testing.assert_allclose(floors[:2], [1.40790578e-5, 1.26212637e-4], 1e-6)
    if name.startswith("ef_soba"):
        # C-SOBA's floor on the same problems is at least 0.083 / 1.5.
        assert (100 * floors[1:] < ROWS["c_soba"][3][0] / 1.5).all()


# --- participation, bytes, bad input ------------------------------------------------


@pytest.mark.parametrize("name", ["soba", "c_soba", "ef_soba"])
def test_absent_workers_keep_their_memories(name):
    task = _task()
    method = _method(name, task, C.random_k(3), participants=2)

    @jax.jit
    def step(key):
        before = toys.start(task, method)
        before = before._replace(z=jnp.ones_like(before.z))  # or x would stand still
        return method.step(key, before, task.batch)

    after, metrics = jax.tree.map(np.asarray, step(jax.random.key(0)))
    if name == "ef_soba":
        for level in "xyz":
            memory = after.strategies[level]
            memory = memory.strategy if level == "x" else memory
            moved = np.asarray(memory.channel.up.sender).any(axis=1)
            assert moved.sum() == 2
            np.testing.assert_allclose(
                memory.channel.up.receiver,
                memory.channel.up.sender.mean(0),
                atol=1e-15,
            )
        assert np.asarray(after.strategies["x"].average).any(axis=1).sum() == 2
    sent = metrics.traffic
    assert sent.total == 2 * (sent.message + sent.down)
    all_of_them = _method(name, task, C.random_k(3))
    assert _traffic(all_of_them, task).total == 2 * sent.total


def test_half_of_the_workers_still_solve_the_problem():
    """With memories and unbiased differences, sampling workers leaves no floor."""
    task = dbo.tasks.worker_quadratic(n=N, d=D, heterogeneity=0.3, seed=3)
    steps = dict.fromkeys(("upper_step", "lower_step", "linear_step"), 0.02)
    method = _method("ef_soba", task, C.random_k(3), participants=2, **steps)
    _, norms = toys.hypergradient_norms(method, task, 6000)
    assert np.isfinite(norms).all()
    assert norms[-1] < 1e-10


def _traffic(method, task):
    """Of one step, traced and not run."""
    state = jax.eval_shape(lambda: toys.start(task, method))
    key = jax.random.key(0)
    return jax.eval_shape(method.step, key, state, task.batch)[1].traffic


def test_bytes_are_three_messages_up_and_all_variables_down():
    task = _task()
    k = 3
    up, down = 3 * (8 * k + 8), 8 * (D + 2 * D)
    for name in ("c_soba", "cm_soba", "ef_soba"):
        method = _method(name, task, C.random_k(k))
        whole = dbo.Traffic(up, N * (up + down), rounds=2, down=down)
        assert _traffic(method, task) == whole
        method = _method(name, task, C.multi_step(C.random_k(k), 4))
        assert _traffic(method, task).message == 4 * up
        method = _method(name, task, C.random_k(k), downlink=C.random_k(k))
        assert _traffic(method, task).down == up
    plain = _traffic(_method("soba", task), task)
    assert (plain.message, plain.down) == (down, down)


@pytest.mark.parametrize("new", [True, False])
def test_averages_keep_types_and_digits(new):
    """A weight in a wider type, and steps of the average below a bfloat16's digits."""
    task = _task()
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), task.batch)
    start = [dbo.replicate(v.astype(jnp.bfloat16), N) for v in (task.x0, task.y0)]
    weight, settings = np.float64(1e-3), {"new_average": new}
    for name, extra in (("cm_soba", settings), ("ma_soba", settings), ("ef_soba", {})):
        method = _method(name, task, C.identity(), average=weight, **extra)
        state = jax.eval_shape(method.init, *start)
        after, _ = jax.eval_shape(method.step, jax.random.key(0), state, short)
        for a, b in zip(*map(jax.tree.leaves, (state, after)), strict=True):
            assert a.dtype == b.dtype
    average = dbo.strategies.moving_average(
        dbo.strategies.allreduce(
            dbo.channels.server(dbo.mixing.averaging(N)), optax.sgd(0.0)
        ),
        weight,
    )
    v = jnp.ones((N, 1), jnp.bfloat16)
    move = jax.jit(average.update)
    state = average.init(v)
    for _ in range(1000):
        _, state, _ = move(jax.random.key(0), v, v, state)
    np.testing.assert_allclose(state.average, 1 - 0.999**1000, rtol=1e-4)


def test_bad_input_says_what_to_write():
    task = _task()
    for name in ("c_soba", "cm_soba"):
        with pytest.raises(ValueError, match=f"`{name}` needs an unbiased compressor"):
            _method(name, task, C.top_k(2))
        with pytest.raises(TypeError, match="must be a Compressor"):
            _method(name, task, 0.1)
    with pytest.raises(ValueError, match="takes its rate from `omega`"):
        _method("ef_soba", task, C.sign())
    ring = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(N)))
    with pytest.raises(ValueError, match=r"needs `dbo.mixing.averaging"):
        _method("soba", task, mix=ring)
    for participants in (0, 2.5):
        with pytest.raises(ValueError, match="whole number of workers, at least one"):
            _method("soba", task, participants=participants)
    method = _method("soba", task, participants=N + 1)
    with pytest.raises(ValueError, match=f"whole number from 1 to {N}"):
        method.step(jax.random.key(0), toys.start(task, method), task.batch)
    for average in (0, 1.5):
        with pytest.raises(ValueError, match=r"in \(0, 1\]|0 < weight <= 1"):
            _method("cm_soba", task, C.random_k(2), average=average)
    for clip in (-1.0, np.float32(-1)):
        with pytest.raises(ValueError, match="radius > 0"):
            _method("soba", task, clip=clip)
    mean, oracle = dbo.mixing.averaging(N), dbo.oracles.soba(task.problem)
    exact = dbo.strategies.allreduce(dbo.channels.exact(mean), optax.sgd(0.1))
    tracking = dbo.strategies.gradient_tracking(
        dbo.channels.server(mean), optax.sgd(0.1)
    )
    diffusion = dbo.strategies.diffusion_atc(dbo.channels.server(mean), optax.sgd(0.1))
    for strategy, match in (
        (exact, r"takes no mask.* `participants`.*channels\.server"),
        (tracking, r"tracking needs all nodes.* `participants`"),
        (diffusion, r"Diffusion needs all nodes.* `participants`"),
    ):
        phase = A.Phase(x=strategy, y=strategy, z=strategy)
        method = A.compose(task.problem, oracle, phase, participants=2)
        with pytest.raises(ValueError, match=match):
            method.step(jax.random.key(0), toys.start(task, method), task.batch)
    method = _method("ef_soba", task, C.random_k(2))
    with pytest.raises(ValueError, match="holds 4 nodes on axis 0 and `y`"):
        method.init(dbo.replicate(task.x0, 4), dbo.replicate(task.y0, 3))
