"""Directions in which every node inverts its own Hessian by a truncated series."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Calls, Oracle, Problem, by_level
from dbojax.oracles.memoryless import upper_terms


def local_neumann(
    problem: Problem, terms: int, smoothness: float | jax.Array, random: bool = False
) -> Oracle:
    r"""Second-order directions without an auxiliary variable.

    .. math::
        d_y = \nabla_y g, \quad d_x = \nabla_x f - \nabla^2_{xy} g\, p, \quad
        p = \frac1L \sum_{j=0}^{J-1} \Big(I - \frac{\nabla^2_{yy} g}L\Big)^j \nabla_y f

    or, drawn anew in each call,

    .. math::
        p = \frac JL \Big(I - \frac{\nabla^2_{yy} g}L\Big)^{\tilde J} \nabla_y f, \quad
        \tilde J \sim \mathrm{Unif}\{0, \dots, J\}.

    Every g, f and Hessian is the node's own. Where Hessians differ, the mean of the
    inverses is not the inverse of the mean, and no number of terms brings methods built
    on this to the solution: use ``dbo.oracles.soba`` or ``dbo.oracles.penalty`` there.

    Args:
        problem: objectives of one node.
        terms: J; the series misses :math:`(1 - \mu/L)^J` of the solution in the worst
            direction.
        smoothness: L, at least the largest eigenvalue of any node's Hessian.
        random: draw one power; its mean is J / (J + 1) times the series of J + 1 terms.
            All products use the batch at hand. Calls count J of them, the most that are
            drawn, for nodes wait for each other.

    Returns:
        An oracle whose ``z`` is an unused scalar.

    Raises:
        ValueError: if ``terms`` is below one or ``smoothness`` not positive.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: y, lambda x, y, b: (y - x) ** 2 / 2)
        >>> x = jnp.array(0.0)
        >>> for terms in (1, 2, 3):
        ...     oracle = local_neumann(p, terms, smoothness=2.0)
        ...     z, memory = oracle.init(x, x)
        ...     (d_x, _, _), _ = oracle.directions(None, x, x, z, memory, None)
        ...     print(float(d_x))
        0.5
        0.75
        0.875

    References:
        The estimator of MDBO, Gao, Gu and Thai (2023), AISTATS, PMLR 206:9238-9281; the
        sum is our deterministic form of it.
    """
    if not isinstance(terms, numbers.Integral) or terms < 1:
        raise ValueError(
            f"`local_neumann` needs a whole number of terms, at least one; got {terms}."
        )
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_positive(smoothness, "local_neumann(smoothness)")

    def init(x, y):
        del x, y
        return jnp.zeros(()), ()

    def directions(key, x, y, z, memory, batch):
        upper_batch, lower_batch = by_level(batch)
        upper = upper_terms(problem, x, y, upper_batch)

        def slope(x, y):
            return jax.grad(problem.lower, 1)(x, y, lower_batch)

        d_y, product = jax.linearize(lambda y: slope(x, y), y)

        def shrink(v):
            step = 1 / smoothness
            return jax.tree.map(lambda a, b: a - trees.times(step, b), v, product(v))

        p = (_power if random else _series)(key, shrink, upper.y, terms)
        p = jax.tree.map(lambda leaf: trees.times(1 / smoothness, leaf), p)
        _, pullback = jax.vjp(lambda x: slope(x, y), x)
        (cross,) = pullback(p)
        d_x = jax.tree.map(jnp.subtract, upper.x, cross)
        return (d_x, d_y, jnp.zeros_like(z)), memory

    products = terms if random else terms - 1
    above = Calls(gradients=2, products=products + 1)
    return Oracle(init, directions, (above, Calls(gradients=1), Calls()))


def _series(key, shrink, b, terms):
    """``sum_{j < J} shrink^j b`` by Horner's rule, with J - 1 products."""
    del key

    def add(_, p):
        return jax.tree.map(jnp.add, b, shrink(p))

    return jax.lax.fori_loop(0, terms - 1, add, b)


def _power(key, shrink, b, terms):
    """``J shrink^j b`` with j uniform on 0, ..., J."""
    drawn = jax.random.randint(key, (), 0, terms + 1)
    p = jax.lax.fori_loop(0, drawn, lambda _, v: shrink(v), b)
    return jax.tree.map(lambda leaf: trees.times(terms, leaf), p)
