"""One unknown coefficient of an equation, to be found from 64 observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Problem
from dbojax.tasks.spectral import Equation, check_precision, solve

FRAMES = 9  # the observations stand at the inner points of a 9 x 9 division


class Coefficient(NamedTuple):
    """A bilevel view of an inverse problem, its data, and how to judge.

    x is the coefficient, a scalar; y is the solution, ``(frames + 1, points)``.
    """

    problem: Problem  # upper: mean squared misfit; lower: distance to the solution
    solver: Callable  # (key, x, y, batch) -> y, which looks at x alone
    batch: jax.Array  # observations, (8, 8): times, places
    x0: jax.Array
    y0: jax.Array  # zeros
    nu: float  # the true coefficient
    solution: jax.Array  # at the true coefficient, from the finer grid
    solver_error: jax.Array  # eps_u of the solver at the true coefficient
    evaluate: Callable  # (x, y) -> {"eps_nu": ..., "eps_u": ...}


def observe(u: jax.Array) -> jax.Array:
    """Values at t = i / 9 and s = -1 + 2 j / 9, with i and j from 1 to 8.

    These are points of the grid: nothing is interpolated.

    Args:
        u: ``(9 k + 1, 9 m)``, times from 0 to 1 and places in [-1, 1).

    Returns:
        ``(8, 8)``.
    """
    rows, columns = (u.shape[0] - 1) // FRAMES, u.shape[1] // FRAMES
    return u[rows:-1:rows, columns::columns]


def pde_coefficient(
    equation: Equation,
    points: int | None = None,
    steps: int | None = None,
    dealias: bool = True,
    finer: int = 2,
) -> Coefficient:
    r"""Find the coefficient of an equation from 64 values of its solution.

    .. math::
        \min_\nu \frac1{64} \sum_{i,j=1}^8 (u_\nu(t_i, s_j) - d_{ij})^2, \quad
        t_i = \tfrac i9, \; s_j = \tfrac{2j}9 - 1

    The solver is a function of :math:`\nu` alone, and may be taken as a black box; it
    can be derived as well. The data d come from a solution at the true coefficient with
    more points and steps than the solver has, without noise, so that the solver's error
    bounds what can be found.

    Args:
        equation: e.g. :func:`~dbojax.tasks.spectral.burgers`.
        points: of the solver in [-1, 1), a multiple of 18; by default what the equation
            asks for.
        steps: of the solver from 0 to 1, a multiple of 9; by default likewise.
        dealias: as for :func:`~dbojax.tasks.spectral.solve`.
        finer: how many times as many points, and steps, stand behind the data.

    Returns:
        A task; ``evaluate(x, y)`` gives ``eps_nu``, :math:`|\nu - \nu^*| / \nu^*`, and
        ``eps_u``, the relative distance of y to the finer solution in
        :math:`\ell_2`, over all points at the nine times after the start.

    Raises:
        ValueError: if a size does not fit, the data are not finer than the solver, or
            JAX would compute in float32.
        TypeError: if ``equation`` is of another kind.

    Examples:
        >>> task = pde_coefficient(dbo.tasks.spectral.kdv(), points=72, steps=90)
        >>> def misfit(nu):
        ...     y = task.solver(None, nu, task.y0, task.batch)
        ...     return task.problem.upper(nu, y, task.batch)
        >>> bool(misfit(task.nu) < 1e-5 * misfit(task.x0))
        True

    References:
        Shen et al. (2024), arXiv:2406.14095, eq. 19, appendices E.3 and F.3; the grids
        and the definition of ``eps_u`` are ours.
    """
    check_precision("pde_coefficient")
    trees.check_type(equation, Equation, "equation", "dbo.tasks.spectral.kdv()")
    points = equation.points if points is None else points
    steps = equation.steps if steps is None else steps
    if points % (2 * FRAMES) or steps % FRAMES:
        raise ValueError(
            "The observations must be points of the grid: `points` a multiple of 18 "
            f"and `steps` one of 9; got {points} and {steps}. Write e.g. points=576, "
            "steps=360."
        )
    if finer < 2:
        raise ValueError(
            "The data must come from a finer grid than the solver's, or the solver's "
            f"error would cancel: write finer=2 or more, got {finer}."
        )

    def run(nu, refine=1):
        sizes = points * refine, steps * refine
        return solve(equation, nu, *sizes, frames=FRAMES, dealias=dealias)

    def solver(key, x, y, batch):
        del key, y, batch
        return run(x)

    def upper(x, y, batch):
        del x
        return jnp.mean((observe(y) - batch) ** 2)

    def lower(x, y, batch):
        del batch
        return jnp.mean((y - run(x)) ** 2) / 2

    solution = run(equation.nu, finer)[:, ::finer]

    def distance(u):
        return jnp.linalg.norm(u[1:] - solution[1:]) / jnp.linalg.norm(solution[1:])

    def evaluate(x, y):
        return {"eps_nu": jnp.abs(x / equation.nu - 1), "eps_u": distance(y)}

    return Coefficient(
        problem=Problem(upper, lower),
        solver=solver,
        batch=observe(solution),
        x0=jnp.asarray(equation.guess),
        y0=jnp.zeros_like(solution),
        nu=equation.nu,
        solution=solution,
        solver_error=distance(run(equation.nu)),
        evaluate=evaluate,
    )
