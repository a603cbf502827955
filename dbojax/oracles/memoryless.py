"""Directions that follow from the batch at hand alone."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Calls, Oracle, Problem, Tree, by_level

# What the directions of soba cost; no two of them share a term.
SOBA_CALLS = (
    Calls(gradients=1, products=1),
    Calls(gradients=1),
    Calls(gradients=1, products=1),
)


class UpperTerms(NamedTuple):
    """What the directions need of ``f``."""

    x: Tree  # grad_x f, like x
    y: Tree  # grad_y f, like y


class LowerTerms(NamedTuple):
    """What the directions need of ``g``."""

    gradient: Tree  # grad_y g, like y
    hessian: Tree  # hess_yy g z, like y
    cross: Tree  # hess_xy g z, like x


def upper_terms(problem: Problem, x: Tree, y: Tree, batch: Tree) -> UpperTerms:
    """Both gradients of ``f`` on a batch of the upper level."""
    return UpperTerms(*jax.grad(problem.upper, (0, 1))(x, y, batch))


def lower_terms(problem: Problem, x: Tree, y: Tree, z: Tree, batch: Tree) -> LowerTerms:
    """Gradient of ``g`` and both products with ``z`` on a batch of the lower level.

    Both products are the derivative of both gradients along ``z``. What has reverse
    derivatives alone, as with `jax.custom_vjp`, is pulled back, which is no quicker.
    """

    def both(y):
        return jax.grad(problem.lower, (0, 1))(x, y, batch)

    try:
        (_, d_y), (cross, hessian) = jax.jvp(both, (y,), (z,))
        return LowerTerms(d_y, hessian, cross)
    except (TypeError, ValueError, NotImplementedError):
        # JAX has no one error for what lacks a forward derivative. One of the objective
        # itself comes up again below.
        pass

    def one(x, y):
        return jax.grad(problem.lower, 1)(x, y, batch)

    d_y, pullback = jax.vjp(one, x, y)
    cross, hessian = pullback(z)
    return LowerTerms(d_y, hessian, cross)


def assemble(upper: UpperTerms, lower: LowerTerms) -> tuple[Tree, Tree, Tree]:
    """The directions of soba, ``(d_x, d_y, d_z)``, which are linear in the terms."""
    d_x = jax.tree.map(jnp.subtract, upper.x, lower.cross)
    d_z = jax.tree.map(jnp.subtract, lower.hessian, upper.y)
    return d_x, lower.gradient, d_z


def soba(problem: Problem) -> Oracle:
    r"""Second-order directions; ``z`` solves the linear system of the hypergradient.

    .. math::
        d_y = \nabla_y g, \quad d_z = \nabla^2_{yy} g\, z - \nabla_y f, \quad
        d_x = \nabla_x f - \nabla^2_{xy} g\, z

    One derivative of the lower gradients along ``z`` gives both Hessian products.

    Args:
        problem: objectives of one node.

    Returns:
        An oracle whose ``z`` has the structure of ``y`` and starts at zero.

    Examples:
        >>> sq = lambda v: v @ v
        >>> p = dbo.Problem(lambda x, y, b: sq(y) / 2, lambda x, y, b: sq(y - x))
        >>> oracle, x, y = soba(p), jnp.ones(2), jnp.ones(2)
        >>> z, memory = oracle.init(x, y)
        >>> (d_x, d_y, d_z), _ = oracle.directions(None, x, y, z, memory, None)
        >>> d_y.tolist(), d_z.tolist()
        ([0.0, 0.0], [-1.0, -1.0])

    References:
        Dagréou, Ablin, Vaiter and Moreau (2022), arXiv:2201.13409; the sign of ``z`` is
        opposite there.
    """

    def init(x, y):
        del x
        return jax.tree.map(jnp.zeros_like, y), ()

    def directions(key, x, y, z, memory, batch):
        del key
        upper_batch, lower_batch = by_level(batch)
        upper = upper_terms(problem, x, y, upper_batch)
        lower = lower_terms(problem, x, y, z, lower_batch)
        return assemble(upper, lower), memory

    return Oracle(init, directions, SOBA_CALLS)


def penalty(problem: Problem, weight: float) -> Oracle:
    r"""First-order directions of the penalised problem; ``z`` is a lower variable too.

    With :math:`\min_x \min_y \max_z f(x, y) + \lambda (g(x, y) - g(x, z))`,

    .. math::
        d_y = \tfrac1\lambda \nabla_y f(x, y) + \nabla_y g(x, y), \quad
        d_z = \nabla_y g(x, z), \quad
        d_x = \nabla_x f(x, y) + \lambda (\nabla_x g(x, y) - \nabla_x g(x, z)).

    Here ``y`` estimates the penalised lower solution and ``z`` the plain one; both are
    scaled by :math:`1/\lambda` so that one step size suits all ``weight``. The
    hypergradient is off by :math:`O(1/\lambda)`.

    Args:
        problem: objectives of one node.
        weight: lambda > 0; beyond 1000 the difference in ``d_x`` needs float64.

    Returns:
        An oracle without second derivatives; ``z`` starts at ``y``.

    Raises:
        ValueError: if ``weight`` is not positive.

    Examples:
        >>> sq = lambda v: v @ v
        >>> p = dbo.Problem(lambda x, y, b: sq(y) / 2, lambda x, y, b: sq(y - x))
        >>> oracle, x, y = penalty(p, 10.0), jnp.ones(2), jnp.ones(2)
        >>> z, memory = oracle.init(x, y)
        >>> (d_x, d_y, d_z), _ = oracle.directions(None, x, y, z, memory, None)
        >>> d_y.tolist(), d_z.tolist()
        ([0.1, 0.1], [0.0, 0.0])

    References:
        The split of F²BA, Chen, Ma and Zhang (2023), arXiv:2306.14853.
    """
    if isinstance(weight, int | float) and not weight > 0:
        raise ValueError(f"`penalty` needs a weight lambda > 0, got {weight}.")

    def init(x, y):
        del x
        return jax.tree.map(jnp.asarray, y), ()

    def directions(key, x, y, z, memory, batch):
        del key
        upper_batch, batch = by_level(batch)
        upper_x, upper_y = jax.grad(problem.upper, (0, 1))(x, y, upper_batch)
        lower_x, lower_y = jax.grad(problem.lower, (0, 1))(x, y, batch)
        plain_x, d_z = jax.grad(problem.lower, (0, 1))(x, z, batch)
        d_x = jax.tree.map(
            lambda f, g, p: f + trees.times(weight, g - p), upper_x, lower_x, plain_x
        )
        d_y = jax.tree.map(
            lambda f, g: trees.times(1 / weight, f) + g, upper_y, lower_y
        )
        return (d_x, d_y, d_z), memory

    return Oracle(
        init,
        directions,
        (Calls(gradients=3), Calls(gradients=2), Calls(gradients=1)),
    )
