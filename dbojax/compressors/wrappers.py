"""Compressors made of compressors."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Compressor, Payload
from dbojax.compressors.lift import on_trees


class Shrunk(NamedTuple):
    """The law ``1 / (1 + omega)``, and the unbiased compressor that it came from."""

    unbiased: Compressor

    def __call__(self, d: int) -> float:  # noqa: D102
        return 1 / (1 + self.unbiased.omega(d))  # pyright: ignore


def scaled(compressor: Compressor) -> Compressor:
    r"""Divide an unbiased compressor by ``1 + omega``: a contraction; twice: undo it.

    .. math::
        C'(v) = \frac{C(v)}{1 + \omega}, \qquad
        E\|C'(v) - v\|^2 \le \Bigl(1 - \frac{1}{1 + \omega}\Bigr) \|v\|^2,

    since :math:`E\|C(v)\|^2 \le (1 + \omega)\|v\|^2` and :math:`E\,C(v) = v`. The
    message stays as it is; the receiver divides.

    Args:
        compressor: an unbiased one (with ``omega``), or one that ``scaled`` made.

    Returns:
        A contraction with ``delta = 1 / (1 + omega)``; for a compressor that ``scaled``
        made, the unbiased one that it was made from.

    Raises:
        ValueError: if the compressor is biased otherwise, as :func:`top_k` and
            :func:`sign` are: no factor makes those unbiased.

    Examples:
        >>> c = dbo.compressors.random_k(0.25)
        >>> scaled(c).delta(100), scaled(scaled(c)) is c
        (0.25, True)
    """
    if isinstance(compressor.delta, Shrunk):
        return compressor.delta.unbiased
    omega = compressor.omega
    if omega is None:
        raise ValueError(
            "`scaled` needs an unbiased compressor (one with `omega`, e.g. "
            "`random_k(0.1)` or `qsgd(7)`) or one that `scaled` made; got a biased "
            "one, which no factor makes unbiased. Use it as it is."
        )

    def decompress(payload, like):
        factor = 1 + omega(trees.size(like))
        return jax.tree.map(lambda a: a / factor, compressor.decompress(payload, like))

    def adding(add):
        def shrunk(payload, scale, into):
            return add(payload, scale / (1 + omega(trees.size(into))), into)

        return shrunk if add else None

    return compressor._replace(
        decompress=decompress,
        add=adding(compressor.add),
        add_all=adding(compressor.add_all),
        delta=Shrunk(compressor),
        omega=None,
    )


def composed(sparsifier: Compressor, quantiser: Compressor) -> Compressor:
    r"""Choose entries with one compressor, then compress their values with another.

    ``composed(top_k(0.1), scaled(qsgd(7)))`` keeps a tenth of the entries, in four bits
    each. The quantiser's law enters at the number ``k`` of kept values. If the
    sparsifier keeps entries unchanged, :math:`S(v) = P v`, then the two errors are
    orthogonal and

    .. math::
        E\|C(v) - v\|^2 \le \|v\|^2 - \delta_2 E\|Pv\|^2
        \le (1 - \delta_1(d)\, \delta_2(k)) \|v\|^2.

    If both are unbiased, :math:`E\|C(v)\|^2 \le (1 + \omega_2) E\|S(v)\|^2` gives

    .. math:: \omega(d) = (1 + \omega_1(d))(1 + \omega_2(k)) - 1.

    A biased sparsifier with an unbiased quantiser has neither law: scale the quantiser.

    Args:
        sparsifier: one whose payload has a field ``values``, as those of this package;
            if contractive, it must keep chosen entries unchanged, as :func:`top_k`,
            :func:`block_top_k` and ``scaled(random_k(k))`` do.
        quantiser: acts on the kept values.

    Returns:
        A compressor whose payload is the sparsifier's, with ``values`` replaced by the
        quantiser's payload.

    Raises:
        ValueError: at trace time, if the sparsifier's payload has no ``values``.

    Examples:
        >>> top, half = dbo.compressors.top_k(2), dbo.compressors.cast(jnp.float16)
        >>> c, v = composed(top, half), jnp.array([1.0, -5.0, 2.0, 4.0])
        >>> payload, _ = c.compress(jax.random.key(0), v, c.init(v))
        >>> payload.values.dtype, c.decompress(payload, v).tolist()
        (dtype('uint16'), [0.0, -5.0, 0.0, 4.0])
    """

    def kept(like):
        """Shape and dtype of the values that the sparsifier keeps."""

        def values(v):
            payload, _ = sparsifier.compress(jax.random.key(0), v, sparsifier.init(v))
            if "values" not in getattr(payload, "_fields", ()):
                raise ValueError(
                    "`composed(sparsifier, quantiser)` needs a sparsifier whose "
                    f"payload has a field `values`, got {type(payload).__name__}. "
                    "Write the sparsifier first, e.g. `composed(top_k(0.1), sign())`."
                )
            return payload.values

        return jax.eval_shape(values, like)

    def init(v):
        like = kept(v)
        return sparsifier.init(v), quantiser.init(jnp.zeros(like.shape, like.dtype))

    def compress(key, v, state):
        kept(v)
        key_s, key_q = jax.random.split(key)
        payload, first = sparsifier.compress(key_s, v, state[0])
        values, second = quantiser.compress(key_q, payload.values, state[1])
        return payload._replace(values=values), (first, second)

    def opened(payload, like):
        return payload._replace(values=quantiser.decompress(payload.values, kept(like)))

    def decompress(payload, like):
        return sparsifier.decompress(opened(payload, like), like)

    def add(payload, scale, into):
        return sparsifier.add(opened(payload, into), scale, into)  # pyright: ignore

    def add_all(payloads, scales, into):
        each = jax.vmap(lambda payload: opened(payload, into))(payloads)
        return sparsifier.add_all(each, scales, into)  # pyright: ignore

    def at_both(first, second, join):
        if first is None or second is None:
            return None

        def law(d):
            k = kept(jax.ShapeDtypeStruct((d,), jnp.float32)).size
            return join(first(d), second(k))

        return law

    both = Compressor(
        init=init,
        compress=compress,
        decompress=decompress,
        add=add if sparsifier.add else None,
        add_all=add_all if sparsifier.add_all else None,
        delta=at_both(sparsifier.delta, quantiser.delta, lambda a, b: a * b),
        omega=at_both(
            sparsifier.omega, quantiser.omega, lambda a, b: (1 + a) * (1 + b) - 1
        ),
    )
    return on_trees(both)


class Repeated(NamedTuple):
    """Messages of :func:`multi_step`."""

    messages: Payload  # the compressor's payload, with the rounds as the first axis


def multi_step(compressor: Compressor, rounds: int) -> Compressor:
    r"""Compress what is left, ``rounds`` times over: R messages, one better vector.

    An unbiased compressor, with :math:`q = \omega / (1 + \omega)`, stays unbiased:

    .. math::
        v^0 = 0, \quad v^r = v^{r-1} + \frac{C^{(r)}(v - v^{r-1})}{1 + \omega}, \quad
        C_R(v) = \frac{v^R}{1 - q^R}, \qquad \omega_R = \frac{q^R}{1 - q^R}.

    Proof. The rests :math:`e_r = v - v^r` have :math:`E\,e_r = q\,e_{r-1}` and
    :math:`E\|e_r\|^2 \le q\,\|e_{r-1}\|^2`, so the variance of :math:`v^R` is at most
    :math:`(q^R - q^{2R})\|v\|^2`. For :func:`random_k` it is equal. Note that
    :math:`\omega q^R`, which one also meets, is no bound: R = 1 gives less than C has.

    A contraction stays one:

    .. math::
        v^r = v^{r-1} + C^{(r)}(v - v^{r-1}), \quad C_R(v) = v^R, \qquad
        \delta_R = 1 - (1 - \delta)^R.

    The two agree: ``multi_step(scaled(c), R)`` is ``scaled(multi_step(c, R))``.

    Args:
        compressor: with a law; ``omega`` counts first where there are both. Its memory,
            if any, goes from round to round.
        rounds: R, the messages that one vector becomes, each with its own key.

    Returns:
        A compressor whose payload is that of all rounds, so that a message has R times
        the bytes; the compressor itself for ``rounds=1``.

    Raises:
        ValueError: if ``rounds`` is not an integer >= 1, or the compressor declares
            no law.

    Examples:
        >>> c, v = dbo.compressors.top_k(1), jnp.array([1.0, -5.0, 2.0, 4.0])
        >>> twice = multi_step(c, 2)
        >>> payload, _ = twice.compress(jax.random.key(0), v, twice.init(v))
        >>> twice.decompress(payload, v).tolist(), twice.delta(4)
        ([0.0, -5.0, 0.0, 4.0], 0.4375)
        >>> multi_step(dbo.compressors.random_k(0.5), 3).omega(100)  # q = 1/2
        0.14285714285714285

    References:
        He et al. (2024), arXiv:2405.18858, multi-step compression; Huang et al. (2022),
        arXiv:2206.03665, for contractions. Both forms and laws are derived here.
    """
    whole = isinstance(rounds, numbers.Integral) and not isinstance(rounds, bool)
    if not whole or rounds < 1:
        raise ValueError(
            "`multi_step(compressor, rounds)` needs an integer rounds >= 1, got "
            f"rounds={rounds!r}. Write e.g. `multi_step(random_k(0.1), 5)`."
        )
    if compressor.omega is None and compressor.delta is None:
        raise ValueError(
            "`multi_step` needs a compressor with a law, `omega` (unbiased) or `delta` "
            "(a contraction); this one declares neither. Scale an unbiased quantiser "
            "behind a biased sparsifier, e.g. `composed(top_k(0.1), scaled(qsgd(7)))`."
        )
    if rounds == 1:
        return compressor
    if isinstance(compressor.delta, Shrunk):
        return scaled(multi_step(scaled(compressor), rounds))

    def omega(d):
        w = compressor.omega(d) if d else 0.0  # pyright: ignore
        q = (w / (1 + w)) ** rounds
        return q / (1 - q)

    def step(d):
        """What a round's message is multiplied by on its way into the rest."""
        return 1 / (1 + compressor.omega(d)) if compressor.omega and d else 1.0

    def gain(d):
        """What all are multiplied by in the end, 1 / (1 - q^R) included."""
        return step(d) * (1 + omega(d)) if compressor.omega else 1.0

    def absorb(message, scale, into):
        if compressor.add:
            return compressor.add(message, scale, into)
        v = compressor.decompress(message, into)
        return jax.tree.map(lambda i, leaf: i + trees.times(scale, leaf), into, v)

    def compress(key, v, state):
        scale = -step(trees.size(v))

        def one_round(carry, key):
            rest, memory = carry
            message, memory = compressor.compress(key, rest, memory)
            return (absorb(message, scale, rest), memory), message

        keys = None if key is None else jax.random.split(key, rounds)
        (_, state), messages = jax.lax.scan(one_round, (v, state), keys, rounds)
        return Repeated(messages), state

    def add(payload, scale, into):
        scale = scale * gain(trees.size(into))

        def add_one(into, message):
            return absorb(message, scale, into), None

        return jax.lax.scan(add_one, into, payload.messages, rounds)[0]

    def decompress(payload, like):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        return add(payload, 1.0, zeros)

    def delta(d):
        return 1 - (1 - compressor.delta(d)) ** rounds  # pyright: ignore

    return Compressor(
        init=compressor.init,
        compress=compress,
        decompress=decompress,
        add=add if compressor.add else None,
        delta=None if compressor.omega else delta,
        omega=omega if compressor.omega else None,
    )
