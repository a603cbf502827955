"""C-SOBA, CM-SOBA and EF-SOBA: SOBA with compressed messages to a server.

Our formulation of He, Hu, Huang, Lu, Wang and Yuan (2024), arXiv:2405.18858. The
methods differ in what travels up to the server and in what both ends remember.
"""
# ruff: noqa: D417 - what means the same in all of them is described once, in `soba`.

from __future__ import annotations

import math

import optax

from dbojax import trees
from dbojax.algorithms.compose import Step, local_steps
from dbojax.algorithms.single_loop import single_loop
from dbojax.algorithms.soba import averaged
from dbojax.base import Algorithm, Channel, Compressor, Mix, Oracle, Problem
from dbojax.channels import diana, server
from dbojax.strategies import allreduce, moving_average


def c_soba(
    problem: Problem,
    *,
    mix: Mix,
    upper: Compressor,
    lower: Compressor,
    upper_step: Step,
    lower_step: Step,
    linear_step: Step | None = None,
    downlink: Compressor | None = None,
    clip: float = math.inf,
    oracle: Oracle | None = None,
    participants: int | None = None,
) -> Algorithm:
    r"""SOBA with unbiasedly compressed directions.

    .. math:: x \leftarrow x - \alpha\, \tfrac1n \textstyle\sum_i C(d_{x,i})

    and y, z likewise. Its floor grows with the compression and with how much the
    workers' directions differ. For the multi-step variant compress with
    ``dbo.compressors.multi_step(compressor, rounds)`` and draw batches ``rounds`` times
    as large, which spends as many samples and messages on a ``rounds``-th of the steps.

    Args:
        problem, mix, upper_step, lower_step, linear_step, clip, oracle, participants:
            as for :func:`soba`.
        upper: what directions of x are sent with; unbiased.
        lower: what directions of y and z are sent with; unbiased.
        downlink: what the server answers with; by default everything.

    Returns:
        An algorithm that sends three messages up per worker and step.

    Raises:
        ValueError: as :func:`soba`, or if a compressor is biased.
        TypeError: if a part is of another kind.

    Examples:
        >>> task = dbo.tasks.worker_quadratic(n=4, d=8, heterogeneity=0.0)
        >>> tenth = dbo.compressors.random_k(2)
        >>> method = c_soba(task.problem, mix=dbo.mixing.averaging(4), upper=tenth,
        ...                 lower=tenth, upper_step=0.01, lower_step=0.05)
        >>> state = method.init(*(dbo.replicate(v, 4) for v in (task.x0, task.y0)))
        >>> _, metrics = method.step(jax.random.key(0), state, task.batch)
        >>> metrics.traffic.message, metrics.traffic.down
        (72, 192)

    References:
        arXiv:2405.18858: our formulation.
    """
    above, below = _unbiased_servers("c_soba", mix, upper, lower, downlink)
    x_step, *steps = local_steps(upper_step, lower_step, linear_step)
    x = allreduce(above, x_step)
    y, z = (allreduce(below, step) for step in steps)
    return single_loop(
        problem, x=x, y=y, z=z, oracle=oracle, clip=clip, participants=participants
    )


