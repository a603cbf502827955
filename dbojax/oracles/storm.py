"""Recursive momentum around any oracle."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Oracle, State, Tree


class StormState(NamedTuple):
    """What :func:`storm` remembers from one call to the next."""

    point: tuple[Tree, Tree, Tree]  # (x, y, z) of the last call
    estimate: tuple[Tree, Tree, Tree]  # of the directions there
    started: jax.Array  # scalar bool, whether there was a call
    memory: State  # of the wrapped oracle


def storm(oracle: Oracle, rate: float | jax.Array, together: bool = False) -> Oracle:
    r"""Correct the last estimate by how the directions changed on the same batch.

    With :math:`d(v; \xi)` the directions of ``oracle`` at the point v on the batch
    :math:`\xi`,

    .. math::
        h_t = d(v_t; \xi_t) + (1 - \rho)\, (h_{t-1} - d(v_{t-1}; \xi_t)), \qquad
        h_0 = d(v_0; \xi_0)

    Where batches only add noise, the variance falls to :math:`\rho / (2 - \rho)` of
    that of ``oracle`` and nothing lags behind, as an average of old directions would.
    In general the change of the noise between two points comes on top, so steps must
    be small.

    Args:
        oracle: of any kind; the second evaluation gets the same key and memory, and
            only the first moves the memory.
        rate: rho in (0, 1]; 1 gives the directions of ``oracle``.
        together: map the oracle over both points, so that it goes through the batch
            once, with its memory twice. For oracles that read much and compute little,
            such as a series over batches of large samples; networks are slower so.

    Returns:
        An oracle that costs twice as much and remembers the last point and estimate. A
        point is that of the last call, so let x, y and z move in one phase.

    Raises:
        ValueError: if ``rate`` is not in (0, 1].
        TypeError: if ``oracle`` is not one.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: x * b + y, lambda x, y, b: (y - x) ** 2)
        >>> oracle, x = storm(dbo.oracles.soba(p), 0.25), jnp.array(0.0)
        >>> z, memory = oracle.init(x, x)
        >>> for b in (8.0, 0.0, 0.0):
        ...     (d_x, _, _), memory = oracle.directions(None, x, x, z, memory, b)
        ...     print(float(d_x))
        8.0
        6.0
        4.5

    References:
        Cutkosky and Orabona (2019), arXiv:1905.10018, STORM, with a constant rate; for
        all three directions of a bilevel method in arXiv:2312.03807, FdeHBO.
    """
    trees.check_type(oracle, Oracle, "oracle", "dbo.oracles.soba(problem)")
    if isinstance(rate, numbers.Real) and not 0 < rate <= 1:
        raise ValueError(f"`storm` needs 0 < rate <= 1, got {rate}.")

    def init(x, y):
        z, memory = oracle.init(x, y)
        # Copies: a state may be donated.
        point = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (x, y, z))
        estimate = jax.tree.map(jnp.zeros_like, point)
        return z, StormState(point, estimate, jnp.array(False), memory)

    def directions(key, x, y, z, memory, batch):
        point = (x, y, z)

        def at(point):
            return oracle.directions(key, *point, memory.memory, batch)

        if together:
            both = jax.tree.map(lambda *leaves: jnp.stack(leaves), point, memory.point)
            found = jax.vmap(at)(both)
            now, inner = jax.tree.map(lambda leaf: leaf[0], found)
            before, _ = jax.tree.map(lambda leaf: leaf[1], found)
        else:
            (now, inner), (before, _) = at(point), at(memory.point)

        def follow(new, last, old):
            moved = new + trees.times(1 - rate, last - old)
            return jnp.where(memory.started, moved, new).astype(last.dtype)

        estimate = jax.tree.map(follow, now, memory.estimate, before)
        return estimate, StormState(point, estimate, jnp.array(True), inner)

    calls_x, calls_y, calls_z = (calls * 2 for calls in oracle.calls)
    return Oracle(init, directions, (calls_x, calls_y, calls_z))
