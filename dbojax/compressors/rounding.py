"""Unbiased rounding to few values: powers of two, and 8-bit integers with scales."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Compressor
from dbojax.compressors.lift import on_trees, stateless
from dbojax.compressors.noise import counter_uniform, draws
from dbojax.compressors.quantised import (
    at_random,
    for_runs,
    in_runs,
    low_bits,
    pack,
    unpack,
    widened,
)


class Powers(NamedTuple):
    """Message of :func:`natural`.

    Code 0 is zero, the last an entry that is not finite, the last but one the largest
    number; the others are the exponent fields of floating point from 2 on, less one.
    """

    codes: jax.Array  # (d,) uint8; of float64 uint16, the sign in bit 11
    signs: Any  # (ceil(d / 32),) uint32, one bit an entry; of float64 ()


class Integers(NamedTuple):
    """Message of :func:`int8`."""

    codes: jax.Array  # (d,) int8, from -127 to 127
    scales: jax.Array  # (ceil(d / block),), what 127 stands for; at least float32


def natural(
    uniform: Callable[[Any, Any, Any], jax.Array] = counter_uniform,
) -> Compressor:
    r"""Round each magnitude at random to one of the two powers of two around it.

    With :math:`|v_j| = 2^e (1 + f)`, :math:`0 \le f < 1`,

    .. math::
        C(v)_j = \mathrm{sign}(v_j) \, 2^{e + \mathrm{Ber}(f)}, \qquad
        E\,C(v) = v, \qquad E\|C(v) - v\|^2 \le \tfrac18 \|v\|^2,

    since :math:`f(1 - f) \le (1 + f)^2 / 8`, with equality at :math:`f = 1/3`. Powers
    of two and zero pass unchanged, whatever the length.

    A message is the exponent, one byte an entry, and a packed sign, nine bits in all.
    The eleven bits of a float64 exponent do not fit into a byte: there an entry takes a
    uint16, its sign included. At the ends of the range:

    - Below the smallest power, twice the smallest normal number (2e-38 in float32), an
      entry becomes that power or zero, without bias; its variance is then at most a
      quarter of that power squared, which is not relative to the entry.
    - The power above the largest finite number of the dtype is replaced by that number,
      a bias of half a unit in the last place, so nothing finite overflows.
    - Infinities and NaNs arrive as NaN.

    Args:
        uniform: ``(key, shape, dtype) -> [0, 1)``; ``jax.random.uniform`` costs more.

    Returns:
        An unbiased compressor with ``omega = 1 / 8``.

    Examples:
        >>> v, c = jnp.array([4.0, -0.25, 0.0, 3.0], jnp.float32), natural()
        >>> payload, _ = c.compress(jax.random.key(0), v, ())
        >>> got = c.decompress(payload, v).tolist()
        >>> got[:3], got[3] in (2.0, 4.0), payload.codes.nbytes
        ([4.0, -0.25, 0.0], True, 4)

    References:
        Horváth et al. (2019), arXiv:1905.10988.
    """

    def compress(key, v):
        v = widened(v)
        info = jnp.finfo(v.dtype)
        digits, last = info.nmant, (1 << (info.bits - 1 - info.nmant)) - 1
        word = np.dtype(f"uint{info.bits}").type
        bits = jax.lax.bitcast_convert_type(v, word)
        sign = word(1 << (info.bits - 1))
        magnitude = bits & (sign - word(1))
        draw = draws(uniform, key, v.shape, v.dtype, digits + 1)
        # Below the exponent lies f in units of 2^-digits: adding as many random bits
        # carries with probability f. Below the smallest power the bits, denormal or
        # not, are the entry itself in units of 2^-(digits + 1) of that power.
        low = (magnitude + draw) >> word(digits + 1)
        high = ((magnitude + (draw >> word(1))) >> word(digits)) - word(1)
        codes = jnp.where(magnitude < word(2 << digits), low, high)
        codes = jnp.where(magnitude >= word(last << digits), word(last), codes)
        # Signs of the input, so that packing them does not draw all over again.
        negative = bits >= sign
        if info.bits == 32:
            return Powers(codes.astype(jnp.uint8), pack(negative, 1))
        signs = negative.astype(jnp.uint16) << np.uint16(11)
        return Powers(codes.astype(jnp.uint16) | signs, ())

    def decompress(payload, like):
        if payload.codes.dtype == jnp.uint8:
            word, kind, digits, last = np.uint32, jnp.float32, 23, 255
            codes, negative = payload.codes, unpack(payload.signs, 1, like.size) == 1
        else:
            word, kind, digits, last = np.uint64, jnp.float64, 52, 2047
            codes, negative = payload.codes & 2047, payload.codes > 2047
        field = jnp.where(codes > 0, codes.astype(word) + word(1), word(0))
        power = jax.lax.bitcast_convert_type(field << word(digits), kind)
        largest = float(min(jnp.finfo(like.dtype).max, jnp.finfo(kind).max))
        power = jnp.where(codes == last, jnp.nan, jnp.minimum(power, largest))
        return jnp.where(negative, -power, power).astype(like.dtype)

    return on_trees(stateless(compress, decompress, omega=lambda d: 1 / 8))


def int8(
    block: int | None = 1024,
    uniform: Callable[[Any, Any, Any], jax.Array] = counter_uniform,
) -> Compressor:
    r"""Round at random to 8-bit integers, with one scale per block of neighbours.

    In a block :math:`b` of :math:`m` entries, with :math:`s = \max_{i \in b}|v_i|/127`,

    .. math::
        C(v)_j = s \, (\lfloor u_j \rfloor + \mathrm{Ber}(u_j - \lfloor u_j \rfloor)),
        \quad u_j = v_j / s, \qquad E\,C(v) = v,

    .. math::
        E\|C(v) - v\|^2 \le \omega \|v\|^2, \qquad
        \omega = \tfrac12 \Bigl(\sqrt{1 + (m - 1) / 127^2} - 1\Bigr)
        \le \frac{m - 1}{4 \cdot 127^2}.

    Proof. In units of s an entry adds :math:`f(1 - f)` to the variance, f being the
    fractional part of :math:`|u|`, and :math:`u^2 \ge f^2` to the squared norm. The
    largest has u = 127 and adds nothing to the variance, so a block's ratio is at most
    :math:`\sum f_j (1 - f_j) / (127^2 + \sum f_j^2)` over the other m - 1 entries.
    For given :math:`\sum f_j^2` all :math:`f_j` alike are worst (Cauchy and Schwarz on
    :math:`\sum f_j`), and with :math:`a = 127^2 / (m - 1)` the
    maximum of :math:`f(1 - f)/(a + f^2)` is at :math:`f = 1/(1 + \sqrt{1 + 1/a})`,
    where it is the omega above: the law is sharp. Errors of blocks add up, so the
    longest block counts.

    A block of 1024 costs 0.4 % more bytes than one scale for all and keeps omega below
    0.016 for every length; one scale for a million entries has omega = 3.4. A block
    with an infinity or a NaN comes out with NaNs. Scales are at least 127 times the
    smallest normal number (1e-36 in float32): entries far below stay unbiased, with a
    variance that is not relative to them.

    Args:
        block: entries that share a scale; None: all.
        uniform: ``(key, shape, dtype) -> [0, 1)``; ``jax.random.uniform`` costs more.

    Returns:
        An unbiased compressor whose message is one byte an entry and the scales.

    Raises:
        ValueError: if ``block`` is neither None nor an integer >= 1.

    Examples:
        >>> v, c = jnp.array([127.0, -3.0, 0.0, 1.0]), int8()  # whole u
        >>> payload, _ = c.compress(jax.random.key(0), v, ())
        >>> c.decompress(payload, v).tolist(), payload.codes.dtype
        ([127.0, -3.0, 0.0, 1.0], dtype('int8'))
        >>> int8(1024).omega(10**6) < 0.016 < 3.4 < int8(None).omega(10**6)
        True

    References:
        Alistarh et al. (2017), arXiv:1610.02132, section 4, scale by the largest entry
        of a bucket; the constant is ours.
    """
    whole = isinstance(block, numbers.Integral) and not isinstance(block, bool)
    if block is not None and not (whole and block >= 1):
        raise ValueError(
            "`int8(block)` needs an integer block >= 1 (entries that share a scale) or "
            f"None (one scale for all), got block={block!r}. Write e.g. `int8(1024)`."
        )

    def width(d):
        return d if block is None else min(int(block), d)

    def in_blocks(v):
        return in_runs(v, width(v.size))

    def compress(key, v):
        v = widened(v)
        none = np.zeros((), v.dtype)
        highest, lowest = jax.lax.reduce(
            (in_blocks(v), in_blocks(-v)),
            (none, none),
            lambda a, b: (jnp.maximum(a[0], b[0]), jnp.maximum(a[1], b[1])),
            dimensions=(1,),
        )
        least = 127 * float(jnp.finfo(v.dtype).tiny)
        scales = jnp.maximum(jnp.maximum(highest, lowest), least)
        # 1 / scale could be a denormal number, which becomes zero; 127 / scale is not.
        u = v * for_runs(127 / scales, width(v.size), v.size)
        q = at_random(u, uniform(key, u.shape, u.dtype))
        # The quotient is rounded: the largest entry may be above 127 by an ulp.
        codes = low_bits(jnp.clip(q, -127, 127), 8).astype(jnp.uint8)
        return Integers(jax.lax.bitcast_convert_type(codes, jnp.int8), scales)

    def decompress(payload, like):
        fractions = payload.codes.astype(payload.scales.dtype) / 127
        values = fractions * for_runs(payload.scales, width(like.size), like.size)
        return values.astype(like.dtype)

    def omega(d):
        return ((1 + (width(d) - 1) / 127**2) ** 0.5 - 1) / 2 if d else 0.0

    return on_trees(stateless(compress, decompress, omega=omega))
