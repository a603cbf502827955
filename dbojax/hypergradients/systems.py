"""What linear solvers are made of: their types, algebra on trees, a common lift."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Tree
from dbojax.hypergradients.common import all_finite

Matvec = Callable[[Tree], Tree]  # v -> A v, linear, like b


class Solution(NamedTuple):
    """Where a linear solver ended, and what it knows of the place."""

    z: Tree  # like b; finite whatever happened, exactly zero for b = 0
    residual: jax.Array | None  # |A z - b| / |b|, 0 for b = 0; None: it would cost
    steps: jax.Array  # int32
    ok: jax.Array  # whether the solver broke down nowhere; few steps are no breakdown
    products: jax.Array  # int32, with A and with its transpose


class LinearSolver(NamedTuple):
    """A way to solve ``A z = b``, its settings included."""

    # (matvec, b, start=None) -> Solution; b and start are trees of one structure
    solve: Callable[..., Solution]
    # Products of a solve from zero at most, a start costs one more; 0: not known
    # before b is.
    products: int = 0


class Found(NamedTuple):
    """What the inside of a solver hands back."""

    z: Tree
    gap: Tree | None  # b - A z
    steps: int | jax.Array
    ok: bool | jax.Array
    products: int | jax.Array


def dot(a: Tree, b: Tree) -> jax.Array:
    """Inner product over all leaves, which a GPU must not shorten."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((jnp.vdot(*p, precision="highest") for p in pairs), jnp.zeros((), "f"))


def add(v: Tree, scale: float | jax.Array, p: Tree) -> Tree:
    """``v + scale * p``."""
    return jax.tree.map(lambda a, b: a + trees.times(scale, b), v, p)


def zeros(v: Tree) -> Tree:
    """Zero, like ``v``."""
    return jax.tree.map(jnp.zeros_like, v)


def where(condition: jax.Array, a: Tree, b: Tree) -> Tree:
    """One of two trees as a whole."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def rounding(v: Tree) -> float:
    """Relative rounding error of the shortest floats in a tree."""
    return max((float(jnp.finfo(a.dtype).eps) for a in jax.tree.leaves(v)), default=0.0)


def on_vectors(solve_flat):
    """Let a solver that wants vectors take trees."""

    def solve(a, b, start):
        def flat_a(v):
            return trees.ravel(a(trees.unravel(v, b))).astype(v.dtype)

        start = None if start is None else trees.ravel(start)
        found = solve_flat(flat_a, trees.ravel(b), start)
        z, gap = (trees.unravel(v, b) for v in (found.z, found.gap))
        return found._replace(z=z, gap=gap)

    return solve


def on_trees(solve_scaled, products: int) -> LinearSolver:
    """A solver from its inside, which sees a b near one in at least float32.

    Trees are not made one vector, although that is fewer operations: a matrix that is
    cut out of a vector takes twice as long to multiply with on CPU.
    """

    def solve(matvec, b, start=None):
        long = trees.wide(b)
        # Squares of small or large numbers leave the range of floats.
        most = jnp.zeros((), "f")
        for leaf in jax.tree.leaves(long):
            most = jnp.maximum(most, jnp.abs(leaf).max(initial=0))
        scale = jnp.where(most > 0, most, 1)

        def shrink(v):
            return jax.tree.map(lambda a: a / scale.astype(a.dtype), v)

        def a(v):
            return trees.cast(matvec(trees.cast(v, b)), v)

        if start is not None:
            start = shrink(trees.cast(start, long))
            start = where(most > 0, start, zeros(start))
        near_one = shrink(long)
        found = solve_scaled(a, near_one, start)
        z, finite = finite_or_zero(
            jax.tree.map(lambda a: trees.times(scale, a), found.z)
        )
        residual = None
        if found.gap is not None:  # at zero it is one
            residual = jnp.where(finite, relative(found.gap, near_one), 1)
        return Solution(
            trees.cast(z, b),
            residual,
            jnp.asarray(found.steps, jnp.int32),
            jnp.asarray(found.ok) & finite & jnp.isfinite(most),
            jnp.asarray(found.products, jnp.int32),
        )

    return LinearSolver(solve, products)


def relative(gap: Tree, b: Tree) -> jax.Array:
    """``|gap| / |b|``, zero for b = 0."""
    size = trees.norm(b)
    return jnp.where(size > 0, trees.norm(gap) / jnp.where(size > 0, size, 1), 0)


def finite_or_zero(tree: Tree) -> tuple[Tree, jax.Array]:
    """A tree, or zeros if one of its entries is not finite; and whether all were."""
    finite = all_finite(tree)
    return jax.tree.map(lambda a: jnp.where(finite, a, 0), tree), finite
