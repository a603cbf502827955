"""Linear solvers against NumPy, and what they do where there is no solution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax.hypergradients import linear

RNG = np.random.default_rng(3)
SQUARE = RNG.normal(size=(5, 5))
POSITIVE = SQUARE @ SQUARE.T + np.eye(5)
INDEFINITE = np.diag([3.0, 2.0, 1.0, -1.0, -2.0]) + 0.1 * (SQUARE + SQUARE.T)
SINGULAR = np.diag([1.0, 2.0, 3.0, 4.0, 0.0])
RIGHT = RNG.normal(size=5)
STEP = 1.0 / np.linalg.norm(POSITIVE, 2)

SOLVERS = {
    "cg": linear.cg(12),
    "normal_cg": linear.normal_cg(20),
    "gmres": linear.gmres(5, 2),
    "bicgstab": linear.bicgstab(20),
    "neumann": linear.neumann(4000, STEP),
    "dense": linear.dense(),
}
ANY_MATRIX = ("normal_cg", "gmres", "bicgstab", "dense")
MATRICES = {
    "positive": POSITIVE,
    "indefinite": INDEFINITE,
    "square": SQUARE,
    "singular": SINGULAR,
    "nan": np.full((5, 5), np.nan),
}


def solve(solver, matrix, b, start=None):
    """One compiled solve with a matrix on one vector."""

    def run(matrix, b, start):
        return solver.solve(lambda v: jnp.dot(matrix, v, precision="highest"), b, start)

    return jax.jit(run)(jnp.asarray(matrix), jnp.asarray(b), start)


@functools.cache
def solutions(name):
    """Every matrix of the table with one b, and one with zero, in one program."""

    def run(matrix, b):
        return SOLVERS[name].solve(lambda v: matrix @ v, b)

    matrices = jnp.stack([*MATRICES.values(), POSITIVE])
    rights = jnp.stack([RIGHT] * len(MATRICES) + [np.zeros(5)])
    found = jax.jit(jax.vmap(run))(matrices, rights)
    rows = [jax.tree.map(lambda a, i=i: a[i], found) for i in range(len(matrices))]
    return dict(zip([*MATRICES, "zero"], rows, strict=True))


def residual(matrix, z):
    with np.errstate(over="ignore"):
        return np.linalg.norm(matrix @ z - RIGHT) / np.linalg.norm(RIGHT)


@pytest.mark.parametrize("name", SOLVERS)
def test_regular_systems_are_solved(name):
    for kind in ("positive", "indefinite", "square"):
        if kind == "positive" or name in ANY_MATRIX:
            found, matrix = solutions(name)[kind], MATRICES[kind]
            truth = np.linalg.solve(matrix, RIGHT)
            np.testing.assert_allclose(found.z, truth, rtol=0, atol=1e-10)
            assert found.ok
            assert found.residual < 1e-10


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_right_hand_side_gives_exactly_zero(name):
    found = solutions(name)["zero"]
    assert not found.z.any()
    assert found.ok
    assert found.residual == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_bad_systems_are_flagged_or_told_by_the_residual(name):
    found = solutions(name)
    assert all(jnp.isfinite(solution.z).all() for solution in found.values())
    for kind in ("indefinite", "singular"):
        told, true = found[kind].residual, residual(MATRICES[kind], found[kind].z)
        np.testing.assert_allclose(told, true, rtol=1e-6, atol=1e-12)
    assert not found["nan"].ok
    assert bool(found["indefinite"].ok) is (name in ANY_MATRIX)
    # A singular system leaves at least b's share outside the range.
    outside = abs(RIGHT[-1]) / np.linalg.norm(RIGHT)
    assert found["singular"].residual > outside * (1 - 1e-12)
    assert name not in ("cg", "dense") or not found["singular"].ok


@pytest.mark.parametrize("name", ["cg", "normal_cg", "dense"])
def test_short_floats_lose_no_digit_at_either_end_of_their_range(name):
    sizes = jnp.array([1e-30, 1e25], jnp.float32)
    matrix, b = jnp.asarray(POSITIVE, jnp.float32), jnp.asarray(RIGHT, jnp.float32)

    def run(size):
        return SOLVERS[name].solve(lambda v: matrix @ v, size * b)

    found = jax.jit(jax.vmap(run))(sizes)
    truth = np.linalg.solve(POSITIVE, RIGHT)
    assert found.z.dtype == jnp.float32
    assert found.ok.all()
    for z, size in zip(found.z, sizes, strict=True):
        np.testing.assert_allclose(z / size, truth, rtol=0, atol=1e-4)


def test_cg_keeps_the_last_iterate_before_a_negative_curvature():
    # The first direction is b with curvature 1; the next one bends down.
    matrix, b = np.diag([2.0, -1.0]), np.array([2.0, 1.0])
    solution = solve(linear.cg(9), matrix, b)
    alpha = b @ b / (b @ matrix @ b)
    np.testing.assert_allclose(solution.z, alpha * b, rtol=1e-14)
    assert not solution.ok
    assert solution.steps == 2  # the one that was refused is paid for


def test_least_squares_is_what_normal_cg_makes_of_a_singular_system():
    matrix = np.outer([1.0, 2.0, 3.0], [1.0, -1.0, 1.0]) + np.diag([1.0, 0, 0])
    b = np.array([1.0, -1.0, 2.0])
    solution = solve(linear.normal_cg(6), matrix, b)
    np.testing.assert_allclose(
        solution.z, np.linalg.lstsq(matrix, b)[0], rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_cg_steps_minimise_over_the_krylov_space(steps):
    solution = solve(linear.cg(steps), POSITIVE, RIGHT)
    powers = [np.linalg.matrix_power(POSITIVE, k) @ RIGHT for k in range(steps)]
    space = np.linalg.qr(np.stack(powers, axis=1))[0]
    best = space @ np.linalg.solve(space.T @ POSITIVE @ space, space.T @ RIGHT)
    np.testing.assert_allclose(solution.z, best, rtol=0, atol=1e-9)
    gap = np.linalg.norm(POSITIVE @ best - RIGHT) / np.linalg.norm(RIGHT)
    np.testing.assert_allclose(solution.residual, gap, rtol=1e-6)
    assert solution.steps == solution.products == steps


def test_damping_is_added_and_the_residual_is_that_of_the_plain_system():
    solution = solve(linear.cg(9, damping=2.5), POSITIVE, RIGHT)
    z = np.linalg.solve(POSITIVE + 2.5 * np.eye(5), RIGHT)
    np.testing.assert_allclose(solution.z, z, rtol=0, atol=1e-10)
    gap = np.linalg.norm(POSITIVE @ z - RIGHT) / np.linalg.norm(RIGHT)
    np.testing.assert_allclose(solution.residual, gap, rtol=1e-9)


@pytest.mark.parametrize("steps", [0, 7])
def test_neumann_is_the_sum_of_its_terms(steps):
    term, total = RIGHT, RIGHT
    for _ in range(steps):
        term = term - STEP * POSITIVE @ term
        total = total + term
    solution = solve(linear.neumann(steps, STEP), POSITIVE, RIGHT)
    np.testing.assert_allclose(solution.z, STEP * total, rtol=1e-12)
    gap = np.linalg.norm(STEP * POSITIVE @ total - RIGHT) / np.linalg.norm(RIGHT)
    np.testing.assert_allclose(solution.residual, gap, rtol=1e-9)
    assert solution.products == steps + 1


def test_neumann_tells_that_it_diverges_even_beyond_the_range_of_floats():
    for steps, finite_sum in ((3, True), (4000, False)):
        solution = solve(linear.neumann(steps, 3 * STEP), POSITIVE, RIGHT)
        assert not solution.ok
        assert jnp.isfinite(solution.z).all()
        assert bool(solution.z.any()) is finite_sum


SHORT = {"cg": linear.cg(3), "neumann": linear.neumann(2, STEP)}


@pytest.mark.parametrize("name", SHORT)
def test_products_are_counted_as_they_are_made(name):
    made = []

    def matvec(v):
        jax.debug.callback(lambda _: made.append(1), v[0])
        return POSITIVE @ v

    for start, more in ((None, 0), (jnp.ones(5), 1)):
        made.clear()
        solution = SHORT[name].solve(matvec, jnp.asarray(RIGHT), start)
        jax.effects_barrier()
        assert solution.products == len(made) == SHORT[name].products + more


@pytest.mark.parametrize("name", ["cg", "normal_cg"])
def test_tolerance_and_a_good_start_save_steps(name):
    truth = np.linalg.solve(POSITIVE, RIGHT)

    def run(tol, start):
        solver = getattr(linear, name)(50, tol=tol)
        return solver.solve(lambda v: POSITIVE @ v, jnp.asarray(RIGHT), start)

    starts = jnp.stack([np.zeros(5), np.zeros(5), truth + 1e-13])
    found = jax.jit(jax.vmap(run))(jnp.array([0.5, 1e-9, 1e-9]), starts)
    rough, fine, warm = found.steps.tolist()
    assert rough < fine
    assert warm == 0
    np.testing.assert_allclose(found.z[2], truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["normal_cg", "dense"])
def test_trees_of_mixed_dtypes_keep_them(name):
    b = {"a": jnp.ones((2, 1), jnp.float32), "b": (jnp.ones(()), jnp.ones(2))}
    scale = {"a": 2.0, "b": (3.0, 4.0)}

    def matvec(v):
        return jax.tree.map(lambda s, a: jnp.asarray(s, a.dtype) * a, scale, v)

    solution = jax.jit(lambda b: SOLVERS[name].solve(matvec, b))(b)
    assert jax.tree.map(jnp.shape, solution.z) == jax.tree.map(jnp.shape, b)
    assert solution.z["a"].dtype == jnp.float32
    for s, z in zip(*map(jax.tree.leaves, (scale, solution.z)), strict=True):
        np.testing.assert_allclose(z, 1 / s, rtol=1e-5)


def test_many_systems_at_once_stop_on_their_own():
    matrices = jnp.stack([jnp.eye(5), POSITIVE])

    def one(matrix):
        return linear.cg(9, tol=1e-10).solve(lambda v: matrix @ v, jnp.asarray(RIGHT))

    together = jax.jit(jax.vmap(one))(matrices)
    assert together.steps.tolist() == [1, 5]
    np.testing.assert_allclose(
        together.z[1], np.linalg.solve(POSITIVE, RIGHT), atol=1e-10
    )


BAD = {
    "cg": (lambda: linear.cg(0), r"`cg` needs a whole number max_steps >= 1, got 0"),
    "tol": (lambda: linear.cg(2, tol=-1.0), r"tol >= 0 and finite, got -1.0"),
    "damping": (lambda: linear.cg(2, damping=-1.0), r"`cg` needs damping >= 0"),
    "normal_cg": (lambda: linear.normal_cg(1.5), r"whole number max_steps >= 1"),
    "gmres": (lambda: linear.gmres(2, 0), r"whole number cycles >= 1"),
    "restart": (lambda: linear.gmres(0), r"whole number restart >= 1"),
    "bicgstab": (lambda: linear.bicgstab(0), r"whole number max_steps >= 1"),
    "neumann": (lambda: linear.neumann(-1, 0.1), r"whole number steps >= 0"),
    "step_size": (lambda: linear.neumann(1, 0.0), r"`neumann` needs step_size > 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_settings_are_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
