"""The NumPy twins of the server methods reproduce the golden problems."""

import functools

import numpy as np
import pytest
import reference_server as twin

STEPS = {"upper_step": 0.005, "lower_step": 0.02, "linear_step": 0.02}


# --- the bilevel toy -----------------------------------------------------------------


def test_the_bilevel_toy_is_the_recorded_one():
    toy = twin.BilevelToy(1.0)
    sums = [part.sum() for part in (toy.a, toy.slope, toy.shift, toy.target)]
    golden = [202.585126815, 83.486939404, 7.371127206, 146.794979947]
    np.testing.assert_allclose(sums, golden, rtol=0, atol=6e-10)
    for h, norm in ((0.0, 2.236067977), (1.0, 2.459368297)):
        found = twin.BilevelToy(h).norms(np.zeros((1, 20)))
        np.testing.assert_allclose(found, norm, rtol=0, atol=5e-10)


def test_the_hypergradient_of_the_toy_is_the_slope_of_its_value():
    toy = twin.BilevelToy(1.0)
    x = np.random.default_rng(1).normal(size=20)

    def value(x):
        y = toy.solution(x)
        return 0.5 * np.mean(((y - toy.target) ** 2).sum(1)) + 0.05 * x @ x

    # The value is quadratic: central differences are exact up to rounding.
    slopes = [(value(x + e) - value(x - e)) / 2 for e in np.eye(20)]
    np.testing.assert_allclose(toy.hypergradient(x), slopes, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        toy.norms(x[None]), np.linalg.norm(toy.hypergradient(x)), rtol=1e-12
    )


