"""Directions without second derivatives: products as differences of gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Calls, Oracle, Problem, by_level
from dbojax.oracles.passes import (
    Sums,
    check_positive,
    check_precision,
    in_turn,
    minus,
    moved,
    scaled,
    slopes_of,
    spacing,
)


def finite_difference(
    problem: Problem,
    radius: float | jax.Array = 1e-2,
    reuse: bool = False,
    at_once: bool = True,
) -> Oracle:
    r"""Directions of `soba` with central differences for both products.

    With :math:`\delta = r / \|z\|` and all gradients of g on one batch,

    .. math::
        d_y = \nabla_y g, \quad
        d_z = \frac{\nabla_y g(x, y + \delta z) - \nabla_y g(x, y - \delta z)}{2\delta}
        - \nabla_y f, \quad
        d_x = \nabla_x f
        - \frac{\nabla_x g(x, y + \delta z) - \nabla_x g(x, y - \delta z)}{2 \delta}

    off by at most :math:`\rho \delta^2 \|z\|^3 / 6 = \rho r^2 \|z\| / 6`, where
    :math:`\rho` bounds the fourth derivatives of g, and by rounding alone where g is
    quadratic in y. Keep z bounded, e.g. with ``dbo.strategies.projected``. At z = 0 the
    differences are exactly zero. When the directions are themselves differentiated,
    :math:`\delta` counts as a constant.

    g must be smooth in y: behind layers of y, rectifiers leave an error of some tenths
    at every radius; before the first one they do no harm. A `soba` step needs about as
    many operations and no radius. This one needs no second derivative, and the memory
    of gradients.

    Args:
        problem: objectives of one node; those of g are evaluated with full float32
            products, also where the device's default is shorter.
        radius: r, how far y is moved, as a Euclidean norm; 0.01 to 0.1 in float32 and
            about 1e-4 in float64.
        reuse: take :math:`d_y` as the mean of the two gradients, off by
            :math:`O(r^2)`, and save one pass of four.
        at_once: leave both sides of a difference to the compiler, which may share what
            they have in common and may hold the activations of both; False holds those
            of one gradient at any time.

    Returns:
        An oracle whose ``z`` has the structure of ``y`` and starts at zero. ``calls``
        counts what a phase needs that moves all three.

    Raises:
        ValueError: if ``radius`` is not positive; from ``init`` and ``directions``, if
            a variable is shorter than float32.
        TypeError: if ``problem`` is of another kind.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: x * y, lambda x, y, b: y**4 / 4 - x * y)
        >>> x, y, z = jnp.array(0.0), jnp.array(1.0), jnp.array(2.0)
        >>> (d_x, d_y, d_z), _ = finite_difference(p, radius=0.2).directions(
        ...     None, x, y, z, (), None)
        >>> round(float(d_z), 9)  # 3 y^2 z = 6, and 8 delta^2 with delta = 0.1
        6.08

    References:
        Yang, Xiao and Ji (2023), arXiv:2312.03807, FdeHBO; without its momentum, which
        is :func:`storm`. The formulas are our reading of it.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    check_positive(radius, "radius", "finite_difference")

    def init(x, y):
        check_precision(x, y, "finite_difference")
        return jax.tree.map(jnp.zeros_like, y), ()

    def directions(key, x, y, z, memory, batch):
        del key
        check_precision(x, y, "finite_difference")
        upper_batch, lower_batch = by_level(batch)
        slopes = slopes_of(problem, x, lower_batch)
        delta = spacing(radius, z)

        def ahead(sums):
            g_x, g_y = slopes(moved(y, delta, z))
            return Sums(g_x, g_y if reuse else sums.y, g_y)

        def behind(sums):
            g_x, g_y = slopes(moved(y, -delta, z))
            mean = sums.y
            if reuse:
                mean = jax.tree.map(lambda a, b: (a + b) / 2, mean, g_y)
            return Sums(minus(sums.x, g_x), mean, minus(sums.z, g_y))

        def both(sums):
            return behind(ahead(sums))

        def here(sums):
            return sums._replace(y=jax.grad(problem.lower, 1)(x, y, lower_batch))

        def upper(sums):
            f_x, f_y = jax.grad(problem.upper, (0, 1))(x, y, upper_batch)
            cross, hessian = scaled(1 / (2 * delta), (sums.x, sums.z))
            return Sums(minus(f_x, cross), sums.y, minus(hessian, f_y))

        sides = [both] if at_once else [ahead, behind]
        passes = [*sides, upper] if reuse else [*sides, here, upper]
        return tuple(in_turn(passes, x, y)), memory

    # With `reuse`, d_y is made of what d_z takes.
    lower = Calls() if reuse else Calls(gradients=1)
    return Oracle(init, directions, (Calls(gradients=3), lower, Calls(gradients=3)))


