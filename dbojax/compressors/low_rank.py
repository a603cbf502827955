"""Low-rank messages: two thin factors in place of a matrix."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax.base import Compressor
from dbojax.compressors.lift import flat_like, per_leaf
from dbojax.compressors.quantised import widened


class Factors(NamedTuple):
    """Message of :func:`low_rank` for one leaf."""

    left: jax.Array  # (m, rank), orthonormal columns, at least float32
    right: jax.Array  # (n, rank)


def low_rank(rank: int, shape: tuple[int, int] | None = None) -> Compressor:
    r"""Project each leaf, seen as a matrix, on a few directions found by power steps.

    For a leaf :math:`M` of shape (m, n) and a start :math:`Q` of shape (n, rank),

    .. math::
        P = \mathrm{orth}(M Q), \qquad Q' = M^\top P, \qquad
        C(M) = P Q'^\top = P P^\top M,

    so that the error is a projection's, :math:`\|C(M) - M\|^2 = \|M\|^2 - \|Q'\|^2`.
    The sender tries two starts and sends the factors that keep more: the last
    :math:`Q'` (in the state; it turns repeated messages about one matrix into a power
    iteration, whose error never grows) and a fresh Gaussian one. The latter gives

    .. math::
        E\|C(M) - M\|^2 \le \Bigl(1 - \frac{\mathrm{rank}}{\min(m, n)}\Bigr) \|M\|^2

    whatever the past, an equality where all singular values are alike, and the error
    is zero where the rank of M is at most ``rank``.

    Proof. Let X be an orthonormal basis of the span of Q and :math:`B = M^\top M`.
    The factors keep :math:`\mathrm{tr}((X^\top B X)^{-1} X^\top B^2 X)`, which is at
    least :math:`\mathrm{tr}(X^\top B X) = \|M X\|^2` because
    :math:`X^\top B^2 X \succeq (X^\top B X)^2`. For a Gaussian Q only its part in the
    row space of M, of dimension k, counts; in there X is a uniform subspace and
    :math:`E\|M X\|^2 = (\mathrm{rank} / k) \|M\|^2` with :math:`k \le \min(m, n)`. The
    last :math:`Q'` alone has no such law: M may have turned orthogonal to it.

    Leaves of fewer than two axes, and those for which the factors would take at least
    as many bytes, travel as they are.

    Args:
        rank: columns of the factors.
        shape: (m, n), how to see each leaf, its entries row by row, and the rest filled
            with zeros; None: the first axis of the leaf against all others.

    Returns:
        A contraction with ``delta = rank / min(shape)``; without ``shape`` the law
        holds for any tree of d entries, ``delta = rank / isqrt(d)`` (at most 1), since
        min(m, n) is at most the root of m n. The message is a tuple with one entry
        per leaf.

    Raises:
        ValueError: if ``rank`` is not an integer >= 1 or ``shape`` is not a pair of
            such; at trace time, if a leaf has more than ``m n`` entries or is not real
            floating point.

    Examples:
        >>> m = jnp.outer(jnp.arange(4.0), jnp.arange(1.0, 7.0))  # rank one
        >>> c = low_rank(1)
        >>> payload, _ = c.compress(jax.random.key(0), m, c.init(m))
        >>> bool(jnp.allclose(c.decompress(payload, m), m)), dbo.trees.size(payload)
        (True, 10)

    References:
        Vogels, Karimireddy and Jaggi (2019), arXiv:1905.13727, PowerSGD; there the
        warm start is the only one, and averages are taken of the factors.
    """
    if not _is_count(rank):
        raise ValueError(
            "`low_rank(rank)` needs an integer rank >= 1 (columns of the factors), got "
            f"rank={rank!r}. Write e.g. `low_rank(4)`."
        )
    pair = isinstance(shape, tuple | list) and len(shape) == 2
    if shape is not None and not (pair and all(map(_is_count, shape))):
        raise ValueError(
            "`low_rank(rank, shape)` needs shape=(m, n) of two integers >= 1, or None "
            f"for the leaf's own axes, got shape={shape!r}. Write e.g. "
            "`low_rank(4, (100, 50))`."
        )

    def sides(leaf):
        """Shape of the matrix that a leaf is; None where it travels as it is."""
        dtype = flat_like(leaf).dtype
        size = math.prod(leaf.shape)
        if shape is None:
            if len(leaf.shape) < 2 or not size:
                return None
            m, n = leaf.shape[0], size // leaf.shape[0]
        else:
            m, n = shape
            if size > m * n:
                raise ValueError(
                    f"`low_rank(shape={(m, n)})` sees a leaf as {m * n} entries, got "
                    f"one of shape {tuple(leaf.shape)} with {size}. Give a shape with "
                    "m n at least that, or leave it out."
                )
        wide = jnp.promote_types(dtype, jnp.float32)
        dense = rank * (m + n) * wide.itemsize >= size * dtype.itemsize
        return None if dense else (m, n)

    def init(leaf):
        if (found := sides(leaf)) is None:
            return ()
        # Zeros keep nothing, so the fresh start wins in the first call.
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.zeros((found[1], rank), wide)

    def compress(key, leaf, warm):
        if (found := sides(leaf)) is None:
            return leaf, warm
        m, n = found
        flat = widened(leaf).reshape(-1)
        matrix = jnp.pad(flat, (0, m * n - flat.size)).reshape(m, n)
        fresh = jax.random.normal(key, warm.shape, warm.dtype)
        starts = jnp.stack([warm, fresh])
        # Both starts in one product: what costs is to read the matrix.
        images = jnp.einsum("mn,snr->smr", matrix, starts, precision="highest")
        lefts = jnp.linalg.qr(images)[0]
        rights = jnp.einsum("mn,smr->snr", matrix, lefts, precision="highest")
        kept = jnp.sum(rights**2, axis=(1, 2))
        # A NaN in the memory never wins; one in the matrix is in both.
        best = jnp.where(kept[0] > kept[1], 0, 1)
        sent = Factors(lefts[best], rights[best])
        # Its size is without meaning, and squares of it might leave the range.
        peak = jnp.max(jnp.abs(sent.right))
        return sent, sent.right / jnp.where(peak > 0, peak, 1)

    def decompress(payload, like):
        if not isinstance(payload, Factors):
            return payload
        matrix = jnp.matmul(payload.left, payload.right.T, precision="highest")
        size = math.prod(like.shape)
        return matrix.reshape(-1)[:size].reshape(like.shape).astype(like.dtype)

    def delta(d):
        if shape is None:
            return min(1.0, rank / max(1, math.isqrt(d)))
        return 1.0 if rank * sum(shape) >= d else rank / min(shape)

    leafwise = Compressor(init=init, compress=compress, decompress=decompress)
    return per_leaf(leafwise)._replace(delta=delta)


def _is_count(value) -> bool:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and int(value) >= 1
