"""Directional derivatives along many directions, a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Tree

# x -> (value, aux), e.g. the upper loss after the inner solver, and where that ended.
Pass = Callable[[Tree], tuple[jax.Array, Tree]]
# Numbers (r,) of directions -> those directions, (r, N), as `trees.ravel` orders x.
Draw = Callable[[jax.Array], jax.Array]


class Swept(NamedTuple):
    """What is known of ``h`` at x after some directions were pushed through it."""

    coefficients: jax.Array  # w_i = <grad h(x), v_i>, (b,)
    total: jax.Array  # sum_i w_i v_i, (N,)
    value: jax.Array  # h(x)
    aux: Tree


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


def sweep(h: Pass, x: Tree, draw: Draw, count: int, chunk: int, first=0) -> Swept:
    """Push the directions ``first .. first + count - 1``, ``chunk`` at a time.

    Args:
        h: what is derived.
        x: where.
        draw: directions by their numbers, so that they depend on nothing else.
        count: how many, a multiple of ``chunk``.
        chunk: how many at once; memory grows with it, the result does not depend on it.
        first: number of the first one; may be traced.

    Returns:
        Coefficients, their sum with the directions, value and aux.
    """

    def few(carry, start):
        directions = draw(start + jnp.arange(chunk))
        w, value, aux = push(h, x, directions)
        total = carry[0] + jnp.dot(w, directions, precision="highest")
        return (total, value, aux), w

    flat = jax.eval_shape(trees.ravel, x)
    value, aux = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(h, x)
    )
    carry = (jnp.zeros(flat.shape, flat.dtype), value, aux)
    starts = first + jnp.arange(0, count, chunk)
    (total, value, aux), w = jax.lax.scan(few, carry, starts)
    return Swept(w.reshape(count), total, value, aux)
