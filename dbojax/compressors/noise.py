"""Cheap randomness for compressors: hashes of a counter, keyed by two words.

Stochastic rounding and random subsets need many draws of modest quality, and a hash of
a counter costs a small part of what JAX's default generator does.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def words(key: jax.Array) -> jax.Array:
    """Two seed words of a key, typed or raw: (2,) uint32."""
    return jax.random.bits(key, (2,), jnp.uint32)


def hashed(seed: jax.Array, counter: jax.Array) -> jax.Array:
    """One 32-bit word per counter, each bit of it a function of all bits of three.

    The first seed word says where the stream begins, and the second enters half-way,
    so that two streams that overlap differ all the same.

    References:
        Wellons (2018), "Prospecting for hash functions", constants of ``lowbias32``.
    """
    h = counter + seed[0]
    h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D) ^ seed[1]
    h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    return h ^ (h >> 16)


def counter_uniform(key: jax.Array, shape=(), dtype=jnp.float32) -> jax.Array:
    """Uniform numbers in [0, 1) from a hash of their position.

    A stand-in for :func:`jax.random.uniform` at a small part of its cost, good enough
    for stochastic rounding and not for cryptography. At most 32 bits are random, so in
    float64 the numbers are multiples of 2^-32.

    Args:
        key: typed or raw; two words of it seed the hash.
        shape: of the result, fewer than 2^32 entries.
        dtype: floating point.

    Returns:
        An array of ``shape`` and ``dtype``.

    Examples:
        >>> u = counter_uniform(jax.random.key(0), (10_000,))
        >>> bool((u >= 0).all() & (u < 1).all()), bool(jnp.abs(u.mean() - 0.5) < 0.02)
        (True, True)
    """
    bits = min(32, jnp.finfo(dtype).nmant + 1)
    counter = jax.lax.iota(jnp.uint32, math.prod(shape))
    fraction = hashed(words(key), counter) >> np.uint32(32 - bits)
    return (fraction.astype(dtype) * np.asarray(2.0**-bits, dtype)).reshape(shape)


def draws(uniform, key: jax.Array, shape, dtype, bits: int) -> jax.Array:
    """Integers below ``2**bits`` from a source of uniform numbers of ``dtype``.

    Those of :func:`counter_uniform` need not become floating point on their way.
    """
    word = np.dtype(f"uint{jnp.finfo(dtype).bits}")
    if uniform is not counter_uniform:
        fractions = uniform(key, shape, dtype) * np.asarray(2.0**bits, dtype)
        return fractions.astype(f"int{jnp.finfo(dtype).bits}").astype(word)
    random = hashed(words(key), jax.lax.iota(jnp.uint32, math.prod(shape)))
    random = (random >> np.uint32(max(0, 32 - bits))).astype(word).reshape(shape)
    return random << word.type(max(0, bits - 32))


def distinct(seed: jax.Array, k: int, d: int) -> jax.Array:
    r"""Choose ``k`` different integers below ``d``, each with probability k / d.

    One from each of ``k`` runs of neighbours on a circle of length ``d``, of
    :math:`\lfloor d/k \rfloor` or one more. Where the circle begins is random, which
    makes each single index uniform (up to d / 2^32) whatever the lengths of the runs,
    and the law of random_k needs no more than that. Read in order, they cost a part of
    what scattered ones do.

    Args:
        seed: (2,) uint32.
        k: how many, at most ``d``.
        d: at most 2^30.

    Returns:
        Indices (k,) int32 without repeats, rising but for one step back; the same for
        the same seed.

    Examples:
        >>> sorted(distinct(jnp.array([1, 2], jnp.uint32), 7, 7).tolist())
        [0, 1, 2, 3, 4, 5, 6]
    """
    length, longer = divmod(d, k)
    runs = jax.lax.iota(jnp.uint32, k)
    lengths = np.uint32(length) + (runs < longer).astype(jnp.uint32)
    random = hashed(seed, runs)
    # The upper bits, scaled, where that fits into a word: no division.
    steps = ((random >> 8) * lengths) >> 24 if length < 256 else random % lengths
    begin = hashed(seed, jnp.uint32(k)) % np.uint32(d)
    at = begin + runs * np.uint32(length) + jnp.minimum(runs, np.uint32(longer)) + steps
    return jnp.where(at >= d, at - np.uint32(d), at).astype(jnp.int32)
