"""The spectral solver against closed forms, and the inverse problems on top of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp

import dbojax as dbo
from dbojax.tasks import pde, spectral

EQUATIONS = {
    "burgers": spectral.burgers(),
    "allen_cahn": spectral.allen_cahn(),
    "kdv": spectral.kdv(),
}


def relative(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def solved(equation, nu, points, steps, **settings):
    def run(nu):
        return spectral.solve(equation, nu, points, steps, **settings)

    return np.asarray(jax.jit(run)(nu))


# --- closed forms --------------------------------------------------------------------


def cole_hopf(nu, t, s):
    """Burgers' solution from a sine wave, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(80)
    origin = s[:, None] - np.sqrt(4 * nu * t) * nodes[None, :]
    kernel = weights[None, :] * np.exp(-np.cos(np.pi * origin) / (2 * np.pi * nu))
    return -(kernel * np.sin(np.pi * origin)).sum(1) / kernel.sum(1)


def test_burgers_equals_the_cole_hopf_formula():
    u = solved(EQUATIONS["burgers"], 0.05, 128, 120, frames=4)
    s = np.asarray(spectral.grid(128))
    for i in range(1, 5):
        assert relative(u[i], cole_hopf(0.05, i / 4, s)) < 1e-7


def test_a_soliton_of_kdv_travels_without_change_of_form():
    nu, speed = 2e-3, 1.0

    def soliton(s):
        around = (s + 1.0) % 2 - 1
        width = 2 * np.sqrt(nu / speed)
        return 3 * speed / jnp.cosh(around / width) ** 2

    # The mean of u carries waves along, so the whole moves as on an endless line.
    equation = EQUATIONS["kdv"]._replace(start=lambda s: soliton(s + 0.5))
    u = solved(equation, nu, 128, 800)
    moved = soliton(np.asarray(spectral.grid(128)) + 0.5 - speed)
    assert relative(u[-1], moved) < 1e-5


@pytest.mark.parametrize("steps", [1, 7])
def test_without_a_source_the_modes_are_exact_in_any_number_of_steps(steps):
    waves = EQUATIONS["kdv"]._replace(
        start=lambda s: jnp.sin(jnp.pi * s) + jnp.cos(3 * jnp.pi * s),
        linear=lambda kappa, nu: nu * kappa**2 - kappa,
        source=lambda s, v: jnp.zeros_like(v),
    )
    s, nu = np.asarray(spectral.grid(32)), 0.03
    sine = np.exp(-nu * np.pi**2) * np.sin(np.pi * (s - 1))
    cosine = np.exp(-nu * 9 * np.pi**2) * np.cos(3 * np.pi * (s - 1))
    u = solved(waves, nu, 32, steps)
    np.testing.assert_allclose(u[-1], sine + cosine, atol=1e-13)


def test_allen_cahn_without_diffusion_is_the_logistic_flow():
    u = solved(EQUATIONS["allen_cahn"], 0.0, 72, 900, dealias=False)
    growth = np.exp(5.0)
    exact = u[0] * growth / np.sqrt(1 + u[0] ** 2 * (growth**2 - 1))
    np.testing.assert_allclose(u[-1], exact, atol=1e-8)


def finite_differences(cells, nu):
    """Allen-Cahn's last state on a grid with both ends, of second order in space."""
    s = np.linspace(-1, 1, cells + 1)

    def flow(t, u):
        slope = 5 * (u - u**3)
        slope[1:-1] += nu * (u[2:] - 2 * u[1:-1] + u[:-2]) * (cells / 2) ** 2
        slope[[0, -1]] = 0
        return slope

    begin = s**2 * np.cos(np.pi * s)
    return solve_ivp(flow, (0, 1), begin, method="LSODA", rtol=1e-7, atol=1e-9).y[:, -1]