def cm_soba(
    problem: Problem,
    *,
    mix: Mix,
    upper: Compressor,
    lower: Compressor,
    upper_step: Step,
    lower_step: Step,
    linear_step: Step | None = None,
    average: float = 0.1,
    new_average: bool = True,
    downlink: Compressor | None = None,
    clip: float = math.inf,
    oracle: Oracle | None = None,
    participants: int | None = None,
) -> Algorithm:
    r"""C-SOBA whose server averages the directions of x over time.

    .. math::
        h \leftarrow (1 - \theta) h + \theta\, \tfrac1n \textstyle\sum_i C(d_{x,i}),
        \quad x \leftarrow x - \alpha h

    Args:
        problem, mix, upper_step, lower_step, linear_step, clip, oracle, participants:
            as for :func:`soba`.
        upper, lower, downlink: as for :func:`c_soba`.
        average: theta in (0, 1].
        new_average: False steps along h as it was before.

    Returns:
        An algorithm that sends what :func:`c_soba` sends; its multi-step variant
        CM-SOBA-MSC likewise.

    Raises:
        ValueError, TypeError: as :func:`c_soba`, or if ``average`` is not in (0, 1].

    References:
        arXiv:2405.18858: our formulation; where the average stands is our choice.
    """
    above, below = _unbiased_servers("cm_soba", mix, upper, lower, downlink)
    x_step, *steps = local_steps(upper_step, lower_step, linear_step)
    x_step = optax.chain(averaged(average, new_average), x_step)
    x = allreduce(above, x_step)
    y, z = (allreduce(below, step) for step in steps)
    return single_loop(
        problem, x=x, y=y, z=z, oracle=oracle, clip=clip, participants=participants
    )


def ef_soba(
    problem: Problem,
    *,
    mix: Mix,
    upper: Compressor,
    lower: Compressor,
    upper_step: Step,
    lower_step: Step,
    linear_step: Step | None = None,
    average: float = 0.1,
    rate: float | None = None,
    gain: float | None = 1.0,
    downlink: Compressor | None = None,
    clip: float = math.inf,
    oracle: Oracle | None = None,
    participants: int | None = None,
) -> Algorithm:
    r"""SOBA with memories: compressed differences to them travel.

    With :math:`u_x = h_i`, :math:`h_i \leftarrow (1 - \theta) h_i + \theta d_{x,i}`,
    and :math:`u_y, u_z` the directions themselves, each of the three does

    .. math::
        c_i = C(u_i - m_i), \quad \hat u = m + \tfrac1n \textstyle\sum_i c_i, \quad
        m_i \leftarrow m_i + \delta c_i, \quad
        m \leftarrow m + \tfrac\delta n \textstyle\sum_i c_i

    and moves its variable along :math:`\hat u`. No floor is left that grows with the
    differences between workers.

    Args:
        problem, mix, upper_step, lower_step, linear_step, clip, oracle, participants:
            as for :func:`soba`.
        upper, lower: as for :func:`c_soba`; with ``rate`` and ``gain`` as for
            :func:`dbo.channels.diana` contractions as well.
        average: theta in (0, 1]; for an average at the server write 1 and put
            ``optax.ema(1 - theta, debias=False)`` before the step of x.
        rate: delta, by default 1 / (1 + omega) of each level's compressor.
        gain: None moves along the new memory, as EF21 does.
        downlink: as for :func:`dbo.channels.diana`.

    Returns:
        An algorithm that sends what :func:`c_soba` sends; its multi-step variant
        EF-SOBA-MSC likewise.

    Raises:
        ValueError, TypeError: as :func:`c_soba`, or if ``average`` is not in (0, 1].

    References:
        arXiv:2405.18858: our formulation; no part of the published listing was checked.
    """
    above, below = (diana(mix, c, downlink, rate, gain) for c in (upper, lower))
    x_step, *steps = local_steps(upper_step, lower_step, linear_step)
    x = moving_average(allreduce(above, x_step), average)
    y, z = (allreduce(below, step) for step in steps)
    return single_loop(
        problem, x=x, y=y, z=z, oracle=oracle, clip=clip, participants=participants
    )


def _unbiased_servers(name, mix, upper, lower, downlink) -> tuple[Channel, Channel]:
    for level, compressor in (("upper", upper), ("lower", lower)):
        example = "dbo.compressors.random_k(0.1)"
        trees.check_type(compressor, Compressor, f"{name}({level})", example)
        if compressor.omega is None:
            raise ValueError(
                f"`{name}` needs an unbiased compressor as `{level}`, but this one "
                "declares no `omega`. Use e.g. `dbo.compressors.random_k(0.1)`, or "
                "keep it in `dbo.algorithms.ef_soba(..., rate=1.0, gain=None)`."
            )
    return server(mix, upper, downlink), server(mix, lower, downlink)
