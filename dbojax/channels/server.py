"""Channels with a server: compressed up, dense or compressed down, one estimate.

Worker ``i`` holds ``v_i`` and all of them want the mean. A channel differs from another
by what the ends of its links remember; ``C`` is the uplink's compressor. Memories are
at least float32; there the server's parts from the mean of the workers' by rounding,
by some 1e-5 of the values after 1e5 exchanges of values that never settle.

With a mask only those present send and move their memories. Estimates then average
the messages over those present, unbiased if all sets are drawn alike, while memories of
a server always move by a sum divided by n.

They suit strategies that send directions (`allreduce`) or values (diffusion); gradient
tracking loses the mean of its trackers over a compressed one. Only `allreduce` takes a
mask.
"""

from __future__ import annotations

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Channel, Compressor, Mix, State, Tree
from dbojax.channels.common import check_compressor, check_contraction, check_mix
from dbojax.channels.links import (
    EVERYTHING,
    check_value,
    differences,
    markov,
    over_server,
    plain,
    present_rows,
    rate_of,
    residual,
)


def server(
    mix: Mix, uplink: Compressor | None = None, downlink: Compressor | None = None
) -> Channel:
    r"""Average the compressed values as they are.

    .. math:: \hat v = C'\Bigl(\frac1n \sum_i C(v_i)\Bigr)

    An unbiased ``C`` gives an unbiased estimate whose variance, up to
    :math:`\omega / n` times the mean of :math:`\|v_i\|^2`, does not vanish while the
    :math:`v_i` differ; a biased one is the naive way, kept as an ablation.

    Args:
        mix: gives everyone the mean, ``dbo.mixing.averaging(n)``.
        uplink: what workers send with; by default everything.
        downlink: what the server answers with; by default everything.

    Returns:
        A channel without memory of its own. Traffic counts a message up and one down
        for each worker that takes part, in two rounds.

    Raises:
        ValueError: if ``mix`` does not average; from ``send``, if a mask counts other
            workers.
        TypeError: if an argument is of another kind.

    Examples:
        >>> channel = server(dbo.mixing.averaging(4), dbo.compressors.random_k(2))
        >>> v = jax.random.normal(jax.random.key(1), (4, 8))
        >>> held, _, traffic = channel.send(jax.random.key(0), v, channel.init(0 * v))
        >>> bool((held == held[:1]).all()), traffic.message, traffic.down
        (True, 24, 64)
    """
    sends = EVERYTHING if uplink is None else uplink
    _check(mix, "server", sends, downlink, check_compressor)
    return over_server(mix, plain(uplink), plain(downlink))


def ef14(mix: Mix, uplink: Compressor, downlink: Compressor | None = None) -> Channel:
    r"""Error feedback: what a message leaves out is added to the next.

    .. math::
        c_i = C(v_i + e_i), \quad e_i \leftarrow v_i + e_i - c_i, \quad
        \hat v = \tfrac1n \textstyle\sum_i c_i

    The answer is compressed in the same way, with the server's own residual.

    Args:
        mix: gives everyone the mean, ``dbo.mixing.averaging(n)``.
        uplink: a contraction (its ``delta`` is known).
        downlink: likewise; by default everything.

    Returns:
        A channel whose estimates are right on average over time, each by itself not.

    Raises:
        ValueError: as :func:`server`, and if a compressor declares no contraction.
        TypeError: if an argument is of another kind.

    Examples:
        >>> channel = ef14(dbo.mixing.averaging(2), dbo.compressors.top_k(1))
        >>> v, key, total = jnp.ones((2, 3)), jax.random.key(0), 0.0
        >>> state = channel.init(v)
        >>> for _ in range(6):
        ...     held, state, _ = channel.send(key, v, state)
        ...     total = total + held[0]
        >>> (total + state.up.sender.mean(0)).tolist()
        [6.0, 6.0, 6.0]

    References:
        Seide et al. (2014), 1-bit SGD; Stich and Karimireddy (2020), arXiv:1909.05350.
        Steps inside the residual, as there, come of sending ``step * gradient``.
    """
    _check(mix, "ef14", uplink, downlink, check_contraction)
    down = plain(None) if downlink is None else residual(downlink)
    return over_server(mix, residual(uplink), down)