def test_allen_cahn_keeps_its_boundary_values_and_is_what_differences_approach():
    u = solved(EQUATIONS["allen_cahn"], 0.01, 100, 90, frames=3, dealias=False)
    np.testing.assert_allclose(u[:, 0], -1, atol=1e-13)
    coarse, fine = (
        relative(finite_differences(cells, 0.01)[: -1 : cells // 50], u[-1, ::2])
        for cells in (100, 200)
    )
    assert fine < 1e-3
    assert 1.9 < np.log2(coarse / fine) < 2.1


def test_states_of_rest_of_allen_cahn_stay():
    equation, nu = EQUATIONS["allen_cahn"], 0.004
    still = solved(equation._replace(start=jnp.zeros_like), nu, 18, 9)
    np.testing.assert_array_equal(still, -1)

    def walls(s):  # between -1 at the ends and +1 in the middle
        inside, width = jnp.where(s < 1, s, 2 - s), np.sqrt(2 * nu / 5)
        up, down = jnp.tanh((inside + 0.5) / width), jnp.tanh((inside - 0.5) / width)
        return jnp.where(s < 1, 1, -1) * (up - down)

    u = solved(equation._replace(start=walls), nu, 256, 90)
    assert u[0].max() > 0.999
    np.testing.assert_allclose(u[-1], u[0], atol=1e-5)


@pytest.mark.parametrize("name", ["burgers", "kdv"])
def test_conservation_laws_keep_their_mass(name):
    equation = EQUATIONS[name]
    shifted = equation._replace(start=lambda s: equation.start(s) + 0.3)
    u = solved(shifted, 0.02, 64, 120, frames=4)
    np.testing.assert_allclose(u.mean(1), 0.3, atol=1e-13)
    energy = (u**2).mean(1)
    if name == "kdv":
        np.testing.assert_allclose(energy, energy[0], rtol=1e-6)
    else:
        assert (np.diff(energy) < 0).all()


# --- accuracy, stiffness, derivatives ------------------------------------------------


@pytest.mark.parametrize("name", EQUATIONS)
def test_halving_the_time_step_leaves_a_sixteenth_of_the_error(name):
    nu = {"burgers": 0.05, "allen_cahn": 0.01, "kdv": 0.01}[name]
    runs = [solved(EQUATIONS[name], nu, 54, steps)[-1] for steps in (96, 192, 768)]
    coarse, fine = (relative(u, runs[-1]) for u in runs[:-1])
    assert 3.5 < np.log2(coarse / fine) < 4.5


@pytest.mark.parametrize("name", EQUATIONS)
def test_large_coefficients_need_no_small_steps(name):
    u = solved(EQUATIONS[name], 10.0, 72, 90, frames=9)
    assert np.isfinite(u).all()
    assert np.abs(u).max() < 1.2


def test_strong_diffusion_leaves_the_slowest_mode():
    u = solved(EQUATIONS["burgers"], 1.0, 72, 90)
    slowest = -np.exp(-(np.pi**2)) * np.sin(np.pi * np.asarray(spectral.grid(72)))
    assert relative(u[-1], slowest) < 0.01


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_derivative_in_the_coefficient_is_that_of_differences(name):
    nu, step = 0.02, 1e-6

    @jax.jit
    def last(nu):
        return spectral.solve(EQUATIONS[name], nu, 72, 90)[-1]

    _, slope = jax.jit(lambda nu: jax.jvp(last, (nu,), (1.0,)))(nu)
    difference = (last(nu + step) - last(nu - step)) / (2 * step)
    assert relative(slope, difference) < 1e-6


# --- the inverse problem -------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    return dbo.tasks.pde_coefficient(EQUATIONS["kdv"], points=72, steps=90)


def test_observations_stand_at_the_inner_points_of_a_ninth_division():
    times, places = np.linspace(0, 1, 19), np.asarray(spectral.grid(36))
    table = pde.observe(times[:, None] + 10 * places[None, :])
    inner = np.arange(1, 9) / 9
    expected = inner[:, None] + 10 * (2 * inner - 1)[None, :]
    np.testing.assert_allclose(table, expected, atol=1e-13)


def test_the_data_come_from_a_finer_grid(task):
    finer = solved(EQUATIONS["kdv"], task.nu, 144, 180, frames=9)
    np.testing.assert_allclose(task.solution, finer[:, ::2], atol=1e-13)
    np.testing.assert_allclose(task.batch, pde.observe(task.solution))
    assert 1e-8 < task.solver_error < 1e-2


def test_the_solver_minimises_the_lower_level_whatever_its_start(task):
    y = task.solver(jax.random.key(0), task.x0, task.y0 + 1, task.batch)
    lower = jax.jit(task.problem.lower)
    assert float(lower(task.x0, y, task.batch)) < 1e-25
    assert float(lower(task.x0, y + 1, task.batch)) == pytest.approx(0.5)


def test_errors_vanish_at_the_truth_alone(task):
    exact = task.evaluate(task.nu, task.solution)
    assert float(exact["eps_nu"]) == float(exact["eps_u"]) == 0
    off = task.evaluate(1.5 * task.nu, 0 * task.solution)
    assert float(off["eps_nu"]) == pytest.approx(0.5)
    assert float(off["eps_u"]) == pytest.approx(1)


def test_the_black_box_and_both_modes_agree_on_the_hypergradient(task):
    grads = dbo.hypergradients
    black_box = grads.zeroth_order(
        task.problem, task.solver, 1, 1e-6, grads.central, chunk=1
    )
    exact = grads.forward(task.problem, task.solver)

    def misfit(x):
        return task.problem.upper(x, task.solver(None, x, None, None), task.batch)

    @jax.jit
    def slopes(x):
        around = [
            hyper.estimate(jax.random.key(0), x, task.y0, (), task.batch)[0]
            for hyper in (black_box, exact)
        ]
        return *around, jax.grad(misfit)(x)

    quotient, forward, reverse = slopes(task.x0)
    assert float(reverse) == pytest.approx(float(forward), rel=1e-9)
    assert float(quotient) == pytest.approx(float(forward), rel=1e-5)


def test_forward_mode_descends_to_the_true_coefficient(task):
    hyper = dbo.hypergradients.forward(task.problem, task.solver)
    optimizer = optax.adam(optax.linear_schedule(2e-4, 0.0, 60))

    @jax.jit
    def descend(x):
        def step(carry, _):
            x, memory = carry
            slope, _, _, info = hyper.estimate(
                jax.random.key(0), x, task.y0, (), task.batch
            )
            updates, memory = optimizer.update(slope, memory)
            return (x + updates, memory), info.ok

        (x, _), ok = jax.lax.scan(step, (x, optimizer.init(x)), length=60)
        return x, ok.all()

    x, ok = descend(jnp.asarray(0.004))
    assert ok
    assert abs(float(x) / task.nu - 1) < 1e-2


# --- what is refused -----------------------------------------------------------------

REFUSED = {
    "odd": ({"points": 63}, "`points`, a multiple of 2"),
    "not whole": ({"points": 64.0}, "whole number `points`"),
    "frames": ({"steps": 10, "frames": 3}, "`steps`, a multiple of 3"),
    "no frames": ({"frames": 0}, "`frames`"),
    "many": ({"nu": jnp.ones(2)}, "vmap"),
}


@pytest.mark.parametrize(("settings", "match"), REFUSED.values(), ids=REFUSED)
def test_the_solver_refuses(settings, match):
    settings = {"nu": 0.1, "points": 64, "steps": 9} | settings
    with pytest.raises(ValueError, match=match):
        spectral.solve(EQUATIONS["kdv"], **settings)


def test_the_task_refuses_grids_without_the_observations_and_its_own_data():
    with pytest.raises(ValueError, match="multiple of 18"):
        dbo.tasks.pde_coefficient(EQUATIONS["kdv"], points=512)
    with pytest.raises(ValueError, match="one of 9"):
        dbo.tasks.pde_coefficient(EQUATIONS["kdv"], steps=100)
    with pytest.raises(ValueError, match="finer"):
        dbo.tasks.pde_coefficient(EQUATIONS["kdv"], finer=1)


def test_an_equation_that_was_not_made_is_refused():
    for refuses in (lambda e: spectral.solve(e, 0.1), dbo.tasks.pde_coefficient):
        with pytest.raises(TypeError, match="`equation` must be a Equation"):
            refuses(spectral.kdv)


def test_float32_is_refused():
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="jax_enable_x64"):
            spectral.solve(EQUATIONS["kdv"], 0.1, 64, 9)
        with pytest.raises(ValueError, match="jax_enable_x64"):
            dbo.tasks.pde_coefficient(EQUATIONS["kdv"])
