"""Hypergradients by the implicit function theorem, one linear system each."""
# ruff: noqa: D417 - what means the same in all of them is described once, in `implicit`.

from __future__ import annotations

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Calls, Hypergradient, Problem, Tree
from dbojax.hypergradients import linear, systems
from dbojax.hypergradients.common import (
    check_positive,
    cost,
    finish,
    no_state,
    prepare,
)
from dbojax.hypergradients.inner import (
    Inner,
    Solver,
    lower_batch,
    solve_calls,
    solver,
    upper_batch,
)
from dbojax.hypergradients.systems import LinearSolver


def implicit(
    problem: Problem,
    solve: LinearSolver,
    inner: Inner | Solver | None = None,
    warm_start: bool = False,
) -> Hypergradient:
    r"""Implicit hypergradient at y, by any linear solver.

    .. math::
        \nabla^2_{yy} g\, z = \nabla_y f, \qquad \nabla_x f - \nabla^2_{xy} g\, z

    It is exact where y minimises g and z solves the system. A product with the Hessian
    costs about one gradient; memory does not grow with the steps of the inner solver.

    Args:
        problem: objectives of one node.
        solve: a value of ``dbo.hypergradients.linear``.
        inner: run from the given y before; by default y is taken as it is.
        warm_start: start the next system at this one's z, which is the state.

    Returns:
        An estimator. ``info.residual`` is that of the system, ``info.ok`` false if
        its solver broke down. ``calls`` leave out products whose number hangs on the
        size of y.

    Raises:
        ValueError: from ``estimate``, if the variables are not floating point, an
            objective is not a scalar, ``Rounds`` are too few, or the inner solver or
            the state do not fit y.
        TypeError: if a part is of another kind.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> hyper = implicit(p, dbo.hypergradients.linear.cg(1))
        >>> x, y = jnp.array(2.0), jnp.array(1.75)
        >>> g, _, _, info = hyper.estimate(jax.random.key(0), x, y, (), None)
        >>> float(g), float(info.residual), int(info.cost.products)
        (0.75, 0.0, 2)

    References:
        Pedregosa (2016), arXiv:1602.02355; Lorraine, Vicol and Duvenaud (2020),
        arXiv:1911.02590.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_type(solve, LinearSolver, "solve", "dbo.hypergradients.linear.cg(20)")
    before = Calls() if inner is None else solve_calls(inner)
    fixed = before + Calls(gradients=2, products=1)

    def estimate(key, x, y, state, batch):
        x, start, y = _arrive(problem, inner, key, x, y, batch)
        if warm_start:
            trees.check_like(state, y, "state", "y")
        value, (f_x, f_y) = _upper(problem, x, y, batch)
        samples = lower_batch(batch)

        def product(v):  # the compiler takes what does not depend on v out of the loop
            return jax.jvp(lambda y: _lower_y(problem, x, y, samples), (y,), (v,))[1]

        solution = solve.solve(product, f_y, state if warm_start else None)
        _, cross = jax.vjp(lambda x: _lower_y(problem, x, y, samples), x)
        hypergrad = jax.tree.map(jnp.subtract, f_x, *cross(solution.z))
        paid = cost(fixed)
        paid = paid._replace(products=paid.products + solution.products)
        hypergrad, y, info = finish(
            hypergrad, y, start, value, paid, solution.ok, solution.residual
        )
        return hypergrad, y, solution.z if warm_start else state, info

    most = solve.products + int(warm_start and solve.products > 0)
    return Hypergradient(
        _zeros if warm_start else no_state, estimate, fixed + Calls(products=most)
    )


def cg(
    problem: Problem,
    max_steps: int = 20,
    tol: float = 0.0,
    damping: float = 0.0,
    inner: Inner | Solver | None = None,
    warm_start: bool = False,
) -> Hypergradient:
    """Implicit hypergradient by conjugate gradients.

    For a g that is convex in y around the solution; where it is not, ``info.ok`` says
    so, and ``damping`` helps.

    Args:
        max_steps, tol, damping: as for ``linear.cg``.
        problem, inner, warm_start: as for :func:`implicit`.

    Returns:
        An estimator.

    References:
        Rajeswaran, Finn, Kakade and Levine (2019), arXiv:1909.04630, with damping.
    """
    return implicit(problem, linear.cg(max_steps, tol, damping), inner, warm_start)


def normal_cg(
    problem: Problem,
    max_steps: int = 20,
    tol: float = 0.0,
    inner: Inner | Solver | None = None,
    warm_start: bool = False,
) -> Hypergradient:
    """Implicit hypergradient by conjugate gradients on the normal equations.

    For a stationary y whose Hessian may be indefinite.

    Args:
        max_steps, tol: as for ``linear.normal_cg``.
        problem, inner, warm_start: as for :func:`implicit`.

    Returns:
        An estimator.
    """
    return implicit(problem, linear.normal_cg(max_steps, tol), inner, warm_start)


def gmres(
    problem: Problem,
    restart: int = 20,
    cycles: int = 1,
    tol: float = 0.0,
    inner: Inner | Solver | None = None,
    warm_start: bool = False,
) -> Hypergradient:
    """Implicit hypergradient by GMRES; ``info.cost`` is what it costs at most.

    Args:
        restart, cycles, tol: as for ``linear.gmres``.
        problem, inner, warm_start: as for :func:`implicit`.

    Returns:
        An estimator.
    """
    return implicit(problem, linear.gmres(restart, cycles, tol), inner, warm_start)


def bicgstab(
    problem: Problem,
    max_steps: int = 20,
    tol: float = 0.0,
    inner: Inner | Solver | None = None,
    warm_start: bool = False,
) -> Hypergradient:
    """Implicit hypergradient by BiCGSTAB; ``info.cost`` is what it costs at most.

    Args:
        max_steps, tol: as for ``linear.bicgstab``.
        problem, inner, warm_start: as for :func:`implicit`.

    Returns:
        An estimator.
    """
    return implicit(problem, linear.bicgstab(max_steps, tol), inner, warm_start)


def neumann(
    problem: Problem,
    steps: int = 20,
    step_size: float | jax.Array = 0.1,
    inner: Inner | Solver | None = None,
) -> Hypergradient:
    r"""Implicit hypergradient by K + 1 terms of the Neumann series.

    .. math::
        \nabla_x f - \nabla^2_{xy} g \;
        \alpha \sum_{k=0}^K (I - \alpha \nabla^2_{yy} g)^k \nabla_y f

    Args:
        steps: K; one more product tells the residual.
        step_size: alpha, below 2 / L where g is L-smooth in y.
        problem, inner: as for :func:`implicit`.

    Returns:
        An estimator; ``info.ok`` is false where the series diverges.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> args = jax.random.key(0), jnp.array(2.0), jnp.array(1.75), (), None
        >>> [float(neumann(p, k, 0.5).estimate(*args)[0]) for k in (0, 1, 3)]
        [0.375, 0.5625, 0.703125]

    References:
        Lorraine, Vicol and Duvenaud (2020), arXiv:1911.02590.
    """
    return implicit(problem, linear.neumann(steps, step_size), inner)


def dense(problem: Problem, inner: Inner | Solver | None = None) -> Hypergradient:
    """Implicit hypergradient by factorising the Hessian, for small y and for tests.

    Args:
        problem, inner: as for :func:`implicit`.

    Returns:
        An estimator; ``info.ok`` is false where the Hessian is singular.
    """
    return implicit(problem, linear.dense(), inner)


def hessian_free(
    problem: Problem,
    scale: float | jax.Array = 1.0,
    inner: Inner | Solver | None = None,
) -> Hypergradient:
    r"""Implicit hypergradient with a multiple of the identity for the Hessian.

    .. math:: \nabla_x f - \alpha \nabla^2_{xy} g \, \nabla_y f

    Args:
        scale: alpha.
        problem, inner: as for :func:`implicit`.

    Returns:
        An estimator without residual, which would cost a product.

    References:
        Luketina, Berglund, Greff and Raiko (2016), arXiv:1511.06727.
    """
    return implicit(problem, linear.scaled_identity(scale), inner)


def soba(
    problem: Problem,
    step_size: float | jax.Array,
    inner: Inner | Solver | None = None,
) -> Hypergradient:
    r"""One step on the linear system per estimate; z is the state, and starts at zero.

    .. math::
        \nabla_x f - \nabla^2_{xy} g\, z, \qquad
        z \leftarrow z - \rho\, (\nabla^2_{yy} g\, z - \nabla_y f)

    Both at the old z, so that one pull-back gives both products, and the residual.

    Args:
        step_size: rho.
        problem, inner: as for :func:`implicit`.

    Returns:
        An estimator; a z that is not finite starts anew at zero.

    Raises:
        ValueError: if ``step_size`` is not positive; from ``estimate``, as
            :func:`implicit`.
        TypeError: if ``problem`` is of another kind.

    References:
        Dagréou, Ablin, Vaiter and Moreau (2022), arXiv:2201.13409; the sign of ``z`` is
        opposite there.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    check_positive(step_size, "step_size", "soba")
    before = Calls() if inner is None else solve_calls(inner)
    calls = before + Calls(gradients=2, products=2)

    def estimate(key, x, y, z, batch):
        x, start, y = _arrive(problem, inner, key, x, y, batch)
        trees.check_like(z, y, "state", "y")
        value, (f_x, f_y) = _upper(problem, x, y, batch)
        samples = lower_batch(batch)
        _, pull = jax.vjp(lambda x, y: _lower_y(problem, x, y, samples), x, y)
        cross, product = pull(z)
        gap = jax.tree.map(jnp.subtract, f_y, product)
        moved = jax.tree.map(lambda z, r: z + trees.times(step_size, r), z, gap)
        moved, fine = systems.finite_or_zero(moved)
        hypergrad, y, info = finish(
            jax.tree.map(jnp.subtract, f_x, cross),
            y,
            start,
            value,
            cost(calls),
            fine,
            systems.relative(gap, f_y),
        )
        return hypergrad, y, moved, info

    return Hypergradient(_zeros, estimate, calls)


def _zeros(x: Tree, y: Tree) -> Tree:
    del x
    return jax.tree.map(jnp.zeros_like, y)


def _arrive(problem, inner, key, x, y, batch):
    """x, the start and where the inner solver took it, all checked."""
    x, start = prepare(problem, x, y, batch)  # both objectives are derived here
    if inner is None:
        return x, start, start
    prepare(problem, x, start, batch, inner)
    y = solver(inner)(key, x, start, batch)
    trees.check_like(y, start, "the inner solver's result", "y")
    return x, start, y


def _upper(problem, x, y, batch):
    samples = upper_batch(batch)
    return jax.value_and_grad(problem.upper, (0, 1))(x, y, samples)


def _lower_y(problem, x, y, samples):
    return jax.grad(problem.lower, 1)(x, y, samples)
