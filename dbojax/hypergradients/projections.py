"""Maps onto simple sets, and the prox of the l1 norm; for maps with fixed points.

Their derivatives are those of the piece that the argument lies in; on the border of two
pieces, one of the derivatives in between.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dbojax.base import Tree
from dbojax.hypergradients.common import check_positive

Bound = float | jax.Array | Tree  # one for all entries, or like the argument


def box(v: Tree, lower: Bound, upper: Bound) -> Tree:
    r"""Nearest point with :math:`l \le p \le u`, entry by entry.

    Args:
        v: what is projected.
        lower: one bound for all entries, or a tree like v; ``-jnp.inf`` for none.
        upper: likewise.

    Returns:
        A tree like v, differentiable in the bounds too.

    Examples:
        >>> box(jnp.array([-1.0, 0.5, 2.0]), 0.0, 1.0).tolist()
        [0.0, 0.5, 1.0]
    """
    return jax.tree.map(jnp.clip, v, _like(lower, v), _like(upper, v))


def simplex(v: Tree, total: float | jax.Array = 1.0) -> Tree:
    r"""Nearest point with :math:`p \ge 0` and :math:`\sum_j p_j = s` over all leaves.

    Args:
        v: what is projected.
        total: s > 0.

    Returns:
        A tree like v, differentiable in ``total`` too.

    Raises:
        ValueError: if ``total`` is not positive.

    Examples:
        >>> simplex(jnp.array([2.0, 1.5, 0.0])).tolist()
        [0.75, 0.25, 0.0]

    References:
        ``optax.projections.projection_simplex``, whose derivative is
        :math:`\operatorname{diag}(s) - s s^\top / |s|` with the support s.
    """
    check_positive(total, "total", "simplex")
    return optax.projections.projection_simplex(v, total)


def ball(v: Tree, radius: float | jax.Array = 1.0) -> Tree:
    r"""Nearest point with :math:`\|p\|_2 \le r` over all leaves.

    Args:
        v: what is projected.
        radius: r > 0.

    Returns:
        A tree like v, differentiable in ``radius`` too.

    Raises:
        ValueError: if ``radius`` is not positive.

    Examples:
        >>> ball(jnp.array([6.0, 8.0]), 5.0).tolist()
        [3.0, 4.0]

    References:
        ``optax.projections.projection_l2_ball``.
    """
    check_positive(radius, "radius", "ball")
    return optax.projections.projection_l2_ball(v, radius)


def soft_threshold(v: Tree, weight: Bound) -> Tree:
    r"""Prox of :math:`\lambda \|\cdot\|_1`: shrink each entry by lambda, at most to 0.

    .. math:: \operatorname{sign}(v_j) \max(|v_j| - \lambda_j, 0)

    Args:
        v: what is shrunk.
        weight: lambda >= 0, one for all entries or a tree like v.

    Returns:
        A tree like v, differentiable in ``weight`` too.

    Raises:
        ValueError: if ``weight`` is a negative number.

    Examples:
        >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0]), 1.0).tolist()
        [-2.0, 0.0, 1.0]
    """
    for part in jax.tree.leaves(weight):
        check_positive(part, "weight", "soft_threshold", zero=True)
    # v - clip(v) has no kink at v = 0, where sign and |v| would have one each.
    return jax.tree.map(lambda a, w: a - jnp.clip(a, -w, w), v, _like(weight, v))


def _like(bound: Bound, v: Tree) -> Tree:
    """One bound per leaf, in its dtype."""
    if jax.tree.structure(bound) == jax.tree.structure(0.0):
        bound = jax.tree.map(lambda _: bound, v)

    if jax.tree.structure(bound) != jax.tree.structure(v):
        raise ValueError(
            f"A bound must be one number or have the structure of what is projected, "
            f"{jax.tree.structure(v)}; got {jax.tree.structure(bound)}."
        )
    return jax.tree.map(lambda b, a: jnp.asarray(b, jnp.result_type(a)), bound, v)
