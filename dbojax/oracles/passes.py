"""Directions as sums over passes, i.e. gradients of one objective at one point.

A compiler may begin a pass before the one before is done, and then holds the
activations of both. Branches of a loop it runs in turn and in the same memory, so that
is what the passes are here.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees
from dbojax.base import Problem, Tree

_TINY = 1e-12  # a norm below counts as this much; radius / _TINY must not overflow


class Sums(NamedTuple):
    """What the passes have added up so far."""

    x: Tree  # like x
    y: Tree  # like y
    z: Tree  # like y


def in_turn(passes: Sequence[Callable[[Sums], Sums]], x: Tree, y: Tree) -> Sums:
    """Run the passes one after the other, from sums of zero."""

    def step(sums, index):
        return jax.lax.switch(index, passes, sums), None

    start = Sums(*jax.tree.map(jnp.zeros_like, (x, y, y)))
    return jax.lax.scan(step, start, jnp.arange(len(passes)))[0]


def slopes_of(problem: Problem, x: Tree, batch: Tree) -> Callable[[Tree], tuple]:
    """Gradients of ``g`` in x and y as a function of y, fit for being subtracted."""

    def at(y):
        # Products are shortened to ten bits or so on many devices.
        with jax.default_matmul_precision("highest"):
            return jax.grad(problem.lower, (0, 1))(x, y, batch)

    return at


def spacing(radius: float | jax.Array, z: Tree) -> jax.Array:
    """How often z makes a step of length ``radius``; finite at z = 0 too."""
    # A constant under differentiation: the product that a difference stands for does
    # not depend on it, and a norm has no gradient at zero.
    return jax.lax.stop_gradient(radius / jnp.maximum(trees.norm(z), _TINY))


def moved(y: Tree, length: jax.Array, z: Tree) -> Tree:
    """``y + length * z``."""
    return jax.tree.map(lambda a, b: a + trees.times(length, b), y, z)


def minus(a: Tree, b: Tree) -> Tree:
    """``a - b``."""
    return jax.tree.map(jnp.subtract, a, b)


def scaled(scalar: float | jax.Array, tree: Tree) -> Tree:
    """``scalar * tree``."""
    return jax.tree.map(lambda leaf: trees.times(scalar, leaf), tree)


def check_positive(value: float | jax.Array, name: str, factory: str) -> None:
    """Refuse what is no positive number; an array may be traced."""
    if isinstance(value, numbers.Real):
        good = math.isfinite(value) and float(value) > 0
    else:
        good = isinstance(value, jax.Array | np.ndarray)
    if not good:
        raise ValueError(f"`{factory}` needs {name} > 0 and finite, got {value!r}.")


def check_precision(x: Tree, y: Tree, factory: str) -> None:
    """Refuse variables whose gradients have too few digits to be subtracted."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves((x, y))]
    if not all(dtype in (jnp.float32, jnp.float64) for dtype in dtypes):
        raise ValueError(
            f"`{factory}` subtracts gradients that differ in their last digits, so x "
            f"and y must be float32 or float64; got {[str(d) for d in dtypes]}. "
            "Convert them, e.g. with `.astype(jnp.float32)`, or use "
            "`dbo.oracles.soba`."
        )
