"""Sparsifiers: a few entries travel, and what the receiver needs to place them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Compressor
from dbojax.compressors import noise
from dbojax.compressors.largest import of_largest
from dbojax.compressors.lift import on_trees, stateless

Count = int | float  # entries, or a fraction of the length


class Sparse(NamedTuple):
    """Message of a sparsifier that names its entries."""

    values: jax.Array  # (k,)
    indices: jax.Array  # (k,), the smallest unsigned type that counts to d


class Seeded(NamedTuple):
    """Message of a sparsifier whose entries follow from a seed."""

    values: jax.Array  # (k,)
    seed: jax.Array  # (2,) uint32


class Run(NamedTuple):
    """Message of :func:`strided_random_k`."""

    values: jax.Array  # (k,)
    row: jax.Array  # (), the smallest unsigned type that counts the runs


def counter(name: str, count: Count) -> Callable[[int], int]:
    """Turn a count into entries as a function of the length, ``ceil(f d - 1e-9)``."""
    if not isinstance(count, bool):
        if isinstance(count, numbers.Integral) and count >= 1:
            return lambda d: int(count)
        if isinstance(count, float | np.floating) and 0 < count <= 1:
            return lambda d: max(1, math.ceil(float(count) * d - 1e-9))
    raise ValueError(
        f"`{name}(k)` needs an int k >= 1 (entries) or a float 0 < k <= 1 (a fraction "
        f"of the length), got k={count!r}. Write e.g. `{name}(50)` or `{name}(0.1)`."
    )


def entries(name: str, count: Count, d: int) -> int:
    """How many of ``d`` entries a count keeps; refuses more than there are."""
    k = counter(name, count)(d)
    if k > d:
        raise ValueError(
            f"`{name}(k={k})` needs a vector of at least k entries, got d={d}. "
            f"Lower k, or give a fraction of the length, e.g. `{name}(0.1)`."
        )
    return k


def num_rows(k: int, d: int) -> int:
    """Rows of a grid with ``k`` columns for ``d`` entries."""
    return -(-d // k)


def narrow(length: int) -> np.dtype:
    """Smallest unsigned integer type that counts from 0 to ``length - 1``."""
    return np.min_scalar_type(length - 1)


def sparsifier(
    select: Callable[[jax.Array, jax.Array], Any],
    indices: Callable[[Any, int], jax.Array],
    gain: Callable[[int], float] = lambda d: 1.0,
    **law: Callable[[int], float],
) -> Compressor:
    """Compressor that sends ``values`` and knows where they belong.

    Args:
        select: ``(key, vector) -> payload`` with a field ``values``.
        indices: ``(payload, d) -> (k,)`` int32 without repeats; those beyond ``d`` are
            dropped.
        gain: what the receiver multiplies the values by.
        law: ``delta`` or ``omega``.
    """

    def place(payload, d):
        values = payload.values if gain(d) == 1 else gain(d) * payload.values
        return indices(payload, d), values

    def decompress(payload, like):
        at, values = place(payload, like.size)
        zeros = jnp.zeros(like.shape, like.dtype)
        return zeros.at[at].set(
            values.astype(like.dtype), mode="drop", unique_indices=True
        )

    def add(payload, scale, into):
        at, values = place(payload, into.size)
        change = (scale * values).astype(into.dtype)
        return into.at[at].add(change, mode="drop")

    def add_all(payloads, scales, into):
        # One scatter goes through a node's messages while its memory is in the cache.
        at, values = jax.vmap(lambda one: place(one, into.size))(payloads)
        changes = (scales[:, None] * values).astype(into.dtype)
        return into.at[at.reshape(-1)].add(changes.reshape(-1), mode="drop")

    return on_trees(stateless(select, decompress, add, add_all=add_all, **law))


def top_k(k: Count) -> Compressor:
    r"""Keep the ``k`` entries of largest magnitude, exactly.

    .. math:: \|C(v) - v\|^2 \le (1 - k/d) \|v\|^2.

    Some tens of passes over the vector. :func:`chunked_top_k` keeps
    nearly as much with shorter indices, :func:`block_top_k` costs a fraction. Of equal
    entries the first are kept. A receiver may rely on the set of entries and not on
    their order.

    Args:
        k: int = entries, float = fraction of the length.

    Returns:
        A biased compressor with ``delta = k / d``; a kept entry costs its own bytes
        and an index of one, two or four.

    Raises:
        ValueError: if ``k`` is neither; at trace time, if it exceeds the length.

    Examples:
        >>> v = jnp.array([1.0, -5.0, 2.0, 4.0])
        >>> top = top_k(2)
        >>> payload, _ = top.compress(None, v, ())
        >>> top.decompress(payload, v).tolist(), payload.indices.dtype
        ([0.0, -5.0, 0.0, 4.0], dtype('uint8'))

    References:
        Stich, Cordonnier and Jaggi (2018), arXiv:1809.07599.
    """
    kept = counter("top_k", k)

    def select(key, v):
        del key
        at = of_largest(v, entries("top_k", k, v.size))
        return Sparse(v[at], at.astype(narrow(v.size)))

    def indices(payload, d):
        del d
        return payload.indices.astype(jnp.int32)

    return sparsifier(select, indices, delta=lambda d: min(1.0, kept(d) / d))


def random_k(k: Count) -> Compressor:
    r"""Keep ``k`` random entries and multiply them by ``d / k``.

    .. math::
        E\,C(v) = v, \qquad E\|C(v) - v\|^2 = (d/k - 1) \|v\|^2.

    Sender and receiver draw the same entries, without repeats, from two seed words, so
    no index travels. ``scaled(random_k(k))`` takes the factor back: the ``k / d``
    contraction.

    Args:
        k: int = entries, float = fraction of the length.

    Returns:
        An unbiased compressor with ``omega = d / k - 1``; a message costs the kept
        entries and eight bytes.

    Raises:
        ValueError: if ``k`` is neither; at trace time, if it exceeds the length.

    Examples:
        >>> v, c = jnp.arange(1.0, 9.0), random_k(2)
        >>> payload, _ = c.compress(jax.random.key(0), v, ())
        >>> kept = c.decompress(payload, v)
        >>> int((kept != 0).sum()), bool(((kept == 0) | (kept == 4 * v)).all())
        (2, True)
    """
    kept = counter("random_k", k)

    def select(key, v):
        seed = noise.words(key)
        return Seeded(
            v[noise.distinct(seed, entries("random_k", k, v.size), v.size)], seed
        )

    def indices(payload, d):
        return noise.distinct(payload.seed, payload.values.size, d)

    def gain(d):
        return max(1.0, d / kept(d))

    return sparsifier(select, indices, gain, omega=lambda d: gain(d) - 1)


def strided_random_k(k: Count) -> Compressor:
    r"""Keep one random run of ``k`` neighbouring entries out of ``m = ceil(d / k)``.

    .. math::
        C(v) = m\, v_{[rk, rk + k)}, \quad r \sim U\{0, \dots, m - 1\}, \qquad
        E\,C(v) = v, \quad E\|C(v) - v\|^2 = (m - 1) \|v\|^2.

    The cheapest sparsifier: one slice. Its entries come and go together, so it suits
    vectors whose neighbours are alike in size.

    Args:
        k: int = entries, float = fraction of the length.

    Returns:
        An unbiased compressor with ``omega = ceil(d / k) - 1``; a message costs the
        kept entries and one row number.

    Raises:
        ValueError: if ``k`` is neither; at trace time, if it exceeds the length.

    Examples:
        >>> v, c = jnp.arange(1.0, 7.0), strided_random_k(2)
        >>> payload, _ = c.compress(jax.random.key(0), v, ())
        >>> kept = c.decompress(payload, v).reshape(3, 2)
        >>> int((kept != 0).all(axis=1).sum()), int((kept == 0).all(axis=1).sum())
        (1, 2)
    """
    kept = counter("strided_random_k", k)

    def at(row, columns):
        return row.astype(jnp.int32) * columns + jax.lax.iota(jnp.int32, columns)

    def select(key, v):
        columns = entries("strided_random_k", k, v.size)
        m = num_rows(columns, v.size)
        row = jax.random.randint(key, (), 0, m).astype(narrow(m))
        values = v.at[at(row, columns)].get(mode="fill", fill_value=0)
        return Run(values, row)

    def indices(payload, d):
        del d
        return at(payload.row, payload.values.size)

    def gain(d):
        return float(num_rows(min(kept(d), d), d))

    return sparsifier(select, indices, gain, omega=lambda d: gain(d) - 1)