def one_step_difference(
    problem: Problem,
    step_size: float | jax.Array,
    radius: float | jax.Array = 1e-2,
) -> Oracle:
    r"""One descent step in place of the inverse Hessian, by a central difference.

    With :math:`v = \nabla_y f` and :math:`\varepsilon = r / \|v\|`,

    .. math::
        d_y = \nabla_y g, \quad d_x = \nabla_x f - \eta
        \frac{\nabla_x g(x, y + \varepsilon v) - \nabla_x g(x, y - \varepsilon v)}
        {2 \varepsilon}

    which puts :math:`\eta I` for :math:`(\nabla^2_{yy} g)^{-1}`: biased, and the
    cheapest of its kind. All is evaluated at y, where ``dbo.hypergradients.darts``
    evaluates f one descent step later; where the lower gradient is zero they agree.

    Args:
        problem: as in :func:`finite_difference`.
        step_size: eta, that of the inner descent.
        radius: as in :func:`finite_difference`.

    Returns:
        An oracle whose ``z`` is an unused scalar.

    Raises:
        ValueError: if a setting is not positive; from ``init`` and ``directions``, if a
            variable is shorter than float32.
        TypeError: if ``problem`` is of another kind.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2)
        >>> x = y = jnp.array(2.0)
        >>> (d_x, _, _), _ = one_step_difference(p, 0.125).directions(
        ...     None, x, y, jnp.zeros(()), (), None)
        >>> round(float(d_x), 3)  # 1 with step_size=0.5, one over the curvature
        0.25

    References:
        Liu, Simonyan and Yang (2019), arXiv:1806.09055, equations 7 and 8.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    check_positive(step_size, "step_size", "one_step_difference")
    check_positive(radius, "radius", "one_step_difference")

    def init(x, y):
        check_precision(x, y, "one_step_difference")
        return jnp.zeros(()), ()

    def directions(key, x, y, z, memory, batch):
        del key
        check_precision(x, y, "one_step_difference")
        upper_batch, lower_batch = by_level(batch)
        slopes = slopes_of(problem, x, lower_batch)

        def upper(sums):
            f_x, f_y = jax.grad(problem.upper, (0, 1))(x, y, upper_batch)
            return sums._replace(x=f_x, z=f_y)

        def both(sums):
            epsilon = spacing(radius, sums.z)
            ahead, behind = (
                slopes(moved(y, side, sums.z))[0] for side in (epsilon, -epsilon)
            )
            cross = scaled(step_size / (2 * epsilon), minus(ahead, behind))
            return sums._replace(x=minus(sums.x, cross))

        def here(sums):
            return sums._replace(y=jax.grad(problem.lower, 1)(x, y, lower_batch))

        d_x, d_y, _ = in_turn([upper, both, here], x, y)
        return (d_x, d_y, jnp.zeros_like(z)), memory

    calls = Calls(gradients=4), Calls(gradients=1), Calls()
    return Oracle(init, directions, calls)


def perturbed(problem: Problem, delta: float | jax.Array) -> Oracle:
    r"""Compare the lower solution with that of :math:`g + \delta f`, which z follows.

    .. math::
        d_y = \nabla_y g(x, y), \quad
        d_z = \nabla_y g(x, z) + \delta \nabla_y f(x, z), \quad
        d_x = \nabla_x f(x, z)
        + \frac{\nabla_x g(x, z) - \nabla_x g(x, y)}{\delta}

    At the two solutions the hypergradient is off by :math:`O(\delta)`; errors of y and
    z count :math:`1 / \delta` times. It is :func:`penalty` with the weight
    :math:`\lambda = 1 / \delta` and the names of y and z exchanged: here y is the plain
    lower solution, the one that counts where y is reported or kept.

    Args:
        problem: as in :func:`finite_difference`.
        delta: below 0.001 the difference needs float64.

    Returns:
        An oracle whose ``z`` is a lower variable too and starts at ``y``.

    Raises:
        ValueError: if ``delta`` is not positive; from ``init`` and ``directions``, if a
            variable is shorter than float32.
        TypeError: if ``problem`` is of another kind.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> x = y = jnp.array(2.0)
        >>> z = jnp.array(21 / 11)  # the solution of g + f / 10
        >>> (d_x, _, d_z), _ = perturbed(p, 0.1).directions(None, x, y, z, (), None)
        >>> bool(abs(d_z) < 1e-6), round(float(d_x), 3)  # 1, less the bias
        (True, 0.909)

    References:
        Kwon, Kwon, Wright and Nowak (2023), arXiv:2301.10945, F2SA; as a forward
        difference, arXiv:2509.02937.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    check_positive(delta, "delta", "perturbed")

    def init(x, y):
        check_precision(x, y, "perturbed")
        return jax.tree.map(jnp.asarray, y), ()

    def directions(key, x, y, z, memory, batch):
        del key
        check_precision(x, y, "perturbed")
        upper_batch, lower_batch = by_level(batch)
        slopes = slopes_of(problem, x, lower_batch)

        def plain(sums):
            g_x, g_y = slopes(y)
            return sums._replace(x=g_x, y=g_y)

        def tilted(sums):
            g_x, g_y = slopes(z)
            return sums._replace(x=minus(g_x, sums.x), z=g_y)

        def upper(sums):
            f_x, f_y = jax.grad(problem.upper, (0, 1))(x, z, upper_batch)
            d_x = jax.tree.map(jnp.add, f_x, scaled(1 / delta, sums.x))
            d_z = jax.tree.map(jnp.add, sums.z, scaled(delta, f_y))
            return Sums(d_x, sums.y, d_z)

        return tuple(in_turn([plain, tilted, upper], x, y)), memory

    calls = Calls(gradients=3), Calls(gradients=1), Calls(gradients=2)
    return Oracle(init, directions, calls)
