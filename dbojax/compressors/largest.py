"""The largest entries of a vector, exactly and without sorting it.

A threshold is found by counting. Whole passes that compare and add are quick, and a few
of them do: a sample says where to look, and counts say where to look next.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SAMPLE = 1024
_FEW = 128  # entries that a heap finds as soon as counting does
_RUN = 128  # entries that one sum counts


class Bracket(NamedTuple):
    """At least ``k`` entries are ``low`` or more, and fewer are ``high`` or more."""

    low: jax.Array
    high: jax.Array
    above_low: jax.Array  # how many
    above_high: jax.Array


def keep_largest(v: jax.Array, k: int) -> jax.Array:
    """The vector with all but its ``k`` entries of largest magnitude set to zero.

    What :func:`top_k` sends, for those who send nothing: a submodel, a simulation, an
    error feedback on one machine. Of equal entries the first are kept, and a NaN is
    larger than all numbers.

    Args:
        v: (d,), floating point.
        k: entries to keep, from 1 to d.

    Returns:
        An array like ``v``.

    Raises:
        ValueError: at trace time, if ``v`` is no vector of real floating-point numbers,
            or ``k`` no integer from 1 to d.

    Examples:
        >>> keep_largest(jnp.array([1.0, -5.0, 2.0, 4.0, -4.0]), 2).tolist()
        [0.0, -5.0, 0.0, 4.0, 0.0]
    """
    if jnp.ndim(v) != 1 or not jnp.issubdtype(v.dtype, jnp.floating):
        raise ValueError(
            "`keep_largest(v, k)` needs a vector of real floating-point numbers, got "
            f"{v.dtype}{list(jnp.shape(v))}. Ravel it, or map over it with `jax.vmap`."
        )
    whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
    if not whole or not 1 <= k <= v.size:
        raise ValueError(
            f"`keep_largest(v, k)` needs an integer k from 1 to d={v.size}, got "
            f"k={k!r}. For a fraction write e.g. `int(0.1 * v.size)`."
        )
    zeros = jnp.zeros_like(v)
    if k <= _FEW:
        at = by_heap(v, int(k))
        return zeros.at[at].set(v[at], unique_indices=True)
    return jnp.where(are_largest(v, int(k)), v, zeros)


def of_largest(v: jax.Array, k: int) -> jax.Array:
    """Indices of the ``k`` entries of largest magnitude, in any order: (k,) int32."""
    # Measured on CPU, where `lax.top_k` keeps a heap, for lengths from 1e3 to 1e6.
    if k <= max(2 * _FEW, v.size // 128):
        return by_heap(v, k)
    return jax.lax.platform_dependent(
        v, cpu=lambda v: largest(v, k), default=lambda v: by_heap(v, k)
    )


def by_heap(v: jax.Array, k: int) -> jax.Array:
    """The same, falling: what :func:`jax.lax.top_k` says."""
    return jax.lax.top_k(jnp.abs(v), k)[1]


def largest(v: jax.Array, k: int) -> jax.Array:
    """Indices of the ``k`` entries of largest magnitude, rising: (k,) int32."""
    return positions(are_largest(v, k), k)


def are_largest(v: jax.Array, k: int) -> jax.Array:
    """Whether an entry is among the ``k`` largest, the first of equal ones: (d,)."""
    ranks = magnitudes(v)
    found = threshold(ranks, k)
    place = jax.lax.iota(jnp.int32, v.size)
    last = last_of_equal(ranks, found, k)
    return (ranks > found.low) | ((ranks == found.low) & (place < last))


def magnitudes(v: jax.Array) -> jax.Array:
    """Integers from 0 in the order of ``|v|``, with NaNs behind infinity: (d,)."""
    info = jnp.finfo(v.dtype)
    kind = jnp.int64 if info.bits == 64 else jnp.int32
    word = np.dtype(f"uint{info.bits}").type
    bits = jax.lax.bitcast_convert_type(v, word) & word((1 << (info.bits - 1)) - 1)
    infinity = ((1 << (info.bits - 1 - info.nmant)) - 1) << info.nmant
    return jnp.minimum(bits.astype(kind), np.asarray(infinity + 1, kind))


def threshold(ranks: jax.Array, k: int) -> Bracket:
    """The highest ``low`` that ``k`` ranks reach, or one that just ``k`` do."""
    d, kind = ranks.size, ranks.dtype

    def unsettled(carry):
        b, _ = carry
        return (b.above_low > k) & (b.high - b.low > 1)

    def narrow(carry):
        b, guesses = carry
        counts = count(lambda at, r: r >= at, guesses, ranks)
        enough = counts >= k
        b = Bracket(
            jnp.max(jnp.where(enough, guesses, b.low)),
            jnp.min(jnp.where(enough, b.high, guesses)),
            jnp.min(jnp.where(enough, counts, b.above_low)),
            jnp.max(jnp.where(enough, b.above_high, counts)),
        )
        return b, next_guesses(b, k)

    b = Bracket(
        jnp.zeros((), kind), jnp.max(ranks) + 1, jnp.int32(d), jnp.zeros((), jnp.int32)
    )
    return jax.lax.while_loop(unsettled, narrow, (b, first_guesses(ranks, k)))[0]


def first_guesses(ranks: jax.Array, k: int) -> jax.Array:
    """Three guesses from a sample: about and on either side of the rank looked for."""
    sample = jnp.sort(ranks[:: -(-ranks.size // _SAMPLE)])
    p = k / ranks.size
    spread = 3 * (sample.size * p * (1 - p)) ** 0.5 + 1
    middle = sample.size * (1 - p)
    at = np.array([middle - spread, middle, middle + spread])
    at = np.clip(np.round(at), 0, sample.size - 1).astype(np.int32)
    return jnp.maximum(sample[at], 1)


def next_guesses(b: Bracket, k: int) -> jax.Array:
    """Three guesses: on either side of where the counts point to, and the middle."""
    wide = jnp.promote_types(jnp.float32, b.low.dtype)
    between = (b.above_low - b.above_high).astype(wide)
    aim = (b.above_low - k).astype(wide) / between
    slack = 1.5 / jnp.sqrt(between)
    span = (b.high - b.low).astype(wide)
    sides = jnp.stack([aim - slack, jnp.full_like(aim, 0.5), aim + slack])
    steps = (jnp.clip(sides, 0, 1) * span).astype(b.low.dtype)
    return jnp.clip(b.low + steps, b.low + 1, jnp.maximum(b.high - 1, b.low + 1))


def last_of_equal(ranks: jax.Array, found: Bracket, k: int) -> jax.Array:
    """How far entries at the threshold are kept: those at smaller indices."""
    wanted = k - found.above_high
    place = jax.lax.iota(jnp.int32, ranks.size)

    def unsettled(carry):
        low, high = carry
        return (found.above_low > k) & (high - low > 1)

    def narrow(carry):
        low, high = carry
        step = jnp.maximum((high - low) // 4, 1)
        guesses = jnp.minimum(low + step * jnp.arange(1, 4, dtype=jnp.int32), high)

        def equal_before(at, r, place):
            return (r == found.low) & (place < at)

        enough = count(equal_before, guesses, ranks, place) >= wanted
        low = jnp.max(jnp.where(enough, low, guesses))
        return low, jnp.min(jnp.where(enough, guesses, high))

    start = jnp.int32(0), jnp.int32(ranks.size)
    return jax.lax.while_loop(unsettled, narrow, start)[1]


def count(holds, guesses: jax.Array, *arrays: jax.Array) -> jax.Array:
    """For each of three guesses how many entries ``holds(guess, ...)``: (3,) int32."""
    whole = arrays[0].size // _RUN * _RUN
    runs = [array[:whole].reshape(-1, _RUN) for array in arrays]
    rest = [array[whole:][None] for array in arrays]

    def sums(parts):
        # As one reduction: one pass, and one kernel of whole registers.
        return jax.lax.reduce(
            [holds(guess, *parts).astype(jnp.int32) for guess in guesses],
            [np.int32(0)] * len(guesses),
            lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
            dimensions=(1,),
        )

    pairs = zip(sums(runs), sums(rest), strict=True)
    return jnp.stack([jnp.sum(many, dtype=jnp.int32) + few[0] for many, few in pairs])


def positions(mask: jax.Array, k: int) -> jax.Array:
    """Where a mask with ``k`` entries is set, rising: (k,) int32."""
    d = mask.size
    m = -(-d // 32)
    bits = jnp.pad(mask, (0, m * 32 - d)).reshape(m, 32).astype(jnp.uint32)
    lanes = jax.lax.broadcasted_iota(jnp.uint32, (m, 32), 1)
    words = jnp.sum(bits << lanes, axis=1, dtype=jnp.uint32)
    until = jnp.cumsum(
        jax.lax.population_count(words).astype(jnp.int32), dtype=jnp.int32
    )
    wanted = jax.lax.iota(jnp.int32, k)
    at = jnp.searchsorted(until, wanted, side="right").astype(jnp.int32)
    word = words[at]
    # The bit of this word with so many set ones before it, by halves.
    before = wanted - (until[at] - jax.lax.population_count(word).astype(jnp.int32))
    lane = jnp.zeros_like(wanted)
    for width in (16, 8, 4, 2, 1):
        half = (word >> lane.astype(jnp.uint32)) & np.uint32((1 << width) - 1)
        held = jax.lax.population_count(half).astype(jnp.int32)
        beyond = before >= held
        lane = jnp.where(beyond, lane + width, lane)
        before = jnp.where(beyond, before - held, before)
    return at * 32 + lane
