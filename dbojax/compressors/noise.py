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


def mix(h: jax.Array) -> jax.Array:
    """Permute 32-bit words so that each bit depends on all bits.

    References:
        Wellons (2018), "Prospecting for hash functions", constants of ``lowbias32``.
    """
    h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    return h ^ (h >> 16)


def hashed(seed: jax.Array, counter: jax.Array) -> jax.Array:
    """One 32-bit word per counter: two rounds, one per seed word."""
    first = mix(counter * np.uint32(0x9E3779B9) + seed[0])
    return mix(first ^ seed[1])


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


def grid(d: int) -> tuple[int, int]:
    """Sides of a nearly square grid with at least ``d`` cells, few of them too many."""
    side = math.isqrt(d - 1) + 1
    a = min(range(side, side // 2, -1), key=lambda a: -(-d // a) * a)
    return a, -(-d // a)


def distinct(seed: jax.Array, k: int, d: int) -> jax.Array:
    r"""Choose ``k`` different integers below ``d``, each with probability k / d.

    A Feistel network permutes the grid :math:`Z_a \times Z_b`, :math:`a b \ge d`, whose
    few cells beyond ``d`` are walked through (Black and Rogaway 2002, "cycle walking").
    A random rotation afterwards makes each single index uniform whatever the network
    does (up to d / 2^32), and the law of random_k needs no more than that.

    Args:
        seed: (2,) uint32.
        k: how many, at most ``d``.
        d: at most 2^30.

    Returns:
        Indices (k,) int32 without repeats; the same for the same seed.

    Examples:
        >>> sorted(distinct(jnp.array([1, 2], jnp.uint32), 7, 7).tolist())
        [0, 1, 2, 3, 4, 5, 6]
    """
    a, b = grid(d)
    keys = hashed(seed, jax.lax.iota(jnp.uint32, 5))

    def below(bound, h):  # the upper half of a word, scaled: no division
        return ((h >> 16) * np.uint32(bound)) >> 16

    def add_modulo(i, j, modulus):  # i, j < modulus
        total = i + j
        return jnp.where(total >= modulus, total - np.uint32(modulus), total)

    def two_rounds(r, sides):
        left, right = sides
        left = add_modulo(left, below(a, mix(right + keys[2 * r])), a)
        return left, add_modulo(right, below(b, mix(left + keys[2 * r + 1])), b)

    def permuted(i):
        sides = i // np.uint32(b), i % np.uint32(b)
        # A loop, lest the compiler computes an index anew at each of its uses.
        left, right = jax.lax.fori_loop(0, 2, two_rounds, sides)
        return left * np.uint32(b) + right

    found = permuted(jax.lax.iota(jnp.uint32, k))
    if a * b > d:
        found = jax.lax.while_loop(
            lambda i: jnp.any(i >= d),
            lambda i: jnp.where(i >= d, permuted(i), i),
            found,
        )
    return add_modulo(found, keys[4] % np.uint32(d), d).astype(jnp.int32)
