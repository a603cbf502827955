"""Directional derivatives along many directions, a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Tree
from dbojax.hypergradients.directions import Draw

# x -> (value, aux), e.g. the upper loss after the inner solver, and where that ended.
Pass = Callable[[Tree], tuple[jax.Array, Tree]]


class Combined(NamedTuple):
    """Directions, weighted by their coefficients."""

    total: jax.Array  # sum_i w_i v_i, (N,), at least float32
    squares: jax.Array  # |v_i|^2, (b,)


class Swept(NamedTuple):
    """What is known of ``h`` at x after some directions were pushed through it."""

    coefficients: jax.Array  # w_i = <grad h(x), v_i>, (b,)
    total: jax.Array  # sum_i w_i v_i, (N,), at least float32
    squares: jax.Array  # |v_i|^2, (b,)
    value: jax.Array  # h(x)
    aux: Tree


# (h, x, directions) -> slopes (r,) along them, h(x), aux
Slopes = Callable[[Pass, Tree, jax.Array], tuple[jax.Array, jax.Array, Tree]]


def push(h: Pass, x: Tree, directions: jax.Array) -> tuple[jax.Array, jax.Array, Tree]:
    r"""Directional derivatives :math:`w_i = \langle \nabla h(x), v_i \rangle`.

    All directions share one primal pass; memory grows with their number and not with
    the depth of ``h``.

    Args:
        h: what is derived.
        x: where.
        directions: ``(r, N)``.

    Returns:
        w of shape ``(r,)``, the value and aux.
    """

    def along(flat):
        tangent = trees.unravel(flat, x)
        value, w, aux = jax.jvp(h, (x,), (tangent,), has_aux=True)
        return w, value, aux

    return jax.vmap(along, out_axes=(0, None, None))(directions)


def sweep(
    h: Pass, x: Tree, draw: Draw, count: int, chunk: int, first=0, slopes: Slopes = push
) -> Swept:
    """Push the directions ``first .. first + count - 1``, ``chunk`` at a time.

    Args:
        h: what is derived.
        x: where.
        draw: directions by their numbers, so that they depend on nothing else.
        count: how many, a multiple of ``chunk``.
        chunk: how many at once; memory grows with it, the result does not depend on it.
        first: number of the first one; may be traced.
        slopes: how slopes along directions are found.

    Returns:
        Coefficients, their sum with the directions, squared lengths, value and aux.
    """

    def few(carry, start):
        directions = draw(start + jnp.arange(chunk))
        w, value, aux = slopes(h, x, directions)
        total, squares = accumulate(carry[0], w, directions)
        return (total, value, aux), (w, squares)

    value, aux = zeros_like(jax.eval_shape(h, x))
    carry = (zero_total(x), value, aux)
    starts = first + jnp.arange(0, count, chunk)
    (total, value, aux), (w, squares) = jax.lax.scan(few, carry, starts)
    return Swept(w.reshape(count), total, squares.reshape(count), value, aux)


def combine(w: jax.Array, x: Tree, draw: Draw, chunk: int) -> Combined:
    """Draw all directions again and weight them, in the order of :func:`sweep`."""

    def few(total, part):
        start, w = part
        return accumulate(total, w, draw(start + jnp.arange(chunk)))

    starts = jnp.arange(0, w.size, chunk)
    parts = starts, w.reshape(-1, chunk)
    total, squares = jax.lax.scan(few, zero_total(x), parts)
    return Combined(total, squares.reshape(w.size))


def accumulate(total: jax.Array, w: jax.Array, directions: jax.Array):
    """``total + w @ directions``, and the squared lengths of the directions."""
    wide = directions.astype(total.dtype)
    squares = jax.vmap(lambda v: jnp.vdot(v, v, precision="highest"))(wide)
    return total + jnp.dot(w.astype(total.dtype), wide, precision="highest"), squares


def zero_total(x: Tree) -> jax.Array:
    """The sum of no directions; short floats would lose the digits of a long sum."""
    flat = jax.eval_shape(trees.ravel, x)
    return jnp.zeros(flat.shape, jnp.promote_types(flat.dtype, jnp.float32))


def zeros_like(shapes: Tree) -> Tree:
    """Zeros of these shapes and dtypes."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