def ef21(mix: Mix, uplink: Compressor, downlink: Compressor | None = None) -> Channel:
    r"""Markov compression: both ends keep a copy, and differences to it travel.

    .. math::
        c_i = C(v_i - m_i), \quad m_i \leftarrow m_i + c_i, \quad
        \hat v = m \leftarrow m + \tfrac1n \textstyle\sum_i c_i

    The error vanishes as the values settle, however much they differ. Copies start at
    what the channel is told to be common knowledge, zero for directions.

    Args:
        mix: gives everyone the mean, ``dbo.mixing.averaging(n)``.
        uplink: a contraction (its ``delta`` is known).
        downlink: likewise, for the same scheme on the way back; by default everything.

    Returns:
        A channel whose server's copy is the mean of the workers'.

    Raises:
        ValueError: as :func:`server`, and if a compressor declares no contraction.
        TypeError: if an argument is of another kind.

    Examples:
        >>> channel = ef21(dbo.mixing.averaging(4), dbo.compressors.top_k(2))
        >>> v, key = jax.random.normal(jax.random.key(1), (4, 8)), jax.random.key(0)
        >>> state = channel.init(0 * v)
        >>> for _ in range(4):
        ...     held, state, _ = channel.send(key, v, state)
        >>> bool(jnp.allclose(held, v.mean(0)[None], atol=1e-6))
        True

    References:
        Richtárik, Sokolov and Fatkhullin (2021), arXiv:2106.05203; partial
        participation and both ways, arXiv:2110.03294. Their copies start at dense
        first gradients.
    """
    _check(mix, "ef21", uplink, downlink, check_contraction)
    down = plain(None) if downlink is None else markov(downlink)
    return over_server(mix, markov(uplink), down)


def two_way(mix: Mix, compressor: Compressor) -> Channel:
    r"""Markov compression up and down: :func:`ef21` with one compressor for both.

    .. math:: \tilde v \leftarrow \tilde v + C(\hat v - \tilde v)

    is what all workers hold, :math:`\hat v` being the server's estimate. Args, return
    value and errors as for :func:`ef21`.

    References:
        Wang, Lin and Chen (2022), arXiv:2111.00705, CD-Adam.
    """
    check_mix(mix, "two_way", "dbo.mixing.averaging(n)")
    check_contraction(compressor, "two_way")
    return ef21(mix, compressor, downlink=compressor)


def diana(
    mix: Mix,
    uplink: Compressor,
    downlink: Compressor | None = None,
    rate: float | None = None,
    gain: float | None = 1.0,
) -> Channel:
    r"""Unbiased differences to memories that chase the values.

    .. math::
        c_i = C(v_i - m_i), \quad \hat v = m + \tfrac1n \textstyle\sum_i c_i, \quad
        m_i \leftarrow m_i + \delta c_i, \quad
        m \leftarrow m + \tfrac\delta n \textstyle\sum_i c_i

    With an unbiased ``C`` an unbiased estimate with a variance of at most
    :math:`\omega / n^2 \sum_i \|v_i - m_i\|^2`, which vanishes as the values settle,
    however much they differ.

    Args:
        mix: gives everyone the mean, ``dbo.mixing.averaging(n)``.
        uplink: an unbiased compressor (its ``omega`` is known); any, if ``rate`` is
            given.
        downlink: an unbiased one or a contraction, for the scheme of :func:`ef21` on
            the way back; by default everything.
        rate: delta; by default ``1 / (1 + omega)``. 1, with a contraction and
            ``gain=None``, is :func:`ef21`.
        gain: of the messages in the estimate; None takes the moved memory m instead.

    Returns:
        A channel whose server's memory is the mean of the workers'.

    Raises:
        ValueError: as :func:`server`, if ``uplink`` is biased and no rate is given, or
            if ``downlink`` declares neither ``omega`` nor ``delta``.
        TypeError: if an argument is of another kind.

    Examples:
        >>> channel = diana(dbo.mixing.averaging(4), dbo.compressors.random_k(4))
        >>> v = jax.random.normal(jax.random.key(1), (4, 8))
        >>> state, send = channel.init(0 * v), jax.jit(channel.send)
        >>> for step in range(60):
        ...     held, state, _ = send(jax.random.key(step), v, state)
        >>> bool(jnp.allclose(held, v.mean(0)[None], atol=1e-5))
        True

    References:
        Mishchenko, Gorbunov, Takáč and Richtárik (2019), arXiv:1901.09269, DIANA; the
        memories of our formulation of EF-SOBA, arXiv:2405.18858.
    """
    _check(mix, "diana", uplink, downlink, check_compressor)
    if rate is None and uplink.omega is None:
        raise ValueError(
            "`diana` takes its rate from `omega`, but this uplink declares none: it is "
            "biased. Use an unbiased one, e.g. `dbo.compressors.random_k(0.1)`, or "
            "`dbo.channels.ef21(mix, uplink)`."
        )
    if isinstance(rate, numbers.Real) and not 0 < rate <= 1:
        raise ValueError(f"`diana` needs a rate in (0, 1], got {rate}.")
    if downlink is not None and downlink.delta is None and downlink.omega is None:
        raise ValueError(
            "`diana` needs a downlink whose memory catches up: an unbiased one (its "
            "`omega` is known) or a contraction (its `delta` is), e.g. "
            "`dbo.compressors.top_k(0.1)`; this one declares neither."
        )
    rates = rate_of(uplink) if rate is None else lambda sent: rate
    down = plain(None) if downlink is None else markov(downlink)
    return over_server(mix, differences(uplink, rates, gain), down)


