"""Gradient descent with error feedback, old and new."""

from __future__ import annotations

import optax

from dbojax.base import Compressor, Mix
from dbojax.channels import ef14, ef21, smoothed
from dbojax.channels.common import check_contraction
from dbojax.optim.exchange import communicate


def ef_sgd(
    learning_rate: optax.ScalarOrSchedule,
    mix: Mix,
    compressor: Compressor,
    *,
    downlink: Compressor | None = None,
    seed: int = 0,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Send steps, and add what a message leaves out to the next one.

    .. math::
        c_i = C(e_i + \alpha_t g_i), \quad
        e_i \leftarrow e_i + \alpha_t g_i - c_i, \quad
        x \leftarrow x - \tfrac1n \textstyle\sum_i c_i

    The rate is inside the residual: what is left out keeps the rate of its own step.

    Args:
        learning_rate: alpha, a number or an optax schedule.
        mix: gives everyone the mean, ``dbo.mixing.averaging(n)``, or
            ``dbo.mixing.along(axis_name, n)`` together with ``axis_name``.
        compressor: a contraction (its ``delta`` is known).
        downlink: likewise, with a residual of the server; by default everything.
        seed: of random compressors.
        axis_name: of :func:`communicate`.

    Returns:
        An optax transform: stacked gradients in, one update out.

    Raises:
        ValueError: if ``mix`` does not average, or a compressor is no contraction.
        TypeError: if an argument is of another kind.

    Examples:
        >>> tx = ef_sgd(0.5, dbo.mixing.averaging(2), dbo.compressors.top_k(1))
        >>> x = jnp.zeros(2)
        >>> state, gradients = tx.init(x), jnp.array([[4.0, 3.0], [4.0, 3.0]])
        >>> for _ in range(2):
        ...     updates, state = tx.update(gradients, state)
        ...     x = x + updates
        >>> x.tolist()  # the second message makes up for the entry left out
        [-2.0, -3.0]

    References:
        Seide et al. (2014), 1-bit SGD; Stich and Karimireddy (2020), arXiv:1909.05350.
    """
    _check("ef_sgd", compressor, downlink)
    channel = ef14(mix, compressor, downlink)
    schedule = learning_rate if callable(learning_rate) else lambda count: learning_rate
    return optax.chain(
        # Not a plain product, which would widen short floats that are sent.
        optax.scale_by_schedule(schedule),
        communicate(channel, seed=seed, axis_name=axis_name),
        optax.scale(-1),
    )


def ef21_sgd(
    learning_rate: optax.ScalarOrSchedule,
    mix: Mix,
    compressor: Compressor,
    *,
    downlink: Compressor | None = None,
    seed: int = 0,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descend along copies of the gradients that compressed differences keep fresh.

    .. math::
        m_i \leftarrow m_i + C(g_i - m_i), \quad
        x \leftarrow x - \tfrac{\alpha_t}{n} \textstyle\sum_i m_i

    Args, return value and errors as for :func:`ef_sgd`. Copies start at zero; the
    authors start them at dense first gradients.

    Examples:
        >>> tx = ef21_sgd(0.5, dbo.mixing.averaging(2), dbo.compressors.top_k(1))
        >>> gradients, state = jnp.array([[4.0, 0.0], [0.0, 4.0]]), tx.init(jnp.ones(2))
        >>> for _ in range(2):  # what has settled costs no more than the change
        ...     updates, state = tx.update(gradients, state)
        >>> updates.tolist()
        [-1.0, -1.0]

    References:
        Richtárik, Sokolov and Fatkhullin (2021), arXiv:2106.05203.
    """
    _check("ef21_sgd", compressor, downlink)
    return optax.chain(
        communicate(ef21(mix, compressor, downlink), seed=seed, axis_name=axis_name),
        optax.scale_by_learning_rate(learning_rate),
    )


def ef21_sgdm(
    learning_rate: optax.ScalarOrSchedule,
    mix: Mix,
    compressor: Compressor,
    momentum: float = 0.1,
    *,
    downlink: Compressor | None = None,
    seed: int = 0,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21 of moving averages of the gradients, which needs no large batches.

    .. math::
        v_i \leftarrow (1 - \eta) v_i + \eta g_i, \quad
        m_i \leftarrow m_i + C(v_i - m_i), \quad
        x \leftarrow x - \tfrac{\alpha_t}{n} \textstyle\sum_i m_i

    with :math:`v_i = g_i` in the first step. ``momentum`` is eta, in (0, 1]; 1 is
    :func:`ef21_sgd`. The other arguments, return value and errors as for
    :func:`ef_sgd`.

    References:
        Fatkhullin, Tyurin and Richtárik (2023), arXiv:2305.15155.
    """
    _check("ef21_sgdm", compressor, downlink)
    channel = smoothed(ef21(mix, compressor, downlink), momentum)
    return optax.chain(
        communicate(channel, seed=seed, axis_name=axis_name),
        optax.scale_by_learning_rate(learning_rate),
    )


def _check(name, compressor, downlink):
    check_contraction(compressor, name)
    if downlink is not None:
        check_contraction(downlink, name)
