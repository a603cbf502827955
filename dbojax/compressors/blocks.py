"""Sparsifiers that choose within blocks: nearly the largest entries at a lower cost."""

from __future__ import annotations

import numbers
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Compressor
from dbojax.compressors.largest import magnitudes, of_largest
from dbojax.compressors.sparse import (
    Count,
    counter,
    entries,
    narrow,
    num_rows,
    sparsifier,
)

_FEW = 10  # rows that one kernel reads; from some 16 on it is no longer unrolled


class Rows(NamedTuple):
    """Message of :func:`block_top_k`: one entry per column of (ceil(d / k), k)."""

    values: jax.Array  # (k,)
    rows: jax.Array  # (k,), the smallest unsigned type that counts the rows


class Chunks(NamedTuple):
    """Message of :func:`chunked_top_k`: as many entries of each chunk, in its order."""

    values: jax.Array  # (entries of a chunk times chunks,)
    indices: jax.Array  # within the chunk, the smallest unsigned type that counts it


def block_top_k(k: Count) -> Compressor:
    r"""Keep the largest entry of each of ``k`` strided blocks.

    Block :math:`j` is :math:`\{j, j + k, j + 2k, \dots\}`, of at most
    :math:`m = \lceil d/k \rceil` entries, so

    .. math:: \|C(v) - v\|^2 \le (1 - 1/m) \|v\|^2.

    The worst case of :func:`top_k` at a few passes over the vector, whatever ``k``.

    Args:
        k: number of blocks, int = entries, float = fraction of the length.

    Returns:
        A biased compressor with ``delta = 1 / ceil(d / k)``; a kept entry costs its own
        bytes and a row number, one byte while ``k >= d / 256``.

    Raises:
        ValueError: if ``k`` is neither; at trace time, if it exceeds the length.

    Examples:
        >>> v = jnp.array([1.0, -5.0, 2.0, 4.0])  # blocks (1, 2) and (-5, 4)
        >>> top = block_top_k(2)
        >>> payload, _ = top.compress(None, v, ())
        >>> top.decompress(payload, v).tolist()
        [0.0, -5.0, 2.0, 0.0]
    """
    kept = counter("block_top_k", k)

    def select(key, v):
        del key
        columns = entries("block_top_k", k, v.size)
        values, rows = largest_of_columns(v, columns)
        return Rows(values, rows.astype(narrow(num_rows(columns, v.size))))

    def indices(payload, d):
        del d
        columns = payload.values.size
        return payload.rows.astype(jnp.int32) * columns + jax.lax.iota(
            jnp.int32, columns
        )

    def delta(d):
        return 1 / num_rows(min(kept(d), d), d)

    return sparsifier(select, indices, delta=delta)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest_of_columns(v: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    """Entry of largest magnitude of each column of a grid, and its row; the first."""
    whole = v.size // columns
    grid = v[: whole * columns].reshape(whole, columns)
    values, rows = reduced(grid, jax.lax.broadcasted_iota(jnp.int32, grid.shape, 0))
    if whole * columns < v.size:
        # Padded zeros lose even against zeros, which have smaller row numbers.
        last = jnp.pad(v[whole * columns :], (0, (whole + 1) * columns - v.size))
        last = last[None], jnp.full((1, columns), whole, jnp.int32)
        values, rows = larger_of(*map(stacked, (values[None], rows[None]), last))
    return values, rows


@largest_of_columns.defjvp
def _(columns, primals, tangents):
    # JAX has no derivative of a reduction of which but one part has a tangent.
    values, rows = largest_of_columns(primals[0], columns)
    kept = tangents[0][rows * columns + jax.lax.iota(jnp.int32, columns)]
    none: Any = np.zeros(rows.shape, jax.dtypes.float0)
    return (values, rows), (kept, none)


def reduced(values: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of each column, in strips of so many rows as one kernel unrolls."""
    while len(values) > _FEW:
        whole = len(values) // _FEW * _FEW
        strips = [a[:whole].reshape(-1, _FEW, a.shape[1]) for a in (values, rows)]
        rest = values[whole:], rows[whole:]
        values, rows = larger_of(*strips)
        if rest[0].size:
            values, rows = stacked(values, rest[0]), stacked(rows, rest[1])
    return larger_of(values, rows)


def stacked(a: jax.Array, b: jax.Array) -> jax.Array:
    """Rows of ``a`` and then rows of ``b``."""
    return jnp.concatenate([a, b])


def larger_of(values: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reduce the last axis but one; of equals the smallest row, before all a NaN."""

    def larger(a, b):
        ours, theirs = magnitudes(a[0]), magnitudes(b[0])
        wins = (theirs > ours) | ((theirs == ours) & (b[1] < a[1]))
        return jnp.where(wins, b[0], a[0]), jnp.where(wins, b[1], a[1])

    none = np.zeros((), values.dtype), np.int32(np.iinfo(np.int32).max)
    values, rows = jax.lax.reduce(
        (values, rows), none, larger, dimensions=(values.ndim - 2,)
    )
    return values, rows


def chunked_top_k(k: Count, chunk: int = 65536) -> Compressor:
    r"""Keep the largest entries of each chunk of neighbours, the same number of each.

    With :math:`m = \lceil d / \mathrm{chunk} \rceil` chunks of at most
    :math:`c = \lceil d / m \rceil` entries, :math:`q = \lceil k / m \rceil` of each,

    .. math:: \|C(v) - v\|^2 \le (1 - q/c) \|v\|^2.

    The contraction of :func:`top_k`, k / d, but for the rounding of q and c, and nearly
    what it keeps where large entries are spread out. It takes no less time, and short
    chunks take more; its messages are shorter. An index counts to c alone: two
    bytes for chunks of up to 65536 entries, one for 256. Where d is no multiple of m
    the last chunk is shorter, and what it then has too few of is sent as zeros.

    Args:
        k: entries in all, m q being sent; int = entries, float = fraction of the
            length.
        chunk: the longest a chunk may be, up to 65536.

    Returns:
        A biased compressor with ``delta = min(1, q / c)``; a kept entry costs its own
        bytes and an index of one or two.

    Raises:
        ValueError: if ``k`` is neither, or ``chunk`` no integer from 1 to 65536; at
            trace time, if ``k`` exceeds the length.

    Examples:
        >>> v = jnp.array([1.0, -5.0, 4.0, 2.0, 3.0, 0.5])
        >>> top = chunked_top_k(2, chunk=3)
        >>> payload, _ = top.compress(None, v, ())
        >>> top.decompress(payload, v).tolist(), payload.indices.dtype
        ([0.0, -5.0, 0.0, 0.0, 3.0, 0.0], dtype('uint8'))
    """
    kept = counter("chunked_top_k", k)
    whole = isinstance(chunk, numbers.Integral) and not isinstance(chunk, bool)
    if not whole or not 1 <= chunk <= 65536:
        raise ValueError(
            "`chunked_top_k(k, chunk)` needs an integer chunk from 1 to 65536 (what an "
            f"index of two bytes counts), got chunk={chunk!r}. Write e.g. "
            "`chunked_top_k(0.1, chunk=256)`."
        )

    def sizes(d, k):
        """Chunks, their length, and the entries kept of each."""
        m = num_rows(int(chunk), d)
        c = num_rows(m, d)
        return m, c, min(c, num_rows(m, k))

    def select(key, v):
        del key
        m, c, q = sizes(v.size, entries("chunked_top_k", k, v.size))
        grid = jnp.pad(v, (0, m * c - v.size)).reshape(m, c)
        at = jax.vmap(lambda row: of_largest(row, q))(grid)
        values = jnp.take_along_axis(grid, at, axis=1)
        return Chunks(values.reshape(-1), at.reshape(-1).astype(narrow(c)))

    def indices(payload, d):
        m, c, q = sizes(d, kept(d))
        first = jax.lax.broadcasted_iota(jnp.int32, (m, q), 0) * c
        return payload.indices.astype(jnp.int32) + first.reshape(-1)

    def delta(d):
        _, c, q = sizes(d, min(kept(d), d))
        return min(1.0, q / c)

    return sparsifier(select, indices, delta=delta)