class SmoothedState(NamedTuple):
    """Moving averages of the values, and the memory of the channel they feed."""

    average: Tree  # (n, ...)
    started: jax.Array  # (n,), whether a worker has sent before
    channel: State


def smoothed(channel: Channel, weight: float) -> Channel:
    r"""Send moving averages of the values, so that sampling noise settles.

    .. math:: u_i \leftarrow (1 - \eta) u_i + \eta v_i,

    and :math:`u_i = v_i` when a worker sends for the first time.

    Args:
        channel: how the averages travel, e.g. :func:`ef21`.
        weight: eta in (0, 1]; 1 gives the channel itself.

    Returns:
        A channel with the same messages.

    Raises:
        ValueError: if ``weight`` is not in (0, 1].
        TypeError: if ``channel`` is not a channel of this package.

    Examples:
        >>> mean = dbo.channels.server(dbo.mixing.averaging(2))
        >>> channel, key = smoothed(mean, 0.5), jax.random.key(0)
        >>> v = jnp.ones((2, 1))
        >>> _, state, _ = channel.send(key, v, channel.init(0 * v))
        >>> channel.send(key, 3 * v, state)[0].tolist()
        [[2.0], [2.0]]

    References:
        With :func:`ef21` the momentum of EF21-SGDM, Fatkhullin, Tyurin and Richtárik
        (2023), arXiv:2305.15155.
    """
    example = "dbo.channels.ef21(mix, compressor)"
    trees.check_type(channel, Channel, "smoothed(channel)", example)
    trees.check_type(channel.mix, Mix, "smoothed(channel).mix", "channel.mix")
    if isinstance(weight, numbers.Real) and not 0 < weight <= 1:
        raise ValueError(f"`smoothed` needs 0 < weight <= 1, got {weight}.")

    def init(known):
        memory = channel.init(known)
        started = jnp.zeros(trees.num_nodes(known, "known"), bool)
        return SmoothedState(trees.wide(known), started, memory)

    def send(key, v, state, mask=None):
        present = present_rows(channel.mix, mask)
        check_value(v, len(state.started), state.average)
        average = trees.averaged(weight, state.average, v)
        average = trees.where(state.started, average, trees.wide(v))
        average = trees.where(present, average, state.average)
        started = jnp.ones_like(state.started) if present is None else present
        sent = trees.cast(average, v)
        held, memory, traffic = channel.send(key, sent, state.channel, mask)
        started = started | state.started
        return held, SmoothedState(average, started, memory), traffic

    # What nodes move by would be that of the average, not of the value.
    return channel._replace(init=init, send=send, flow=None)


def _check(mix, name, uplink, downlink, check):
    check_mix(mix, name, "dbo.mixing.averaging(n)")
    if not mix.averages:
        raise ValueError(
            f"`{name}` has a server, which hears all workers at once: it needs "
            "`dbo.mixing.averaging(n)`, or `dbo.mixing.along(axis_name, n)` inside "
            "`shard_map`. Over another graph use `dbo.channels.reference_point`."
        )
    check(uplink, name, "uplink")
    if downlink is not None:
        check(downlink, name, "downlink")