def test_directions_vanish_on_average_at_the_solution():
    toy = twin.BilevelToy(1.0)
    x = np.random.default_rng(1).normal(size=20)
    y, z = toy.solution(x), toy.linear_solution(x)
    rows = [toy.directions(i, 0, x, y, z) for i in range(toy.n)]
    d_x, d_y, d_z = (np.mean([row[k] for row in rows], 0) for k in range(3))
    np.testing.assert_allclose(d_x, toy.hypergradient(x), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(d_y, 0, atol=1e-12)
    np.testing.assert_allclose(d_z, 0, atol=1e-12)


SOBA = {"homogeneous": (0.0, 1.40790578e-5), "heterogeneous": (1.0, 1.26212637e-4)}


@pytest.mark.parametrize("case", SOBA)
def test_soba_without_compression_is_golden(case):
    h, golden = SOBA[case]
    toy = twin.BilevelToy(h)
    path = twin.c_soba(toy, toy.start, 6000, radius=50.0, **STEPS)
    np.testing.assert_allclose(toy.norms(path.x[-200:]).mean(), golden, rtol=1e-6)


def test_every_bilevel_method_is_soba_where_nothing_is_lost():
    toy = twin.BilevelToy(1.0)
    soba = twin.c_soba(toy, toy.start, 40, **STEPS)
    moving = twin.c_soba(toy, toy.start, 40, average=1.0, **STEPS)
    np.testing.assert_array_equal(moving.x, soba.x)
    exact = {"compress": twin.identity, **STEPS}
    for switches in ({}, {"raw": True}, {"ef21": True}):
        plain = twin.ef_soba(
            toy, toy.start, 40, delta=1.0, average=1.0, **switches, **exact
        )
        np.testing.assert_allclose(plain.x, soba.x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(plain.z, soba.z, rtol=0, atol=1e-12)
    cm = twin.c_soba(toy, toy.start, 40, average=0.1, **STEPS)
    ef = twin.ef_soba(toy, toy.start, 40, delta=0.3, average=0.1, **exact)
    np.testing.assert_allclose(ef.x, cm.x, rtol=0, atol=1e-12)


def test_an_old_average_is_one_step_late():
    toy = twin.BilevelToy(1.0)
    new = twin.c_soba(toy, toy.start, 3, average=0.1, **STEPS)
    old = twin.c_soba(toy, toy.start, 3, average=0.1, use_new=False, **STEPS)
    # The first direction of x is zero, since z starts at zero.
    assert np.any(new.x[2] != 0)
    np.testing.assert_array_equal(old.x[2], 0)
    np.testing.assert_array_equal(old.x[3], new.x[2])


def test_the_server_knows_the_mean_of_the_memories_from_messages_alone():
    toy = twin.BilevelToy(1.0)
    compress = twin.by_vector(twin.rand_k(np.random.default_rng(3), 2))
    path = twin.ef_soba(
        toy, toy.start, 60, compress=compress, delta=0.1, average=0.1, **STEPS
    )
    for level in twin.LEVELS:
        np.testing.assert_allclose(
            path.server[level], path.workers[level].mean(0), rtol=0, atol=1e-12
        )


def test_clipping_acts_beyond_the_radius_alone():
    toy = twin.BilevelToy(1.0)
    free = twin.c_soba(toy, toy.start, 200, **STEPS)
    largest = np.linalg.norm(free.z, axis=1).max()
    wide = twin.c_soba(toy, toy.start, 200, radius=1.01 * largest, **STEPS)
    np.testing.assert_array_equal(wide.x, free.x)
    tight = twin.c_soba(toy, toy.start, 200, radius=0.5 * largest, **STEPS)
    norms = np.linalg.norm(tight.z, axis=1)
    np.testing.assert_allclose(norms.max(), 0.5 * largest, rtol=1e-12)


def test_error_feedback_removes_the_floor():
    toy = twin.BilevelToy(1.0)
    compress = twin.by_vector(twin.rand_k(np.random.default_rng(100), 4))
    quick = {"upper_step": 0.05, "lower_step": 0.05, "linear_step": 0.05}
    settings = {"compress": compress, "average": 0.1, **quick}
    plain = twin.c_soba(toy, toy.start, 1000, **settings)
    ef = twin.ef_soba(toy, toy.start, 1000, delta=0.2, **settings)
    floor, reached = (toy.norms(path.x[-100:]).mean() for path in (plain, ef))
    assert reached < floor / 20


# --- multi-step compression ----------------------------------------------------------


def test_one_round_of_msc_is_the_compressor():
    v = np.random.default_rng(0).normal(size=20)

    def draw(worker, level, step, v):
        step = step[0] if isinstance(step, tuple) else step
        rng = np.random.default_rng([worker, step, ord(level)])
        return twin.rand_k(rng, 2)(v)

    once = twin.msc(draw, 9.0, 1)
    np.testing.assert_allclose(
        once(3, "y", 7, v), draw(3, "y", 7, v), rtol=1e-12, atol=0
    )


MSC = {(2, 1): 9.0, (2, 2): 4.263, (2, 5): 1.442, (10, 2): 0.333, (10, 5): 0.032}


@pytest.mark.parametrize(("k", "rounds"), MSC)
def test_msc_is_unbiased_with_the_variance_of_the_law(k, rounds):
    omega = 20 / k - 1
    np.testing.assert_allclose(twin.msc_omega(omega, rounds), MSC[k, rounds], atol=1e-3)
    rng, draws = np.random.default_rng(0), 4000
    v = rng.normal(size=20)
    compress = twin.msc(twin.by_vector(twin.rand_k(rng, k)), omega, rounds)
    found = np.array([compress(0, "x", 0, v) for _ in range(draws)])
    errors = ((found - v) ** 2).sum(1)
    spread = errors.std() / np.sqrt(draws)
    wanted = twin.msc_omega(omega, rounds) * (v**2).sum()
    assert abs(errors.mean() - wanted) < 5 * spread + 1e-12
    deviation = found.mean(0) - v
    assert np.all(np.abs(deviation) < 5 * found.std(0) / np.sqrt(draws))


# --- the diagonal toy ----------------------------------------------------------------


def test_the_diagonal_toy_is_the_recorded_one():
    toy = twin.DiagonalToy()
    found = [
        toy.a.sum(),
        toy.c.sum(),
        toy.value(toy.start),
        toy.squared_norms([toy.start])[0],
        toy.value(toy.optimum),
    ]
    golden = [513.643011598, -45.919736061, 284.430546753, 82.225651109, 253.465810904]
    np.testing.assert_allclose(found, golden, rtol=0, atol=5e-10)
    local = [(toy.gradient(i, 0, toy.optimum) ** 2).sum() for i in range(toy.n)]
    np.testing.assert_allclose(np.mean(local), 712.749982, rtol=0, atol=5e-7)


SIGN = twin.by_vector(twin.scaled_sign)
METHODS = {
    "amsgrad": twin.amsgrad,
    "cd_adam": functools.partial(twin.cd_adam, compress=SIGN),
    "ef_adam": functools.partial(twin.ef_adam, compress=SIGN),
    "naive": functools.partial(twin.naive_adam, compress=SIGN),
}
CONSTANT = {  # after 10, 50 and 200 steps
    "amsgrad": (47.3665415, 2.45952378, 3.64893e-7),
    "cd_adam": (48.5609289, 2.08217645, 2.12239e-2),
    "ef_adam": (57.5508387, 13.2336814, 0.107327),
    "naive": (53.2254799, 39.8086961, 68.9),
}
DECAYED = {"amsgrad": 2.5e-29, "cd_adam": 1.4e-6, "ef_adam": 6.2e-4, "naive": 68.8}


def within_a_factor(found, wanted, factor=3):
    return wanted / factor < found < wanted * factor


@pytest.mark.parametrize("name", METHODS)
def test_a_constant_rate_is_golden(name):
    toy = twin.DiagonalToy()
    path = METHODS[name](toy, toy.start, 200, rate=0.03)
    found = toy.squared_norms(path[[10, 50, 200]])
    np.testing.assert_allclose(found[:2], CONSTANT[name][:2], rtol=1e-6)
    assert within_a_factor(found[2], CONSTANT[name][2])


def test_with_the_decay_only_the_naive_method_stalls():
    toy = twin.DiagonalToy()
    rate = twin.two_step_decay(0.03, 2000)
    last = {}
    for name, method in METHODS.items():
        path = method(toy, toy.start, 2000, rate=rate)
        last[name] = toy.squared_norms(path[-50:]).mean()
    # The best of them stops at rounding errors, which no factor can pin.
    assert last["amsgrad"] < 1e-26
    for name in ("cd_adam", "ef_adam", "naive"):
        assert within_a_factor(last[name], DECAYED[name])
    assert last["naive"] > 1e6 * last["cd_adam"]


def test_the_decay_falls_at_a_half_and_at_three_quarters():
    rate = twin.two_step_decay(1.0, 8)
    found = [rate(step) for step in range(8)]
    np.testing.assert_allclose(found, [1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_copies_approach_a_fixed_gradient_as_recorded():
    g = np.random.default_rng(0).normal(size=50)
    np.testing.assert_allclose(np.linalg.norm(g), 6.506922, rtol=0, atol=5e-7)
    copy, norms = np.zeros(50), [np.linalg.norm(g)]
    for _ in range(60):
        error = g - copy
        pi = 1 - np.abs(error).sum() ** 2 / (50 * (error**2).sum())
        copy = copy + twin.scaled_sign(error)
        norms.append(np.linalg.norm(g - copy))
        assert norms[-1] <= np.sqrt(pi) * norms[-2] * (1 + 1e-12)
    golden = [3.860614, 0.506834, 0.205504, 0.058947]
    found = [norms[t] for t in (1, 10, 30, 60)]
    np.testing.assert_allclose(found, golden, rtol=0, atol=5e-7)


def test_errors_of_the_copies_follow_the_change_of_the_gradient():
    rng = np.random.default_rng(1)
    g, copy = np.zeros(50), np.zeros(50)
    for _ in range(4000):
        g_new = g + rng.exponential() * rng.normal(size=50)
        target = g_new - copy
        pi = 1 - np.abs(target).sum() ** 2 / (50 * (target**2).sum())
        before, change = ((g - copy) ** 2).sum(), ((g_new - g) ** 2).sum()
        copy, g = copy + twin.scaled_sign(target), g_new
        after = ((g - copy) ** 2).sum()
        np.testing.assert_allclose(after, pi * (target**2).sum(), rtol=1e-9)
        root = np.sqrt(pi)
        assert after <= (root * before + pi / (1 - root) * change) * (1 + 1e-12)


def test_the_scale_of_one_bit_adam_expands_a_sparse_vector():
    v = np.eye(50)[3]
    assert ((twin.l2_sign(v) - v) ** 2).sum() > (v**2).sum()
    assert ((twin.scaled_sign(v) - v) ** 2).sum() < (v**2).sum()
    np.testing.assert_array_equal(twin.signs(np.array([0.0, -0.0, -2.0])), [1, 1, -1])


def test_the_server_of_cd_adam_holds_the_mean_of_the_copies():
    rng = np.random.default_rng(0)
    link = twin.Markov(4, 6)
    for step in range(30):
        link.reduce(rng.normal(size=(4, 6)), step, SIGN)
    np.testing.assert_allclose(link.server, link.workers.mean(0), rtol=0, atol=1e-12)


# --- the other single-level methods --------------------------------------------------


def test_every_single_level_method_is_exact_without_compression():
    toy, settings = twin.DiagonalToy(), {"rate": 0.1, "compress": twin.identity}
    mean = toy.a.mean(0)
    x, descent = toy.start, [toy.start]
    for _ in range(20):
        x = x - 0.1 * mean * (x - toy.optimum)
        descent.append(x)
    for method in (twin.ef21, twin.ef14):
        found = method(toy, toy.start, 20, **settings)
        np.testing.assert_allclose(found, descent, rtol=1e-10, atol=1e-12)
    adam = twin.amsgrad(toy, toy.start, 20, rate=0.1)
    for method in (twin.cd_adam, twin.ef_adam):
        found = method(toy, toy.start, 20, **settings)
        np.testing.assert_allclose(found, adam, rtol=1e-10, atol=1e-12)


EF21 = {
    "sgd": {},
    "sgdm": {"momentum": 0.3},
    "dense start": {"dense_start": True},
}


@pytest.mark.parametrize("case", EF21)
def test_differences_reach_the_optimum_at_a_constant_rate(case):
    toy = twin.DiagonalToy()
    compress = twin.by_vector(twin.top_k(10))
    path = twin.ef21(toy, toy.start, 1200, rate=0.03, compress=compress, **EF21[case])
    assert toy.squared_norms(path[-1:])[0] < 1e-12


def test_residuals_of_unlike_workers_leave_a_floor_that_falls_with_the_rate():
    toy = twin.DiagonalToy()
    compress = twin.by_vector(twin.top_k(10))

    def floor(rate, steps):
        path = twin.ef14(toy, toy.start, steps, rate=rate, compress=compress)
        return toy.squared_norms(path[-100:]).mean()

    coarse, fine = floor(0.1, 300), floor(0.02, 1000)
    assert 1e-8 < fine < coarse / 4


def test_one_bit_adam_is_adam_until_it_freezes():
    toy = twin.DiagonalToy()
    compress = twin.by_vector(twin.l2_sign)
    settings = {"rate": 0.03, "compress": compress}
    dense = twin.one_bit_adam(toy, toy.start, 30, freeze=30, **settings)
    mixed = twin.one_bit_adam(toy, toy.start, 30, freeze=20, **settings)
    np.testing.assert_array_equal(mixed[:21], dense[:21])
    assert np.any(mixed[21] != dense[21])
    # The mean gradient is linear in x, so that the first step is known by hand.
    g = np.mean([toy.gradient(i, 0, toy.start) for i in range(toy.n)], 0)
    first = -0.03 * 0.1 * g / (np.sqrt(0.001 * g**2) + 1e-8)
    np.testing.assert_allclose(dense[1], first, rtol=1e-12)
    later = twin.one_bit_adam_on_gradients(toy, toy.start, 30, freeze=20, **settings)
    # Corrected moments make a first step of the length of the rate.
    np.testing.assert_allclose(np.abs(later[1]), 0.03, rtol=1e-6)


def test_frozen_moments_and_exact_messages_are_momentum_scaled_once():
    toy = twin.DiagonalToy()
    path = twin.one_bit_adam(
        toy, toy.start, 800, freeze=50, rate=0.02, compress=twin.identity
    )
    assert toy.squared_norms(path[-1:])[0] < 1e-6


class MatrixToy:
    """Workers that pull a matrix to targets of their own; the mean is of rank two."""

    n, shape = 4, (6, 5)

    def __init__(self):
        rng = np.random.default_rng(0)
        self.mean = rng.normal(size=(6, 2)) @ rng.normal(size=(2, 5))
        apart = rng.normal(size=(self.n, *self.shape))
        self.targets = self.mean + apart - apart.mean(0)

    def gradient(self, worker, step, x):
        del step
        return x - self.targets[worker]


def test_a_power_iteration_of_enough_rank_is_exact():
    toy = MatrixToy()
    q = np.random.default_rng(1).normal(size=(5, 2))
    update, _ = twin.power_round(toy.targets, q)
    np.testing.assert_allclose(update, toy.mean, rtol=1e-9, atol=1e-10)
    p = twin.orthonormalised(np.random.default_rng(2).normal(size=(6, 3)))
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2])
def test_power_sgd_reaches_the_mean_target(rank):
    toy = MatrixToy()
    q = np.random.default_rng(1).normal(size=(5, rank))
    path = twin.power_sgd(toy, np.zeros(toy.shape), 600, rate=0.1, q=q)
    np.testing.assert_allclose(path[-1], toy.mean, atol=1e-3)
