"""Solvers of ``A z = b`` where ``A`` is a function and ``z``, ``b`` are trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dbojax.hypergradients import systems
from dbojax.hypergradients.common import check_positive
from dbojax.hypergradients.inner import check_count
from dbojax.hypergradients.systems import LinearSolver as LinearSolver
from dbojax.hypergradients.systems import Solution as Solution


def cg(max_steps: int, tol: float = 0.0, damping: float = 0.0) -> LinearSolver:
    r"""Conjugate gradients, for a symmetric positive definite ``A``.

    .. math:: (A + \lambda I)\, z = b

    Directions of no or negative curvature end it: the last good iterate is kept and
    ``ok`` is false. So does a curvature below rounding of the largest one met.

    Args:
        max_steps: steps at most, one product each.
        tol: stop at this residual, relative to b, of the damped system; rounding is
            the least.
        damping: lambda >= 0. The residual that is told is that of ``A`` itself.

    Returns:
        A solver.

    Raises:
        ValueError: for impossible settings.

    Examples:
        >>> a = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
        >>> solution = cg(3).solve(lambda v: a @ v, jnp.ones(3))
        >>> solution.z.round(6).tolist(), int(solution.products)
        ([1.0, 0.5, 0.25], 3)
        >>> bool(cg(3).solve(lambda v: a @ v - 2 * v, jnp.ones(3)).ok)
        False

    References:
        Hestenes and Stiefel (1952).
    """
    check_count(max_steps, "max_steps", "cg")
    check_positive(tol, "tol", "cg", zero=True)
    check_positive(damping, "damping", "cg", zero=True)

    def damped(a):  # adding nothing would still cost a pass through memory
        plain = isinstance(damping, int | float) and damping == 0
        return a if plain else lambda v: systems.add(a(v), damping, v)

    def solve(a, b, start):
        def bend(p):
            q = damped(a)(p)
            return q, systems.dot(p, q)

        z, r, used = _origin(damped(a), b, start)
        z, r, steps, ok = _conjugate(bend, None, z, r, b, max_steps, tol, 1)
        return systems.Found(z, systems.add(r, damping, z), steps, ok, steps + used)

    return systems.on_trees(solve, max_steps)


def normal_cg(max_steps: int, tol: float = 0.0) -> LinearSolver:
    r"""Conjugate gradients on the normal equations, for any ``A``.

    .. math:: A^\top A\, z = A^\top b

    Indefinite and nonsymmetric systems are as good as any other; a singular one gives
    a least-squares solution. The condition number counts twice.

    Args:
        max_steps: steps at most, two products each and one before the first.
        tol: stop where :math:`|A^\top(b - Az)|` is this part of :math:`|A^\top b|`.

    Returns:
        A solver; ``A`` must be differentiable in reverse.

    Raises:
        ValueError: for impossible settings.

    Examples:
        >>> a = jnp.array([[0.0, 2.0], [-1.0, 0.0]])
        >>> normal_cg(2).solve(lambda v: a @ v, jnp.ones(2)).z.round(6).tolist()
        [-1.0, 0.5]

    References:
        Hestenes and Stiefel (1952), section 10; today CGNR or CGLS.
    """
    check_count(max_steps, "max_steps", "normal_cg")
    check_positive(tol, "tol", "normal_cg", zero=True)

    def solve(a, b, start):
        transpose = jax.linear_transpose(a, b)

        def back(r):
            return transpose(r)[0]

        def bend(p):
            q = a(p)
            return q, systems.dot(q, q)

        z, r, used = _origin(a, b, start)
        z, r, steps, ok = _conjugate(bend, back, z, r, back(b), max_steps, tol, 2)
        # From a start, two more: A^T b for the tolerance, A^T r for the direction.
        return systems.Found(z, r, steps, ok, 2 * steps + 1 + 2 * used)

    return systems.on_trees(solve, 2 * max_steps + 2)  # the start's second included


def gmres(restart: int = 20, cycles: int = 1, tol: float = 0.0) -> LinearSolver:
    """Least residual over a Krylov space, for any ``A``.

    ``jax.scipy.sparse.linalg.gmres``, which does not tell its steps: ``steps`` and
    ``products`` are what it takes at most. ``ok`` says that the result is finite and
    no worse than zero.

    Args:
        restart: dimension of the space.
        cycles: how many spaces are built, each from where the last one ended.
        tol: as for :func:`cg`.

    Returns:
        A solver.

    Raises:
        ValueError: for impossible settings.

    References:
        Saad and Schultz (1986).
    """
    check_count(restart, "restart", "gmres")
    check_count(cycles, "cycles", "gmres")
    check_positive(tol, "tol", "gmres", zero=True)

    def run(a, b, start, tol):
        return jax.scipy.sparse.linalg.gmres(
            a, b, start, tol=tol, restart=restart, maxiter=cycles
        )[0]

    return _wrapped(run, restart * cycles, cycles * (restart + 1) + 1, tol)


def bicgstab(max_steps: int, tol: float = 0.0) -> LinearSolver:
    """Stabilised biconjugate gradients, for any ``A``, without its transpose.

    ``jax.scipy.sparse.linalg.bicgstab``; what :func:`gmres` says holds here too.

    Args:
        max_steps: steps at most, two products each.
        tol: as for :func:`cg`.

    Returns:
        A solver.

    Raises:
        ValueError: for impossible settings.

    References:
        Van der Vorst (1992).
    """
    check_count(max_steps, "max_steps", "bicgstab")
    check_positive(tol, "tol", "bicgstab", zero=True)

    def run(a, b, start, tol):
        return jax.scipy.sparse.linalg.bicgstab(
            a, b, start, tol=tol, maxiter=max_steps
        )[0]

    return _wrapped(run, max_steps, 2 * max_steps + 1, tol)


def neumann(steps: int, step_size: float | jax.Array) -> LinearSolver:
    r"""The first terms of the Neumann series; descent on a quadratic.

    .. math:: z = \alpha \sum_{k=0}^K (I - \alpha A)^k b

    Converges for :math:`0 < \alpha < 2 / \|A\|` and a positive definite ``A``. If the
    residual is larger than that of zero, the series diverges and ``ok`` is false.

    Args:
        steps: K, products in the sum; one more tells the residual.
        step_size: alpha.

    Returns:
        A solver; from a start, the series solves for the rest.

    Raises:
        ValueError: for impossible settings.

    Examples:
        >>> half = lambda v: v / 2
        >>> [float(neumann(k, 1.0).solve(half, jnp.ones(())).z) for k in (0, 1, 2)]
        [1.0, 1.5, 1.75]

    References:
        Lorraine, Vicol and Duvenaud (2020), arXiv:1911.02590.
    """
    check_count(steps, "steps", "neumann", least=0)
    check_positive(step_size, "step_size", "neumann")

    def solve(a, b, start):
        z, r, used = _origin(a, b, start)

        def add(_, carry):
            term, total = carry
            return systems.add(term, -step_size, a(term)), systems.add(total, 1, term)

        # The term after the last one is the residual: (I - alpha A)^(K+1) r.
        gap, total = jax.lax.fori_loop(0, steps + 1, add, (r, systems.zeros(r)))
        shrinks = systems.dot(gap, gap) <= systems.dot(r, r)
        z = systems.add(z, step_size, total)
        return systems.Found(z, gap, steps, shrinks, steps + 1 + used)

    return systems.on_trees(solve, steps + 1)


def dense() -> LinearSolver:
    """Write ``A`` out as a matrix and factorise it.

    As many products as b has entries, all at once, and memory for the matrix: for
    small systems and for tests. Where a pivot is lost in rounding, the system counts as
    singular: z is zero and ``ok`` false.

    Returns:
        A solver; a start is of no use to it.

    Examples:
        >>> a = jnp.array([[1.0, 1.0], [1.0, 1.0]])
        >>> solution = dense().solve(lambda v: a @ v, jnp.arange(2.0))
        >>> solution.z.tolist(), bool(solution.ok)
        ([0.0, 0.0], False)
    """

    def solve(a, b, start):
        del start
        matrix = jax.vmap(a, out_axes=1)(jnp.eye(b.size, dtype=b.dtype))
        factors = jax.scipy.linalg.lu_factor(matrix)
        z = jax.scipy.linalg.lu_solve(factors, b)
        pivots = jnp.abs(jnp.diagonal(factors[0]))
        ok = pivots.min() > b.size * jnp.finfo(b.dtype).eps * pivots.max()
        z = jnp.where(ok, z, 0)
        gap = b - jnp.dot(matrix, z, precision="highest")
        return systems.Found(z, gap, 1, ok, b.size)

    return systems.on_trees(systems.on_vectors(solve), 0)


def scaled_identity(scale: float | jax.Array) -> LinearSolver:
    """Take ``scale * b`` for the solution, without a product and without a residual."""
    check_positive(scale, "scale", "scaled_identity")

    def solve(a, b, start):
        del a, start
        return systems.Found(systems.add(systems.zeros(b), scale, b), None, 0, True, 0)

    return systems.on_trees(solve, 0)


def _origin(a, b, start):
    """Where to start, ``b - A z`` there, and what that cost."""
    if start is None:
        return systems.zeros(b), b, 0
    return start, systems.add(b, -1, a(start)), 1


def _conjugate(bend, back, z, r, target, max_steps, tol, power):
    """Conjugate gradients on ``A z = b`` or on its normal equations.

    Args:
        bend: direction p -> (q, curvature), where r falls by q for each p.
        back: residual r -> descent direction s; None: r itself.
        z: start.
        r: residual there.
        target: descent direction at zero, which ``tol`` is relative to.
        max_steps: steps at most.
        tol: relative tolerance.
        power: of A in the curvature; rounding of A shows in the curvature to it.

    Returns:
        z, r, steps and whether all curvatures were positive.
    """
    rounding = systems.rounding(r)
    enough = jnp.maximum(tol, rounding) ** 2 * systems.dot(target, target)

    def go_on(carry):
        *_, ss, _, _, steps, ok = carry
        return (steps < max_steps) & (ss > enough) & ok

    def step(carry):
        z, r, p, ss, pp, most, steps, ok = carry
        q, curvature = bend(p)
        # NaN compares as false, so it ends the loop too.
        ok = (curvature > rounding**power * most * pp) & (curvature < jnp.inf)
        most = jnp.maximum(most, curvature / pp)
        alpha = ss / curvature
        z = systems.where(ok, systems.add(z, alpha, p), z)
        r = systems.where(ok, systems.add(r, -alpha, q), r)
        s = r if back is None else back(r)
        ss_next = systems.dot(s, s)
        beta = ss_next / ss
        # s and p are orthogonal, so |s + beta p|^2 needs no further product.
        pp = ss_next + beta**2 * pp
        return z, r, systems.add(s, beta, p), ss_next, pp, most, steps + 1, ok

    s = r if back is None else back(r)
    ss = systems.dot(s, s)
    none = jnp.zeros((), jnp.int32)
    carry = (z, r, s, ss, ss, jnp.zeros_like(ss), none, jnp.isfinite(ss))
    z, r, _, _, _, _, steps, ok = jax.lax.while_loop(go_on, step, carry)
    return z, r, steps, ok


def _wrapped(run, steps, products, tol):
    """A solver of another library, which tells nothing but its result."""

    def solve(a, b, start):
        # At tolerance zero some divide by what is left of b, zero by zero.
        least = jnp.maximum(tol, jnp.finfo(b.dtype).eps)
        z = run(a, b, start, least)
        gap = b - a(z)
        better = systems.dot(gap, gap) <= systems.dot(b, b)
        return systems.Found(z, gap, steps, better, products + 1)

    return systems.on_trees(systems.on_vectors(solve), products + 1)
