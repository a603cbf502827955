"""Any solver made differentiable by the implicit function theorem."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Tree
from dbojax.hypergradients import linear
from dbojax.hypergradients.systems import LinearSolver

# (x, y, *args) -> tree like y, zero where y solves.
Optimality = Callable[..., Tree]
# (x, y0, *args) -> y, or (y, aux).
Solve = Callable[..., Tree]


def fixed_point(update: Callable[..., Tree]) -> Optimality:
    r"""The optimality condition of :math:`y = \Phi(x, y)`.

    Args:
        update: ``(x, y, *args) -> y``; its derivative in y has no eigenvalue one at
            the solution.

    Returns:
        :math:`y - \Phi(x, y)`, as a function of ``(x, y, *args)``.

    Examples:
        >>> float(fixed_point(jnp.add)(0.0, 2.0))
        0.0
    """

    def optimality(x, y, *args):
        return jax.tree.map(jnp.subtract, y, update(x, y, *args))

    return optimality


def implicit_diff(
    optimality: Optimality, solve: LinearSolver | None = None, has_aux: bool = False
) -> Callable[[Solve], Solve]:
    r"""Give a solver the derivatives of the solution, whatever it does inside.

    Where :math:`F(x, y^*(x)) = 0` and :math:`\partial_y F` is regular,

    .. math:: \partial y^*(x) = -\,\partial_y F^{-1}\, \partial_x F .

    Forward and reverse mode cost one linear system each. The solver itself is never
    differentiated, so it may use ``while_loop`` or callbacks.

    Args:
        optimality: F, e.g. ``jax.grad(g, 1)`` for a minimum of g in y, or
            :func:`fixed_point`. What is differentiated must come in as an argument.
        solve: a value of ``dbo.hypergradients.linear``; by default ``normal_cg``, which
            minds neither sign nor symmetry. ``cg`` is cheaper for a minimum.
        has_aux: whether the solver returns ``(y, aux)``. No derivative goes through
            aux.

    Returns:
        A decorator of ``solver(x, y0, *args)``: differentiable in x and args, zero in
        y0, under ``jit`` and ``vmap``, also twice. A linear system whose solver broke
        down makes the derivative NaN.

    Raises:
        ValueError: when the solver is called, if y is not floating point, the
            optimality condition does not fit y, or there is no pair where
            ``has_aux`` promises one.
        TypeError: if ``solve`` is of another kind.

    Examples:
        >>> @implicit_diff(lambda x, y: y**2 - x)
        ... def root(x, y0):
        ...     return jax.lax.while_loop(
        ...         lambda y: jnp.abs(y**2 - x) > 1e-12, lambda y: (y + x / y) / 2, y0
        ...     )
        >>> round(float(jax.grad(root)(4.0, 1.0)), 6)  # 1 / (2 sqrt x)
        0.25

    References:
        Blondel and co-authors (2022), arXiv:2105.15183.
    """
    solve = linear.normal_cg(1000) if solve is None else solve
    trees.check_type(solve, LinearSolver, "solve", "dbo.hypergradients.linear.cg(20)")
    attach = _attach(optimality, solve)

    def decorate(solver):
        @functools.wraps(solver)
        def solution(x, y0, *args):
            still = jax.lax.stop_gradient((x, y0, args))
            found = jax.lax.stop_gradient(solver(still[0], still[1], *still[2]))
            if has_aux:  # an array of length two would come apart, too
                _check_pair(found)
            y, aux = found if has_aux else (found, None)
            y = jax.tree.map(jnp.asarray, y)
            _check(optimality, x, y, args)
            y = attach(y, x, args)
            return (y, aux) if has_aux else y

        return solution

    return decorate


def _check_pair(found):
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(
            "With `has_aux=True` the solver must return a pair (y, aux); got "
            f"{jax.eval_shape(lambda: found)}. Write has_aux=False if there is no aux."
        )


def _check(optimality, x, y, args):
    """Refuse a solution or an optimality condition that cannot be differentiated."""
    trees.check_floating(y, "y")
    gap = jax.eval_shape(optimality, x, y, *args)
    trees.check_like(gap, y, "optimality(x, y, *args)", "y")


def _attach(optimality, solve):
    """``(y, x, args) -> y``, with the derivatives in x and args of the solution."""

    @jax.custom_jvp
    def attach(y, x, args):
        del x, args
        return y

    def jvp(primals, tangents):
        y, x, args = primals
        _, dx, dargs = tangents
        y = attach(y, x, args)  # carries its own derivatives into the second order
        _, moved = jax.jvp(
            lambda x, args: optimality(x, y, *args), (x, args), (dx, dargs)
        )
        _, product = jax.linearize(lambda y: optimality(x, y, *args), y)
        dy = jax.lax.custom_linear_solve(
            product, jax.tree.map(jnp.negative, moved), system, transpose_solve=system
        )
        return y, dy

    def system(matvec, b):
        found = solve.solve(matvec, b)
        # There is no other way to flag a derivative.
        return jax.tree.map(lambda z: jnp.where(found.ok, z, jnp.nan), found.z)

    attach.defjvp(jvp)
    return attach
