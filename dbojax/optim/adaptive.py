"""CD-Adam: AMSGrad on what Markov compression delivers."""

from __future__ import annotations

import optax

from dbojax.base import Compressor, Mix
from dbojax.channels import ef21, smoothed
from dbojax.channels.common import check_contraction
from dbojax.optim.amsgrad import scale_by_amsgrad
from dbojax.optim.exchange import communicate


def cd_adam(
    learning_rate: optax.ScalarOrSchedule,
    mix: Mix,
    compressor: Compressor,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    downlink: Compressor | None = None,
    momentum: float = 1.0,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
    max_of_corrected: bool = False,
    seed: int = 0,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AMSGrad on gradients that are compressed on the way up and down.

    .. math::
        \hat g_i &\leftarrow \hat g_i + C(g_i - \hat g_i), \quad
        \hat g = \tfrac1n \textstyle\sum_i \hat g_i, \quad
        \tilde g \leftarrow \tilde g + C(\hat g - \tilde g), \\
        u &= \tilde g + \lambda x, \quad
        x \leftarrow x - \alpha_t \,\mathrm{AMSGrad}(u)

    Every worker holds the same :math:`\tilde g`, moments and parameters; the server
    holds none of the latter. A compressor takes the whole tree as one vector
    (``flatten`` in the authors' code); ``dbo.compressors.per_leaf(compressor)`` takes
    each leaf by itself (``layerwise``). Decay the rate, e.g. with
    :func:`two_step_decay`: one-bit messages stall at a constant one.

    Args:
        learning_rate: alpha, a number or an optax schedule.
        mix: gives everyone the mean, ``dbo.mixing.averaging(n)``, or
            ``dbo.mixing.along(axis_name, n)`` together with ``axis_name``.
        compressor: a contraction, ``dbo.compressors.sign()`` in the authors' code.
        b1: of the momentum.
        b2: of the second moment.
        eps: of :func:`scale_by_amsgrad`.
        weight_decay: lambda, added to what arrives.
        decoupled: takes the decay past AMSGrad, as AdamW does.
        downlink: of the server, by default ``compressor``;
            ``dbo.compressors.identity()`` answers densely.
        momentum: eta of ``dbo.channels.smoothed``, below 1 to send moving averages of
            the gradients, as EF21-SGDM does.
        bias_correction: of :func:`scale_by_amsgrad`, as are the next two; False with
            ``eps_inside_sqrt=True`` is the form that analyses treat.
        eps_inside_sqrt: puts epsilon under the root.
        max_of_corrected: takes the maximum as optax does.
        seed: of random compressors.
        axis_name: of :func:`communicate`.

    Returns:
        An optax transform: stacked gradients in, one update out.

    Raises:
        ValueError: if ``mix`` does not average, or a compressor is no contraction.
        TypeError: if an argument is of another kind.

    Examples:
        >>> mix = dbo.mixing.averaging(4)
        >>> tx = cd_adam(1e-2, mix, dbo.compressors.sign())
        >>> params = jnp.ones(64, jnp.float32)
        >>> gradients = dbo.replicate(params, 4)
        >>> updates, state = tx.update(gradients, tx.init(params), params)
        >>> sent = optax.tree.get(state, "traffic")
        >>> updates.shape, sent.message, sent.down  # 64 bits and a scale each way
        ((64,), 12, 12)

    References:
        Our formulation of CD-Adam (arXiv 2111.00705), following the authors' public
        code. There sign(0) is 0; here it is +1, so that one bit suffices.
    """
    check_contraction(compressor, "cd_adam")
    if downlink is not None:
        check_contraction(downlink, "cd_adam")
    channel = ef21(mix, compressor, compressor if downlink is None else downlink)
    if not isinstance(momentum, int | float) or momentum != 1:
        channel = smoothed(channel, momentum)
    moments = scale_by_amsgrad(
        b1, b2, eps, bias_correction, eps_inside_sqrt, max_of_corrected
    )
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        inner = [moments]
    else:
        decay = optax.add_decayed_weights(weight_decay)
        inner = [moments, decay] if decoupled else [decay, moments]
    return optax.chain(
        communicate(channel, seed=seed, axis_name=axis_name),
        *inner,
        optax.scale_by_learning_rate(learning_rate),
    )
