"""Dense messages: every entry travels, in fewer bits."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Compressor
from dbojax.compressors.lift import on_trees, stateless
from dbojax.compressors.noise import counter_uniform


class Packed(NamedTuple):
    """Message of a quantiser."""

    words: jax.Array  # (ceil(d / (32 // bits)),) uint32, several entries in each
    scale: jax.Array  # (), at least float32


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Put ``32 // bits`` codes into each word; a code is an integer below ``2**bits``.

    Neighbours share a word, so that both directions are one pass over the codes.
    """
    return jnp.sum(shifted(codes, bits), axis=1, dtype=jnp.uint32)


def unpack(words: jax.Array, bits: int, d: int) -> jax.Array:
    """Undo :func:`pack` for ``d`` codes: (d,) uint32."""
    words = jnp.broadcast_to(words[:, None], (words.size, 32 // bits))
    return ((words >> places(words, bits)) & np.uint32((1 << bits) - 1)).reshape(-1)[:d]


def shifted(codes: jax.Array, bits: int) -> jax.Array:
    """Each code at its place in its word: (words, 32 // bits) uint32."""
    runs = in_runs(codes, 32 // bits).astype(jnp.uint32)
    return runs << places(runs, bits)


def places(rows: jax.Array, bits: int) -> jax.Array:
    """Where in its word each code of a row begins; ``rows`` are (m, 32 // bits)."""
    # XLA would make a constant of this and hand it to every use as data, where the
    # shifts then are not known and cost thrice as much. It does not know this zero;
    # the compiler of the kernel does.
    zero = (rows >> np.uint32(31)) >> np.uint32(1)
    return (jax.lax.broadcasted_iota(jnp.uint32, rows.shape, 1) + zero) * np.uint32(
        bits
    )


@jax.custom_jvp
def words_and_sums(bits: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """32 neighbours at a time: their bits packed, and the sum of their values."""
    # Both in one pass, padded apart, lest the compiler store what they share.
    return tuple(
        jax.lax.reduce(
            (shifted(bits, 1), in_runs(values, 32)),
            (np.uint32(0), np.zeros((), values.dtype)),
            lambda a, b: (a[0] | b[0], a[1] + b[1]),
            dimensions=(1,),
        )
    )


@words_and_sums.defjvp
def _(primals, tangents):
    # JAX has no derivative of a reduction of which but one part has a tangent.
    words, sums = words_and_sums(*primals)
    none: Any = np.zeros(words.shape, jax.dtypes.float0)
    return (words, sums), (none, jnp.sum(in_runs(tangents[1], 32), axis=1))


def in_runs(v: jax.Array, length: int) -> jax.Array:
    """``v`` in rows of ``length`` neighbours, with zeros at its end."""
    rows = -(-v.size // length)
    return jnp.pad(v, (0, rows * length - v.size)).reshape(rows, length)


def for_runs(values: jax.Array, length: int, d: int) -> jax.Array:
    """One value for each row of :func:`in_runs`, repeated for its entries: (d,)."""
    return jnp.broadcast_to(values[:, None], (values.size, length)).reshape(-1)[:d]


def low_bits(whole: jax.Array, bits: int) -> jax.Array:
    """Whole floating-point numbers modulo ``2**bits``, without a conversion.

    One costs several instructions, for numbers out of range. Beside a number that
    fills the mantissa, the lowest bits of the sum are the number's own.
    """
    info = jnp.finfo(whole.dtype)
    filled = whole + np.asarray(1.5 * 2.0**info.nmant, whole.dtype)
    word = np.dtype(f"uint{info.bits}").type
    return jax.lax.bitcast_convert_type(filled, word) & word((1 << bits) - 1)


def at_random(u: jax.Array, draws: jax.Array) -> jax.Array:
    """The whole part of ``u``, and one more with the probability of the rest.

    ``ceil(u - draws)`` would round the difference, and lose a whole step of a whole
    ``u`` now and then.
    """
    floor = jnp.floor(u)
    return jnp.where(draws < u - floor, floor + 1, floor)


def widened(v: jax.Array) -> jax.Array:
    """``v`` in at least float32, so that sums and scales keep their digits."""
    return v.astype(jnp.promote_types(v.dtype, jnp.float32))


def identity() -> Compressor:
    """Send everything as it is.

    Returns:
        A compressor whose payload is the tree itself; ``delta = 1``, ``omega = 0``.

    Examples:
        >>> v, c = jnp.arange(3.0), identity()
        >>> payload, _ = c.compress(None, v, ())
        >>> bool((c.decompress(payload, v) == v).all())
        True
    """
    return stateless(
        compress=lambda key, v: v,
        decompress=lambda payload, like: payload,
        delta=lambda d: 1.0,
        omega=lambda d: 0.0,
    )


def qsgd(
    levels: int, uniform: Callable[[Any, Any, Any], jax.Array] = counter_uniform
) -> Compressor:
    r"""Round each magnitude at random to one of ``levels`` steps of the norm.

    With :math:`s` levels and :math:`u_j = s |v_j| / \|v\|_2`,

    .. math::
        C(v)_j = \|v\|_2 \, \mathrm{sign}(v_j) \, q_j / s, \qquad
        q_j = \lfloor u_j \rfloor + \mathrm{Ber}(u_j - \lfloor u_j \rfloor),

    so that :math:`E\,C(v) = v` and
    :math:`E\|C(v) - v\|^2 \le \min(d/s^2, \sqrt d / s) \|v\|^2`. For a contraction
    write ``scaled(qsgd(levels))``. The norm is a plain sum of squares: float32 vectors
    shorter than about 1e-19 come out as zero, longer than 1e19 as NaN.

    Args:
        levels: steps between zero and the norm, at most 32767. An entry takes
            ``ceil(log2(2 levels + 1))`` bits; 1, 3, 7, 15 and 127 use them fully.
        uniform: ``(key, shape, dtype) -> [0, 1)``; ``jax.random.uniform`` costs more.

    Returns:
        An unbiased compressor whose message is packed words and the norm.

    Raises:
        ValueError: if ``levels`` is not an integer from 1 to 32767.

    Examples:
        >>> v, c = jnp.array([3.0, 0.0, -4.0]), qsgd(5)  # whole u
        >>> payload, _ = c.compress(jax.random.key(0), v, ())
        >>> np.allclose(c.decompress(payload, v), v), payload.words.shape
        (True, (1,))

    References:
        Alistarh et al. (2017), arXiv:1610.02132; the norm is of the whole vector.
    """
    whole = isinstance(levels, numbers.Integral) and not isinstance(levels, bool)
    if not whole or not 1 <= levels <= 32767:
        raise ValueError(
            "`qsgd(levels)` needs an integer from 1 to 32767 (beyond that an entry "
            f"fills a whole word), got levels={levels!r}. Write e.g. "
            "`qsgd(7)`, four bits."
        )
    s, bits = int(levels), (2 * int(levels)).bit_length()

    def compress(key, v):
        v = widened(v)
        norm = jnp.sqrt(jnp.vdot(v, v, precision="highest"))
        u = jnp.abs(v) * (s / jnp.maximum(norm, s * jnp.finfo(v.dtype).tiny))
        q = at_random(u, uniform(key, v.shape, v.dtype))
        # The norm is rounded too: its own entry may come out above s by an ulp.
        q = jnp.where(q > s, jnp.asarray(s, v.dtype), q)
        return Packed(pack(low_bits(jnp.where(v < 0, s - q, s + q), bits), bits), norm)

    def decompress(payload, like):
        steps = unpack(payload.words, bits, like.size).astype(jnp.int32) - s
        kind = payload.scale.dtype
        # As u is scaled; and a norm that is not finite makes all of them NaN.
        return (payload.scale * (steps.astype(kind) / s)).astype(like.dtype)

    def omega(d):
        return min(d / s**2, d**0.5 / s)

    return on_trees(stateless(compress, decompress, omega=omega))


def sign() -> Compressor:
    r"""Send one bit per entry and the mean magnitude.

    .. math::
        C(v) = \frac{\|v\|_1}{d} \, \mathrm{sign}(v), \qquad
        \|C(v) - v\|^2 = \|v\|^2 - \|v\|_1^2 / d \le (1 - 1/d) \|v\|^2,

    with sign(0) = +1. The worst case is a single entry; dense vectors do far better
    (:math:`\delta \approx 2/\pi` for Gaussian entries).

    Returns:
        A biased compressor with ``delta = 1 / d`` whose message is packed words and the
        scale.

    Examples:
        >>> v, c = jnp.array([1.0, -3.0, 0.0, 4.0]), sign()
        >>> payload, _ = c.compress(None, v, ())
        >>> c.decompress(payload, v).tolist(), payload.words.nbytes
        ([2.0, -2.0, 2.0, 2.0], 4)

    References:
        Karimireddy et al. (2019), arXiv:1901.09847.
    """

    def compress(key, v):
        del key
        magnitude = jnp.abs(widened(v))
        words, sums = words_and_sums(v >= 0, magnitude)
        return Packed(words, jnp.sum(sums) / v.size)

    def decompress(payload, like):
        positive = unpack(payload.words, 1, like.size) == 1
        return jnp.where(positive, payload.scale, -payload.scale).astype(like.dtype)

    return on_trees(stateless(compress, decompress, delta=lambda d: 1 / d))


def cast(dtype: Any) -> Compressor:
    r"""Send each entry in a shorter floating-point type.

    .. math:: |C(v)_j - v_j| \le \epsilon |v_j|, \qquad \delta = 1 - \epsilon^2,

    with :math:`\epsilon` of the type (2^-10 for float16, 2^-7 for bfloat16), for
    entries within its normal range. Beyond the range an entry saturates at the largest
    finite value, below it loses digits and then becomes zero: the error is then larger,
    but never above :math:`|v_j|`. float16 has little range (6e-5 to 65504), so
    differences that vanish want bfloat16. Infinities and NaNs travel.

    The message is a bit pattern of unsigned integers: some back ends would carry
    short floats across a link as float32.

    Args:
        dtype: ``jnp.float16``, ``jnp.bfloat16`` or ``jnp.float32``.

    Returns:
        A deterministic compressor.

    Raises:
        ValueError: if ``dtype`` is another one.

    Examples:
        >>> v, c = jnp.array([1.0, -0.5, 1e30]), cast(jnp.float16)
        >>> payload, _ = c.compress(None, v, ())
        >>> c.decompress(payload, v).tolist(), payload.dtype
        ([1.0, -0.5, 65504.0], dtype('uint16'))
    """
    short = jnp.dtype(dtype)
    patterns = {"float16": jnp.uint16, "bfloat16": jnp.uint16, "float32": jnp.uint32}
    if short.name not in patterns:
        raise ValueError(
            f"`cast(dtype)` needs one of {', '.join(patterns)}, got {short.name}. "
            "Write e.g. `cast(jnp.bfloat16)`."
        )
    limits = jnp.finfo(short)

    def compress(key, v):
        del key
        if jnp.finfo(v.dtype).max > limits.max:
            largest = jnp.asarray(limits.max, v.dtype)
            v = jnp.where(jnp.isfinite(v), jnp.clip(v, -largest, largest), v)
        if jnp.finfo(v.dtype).bits > limits.bits:
            # Back and forth in one program, XLA may leave a conversion out, and not
            # this, which turns what is below the normal range into zeros.
            rounded = jax.lax.reduce_precision(v, limits.nexp, limits.nmant)
            v = jnp.where(jnp.abs(v) < float(limits.tiny), v, rounded)
        return jax.lax.bitcast_convert_type(v.astype(short), patterns[short.name])

    def decompress(payload, like):
        return jax.lax.bitcast_convert_type(payload, short).astype(like.dtype)

    def delta(d):
        del d
        return 1 - float(limits.eps) ** 2

    return on_trees(stateless(compress, decompress, delta=delta))
