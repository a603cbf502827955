"""MA-DSBO: decentralised stochastic bilevel optimisation with moving averages.

Our formulation of Chen, Huang, Ma and Balasubramanian (2023), arXiv:2210.12839.
"""

from __future__ import annotations

from dbojax.algorithms.compose import Phase, Step, compose, local_step
from dbojax.base import Algorithm, Channel, Problem
from dbojax.oracles import soba
from dbojax.strategies import diffusion_cta, gradient_tracking, moving_average


def ma_dsbo(
    problem: Problem,
    *,
    channel: Channel,
    upper_step: Step,
    lower_step: Step,
    linear_step: Step,
    lower_steps: int = 10,
    linear_steps: int = 10,
    average: float = 0.1,
    track_lower: bool = False,
    carry_linear: bool = False,
) -> Algorithm:
    r"""Diffuse y, solve for z with tracking, move x along an average.

    .. math::
        &Y \leftarrow W Y - \beta \nabla_y g &&T_{in}\text{ times} \\
        &Z \leftarrow W Z - \eta_z D,\; D \text{ tracks } \nabla^2_{yy} g Z - \nabla_y f
        &&N \text{ times} \\
        &R \leftarrow (1 - \theta) R + \theta (\nabla_x f - \nabla^2_{xy} g Z),\;
        X \leftarrow W X - \alpha R

    Args:
        problem: objectives of one node.
        channel: how all three variables travel, e.g. ``dbo.channels.exact(mix)``.
        upper_step: alpha, a schedule, or an optax transform.
        lower_step: beta, likewise.
        linear_step: eta_z, likewise.
        lower_steps: rounds of y per step.
        linear_steps: rounds of z per step.
        average: theta in (0, 1].
        track_lower: gradient tracking for y too (the -GT variant).
        carry_linear: keep the tracker of z from step to step; whether the paper
            restarts it was not checked, and restarting is our default.

    Returns:
        An algorithm that sends ``T_in |y| + 2 N |z| + |x|`` numbers per link and step.

    Raises:
        ValueError: if a number of rounds is below one or ``average`` not in (0, 1].

    References:
        arXiv:2210.12839, Algorithms 2 to 4, as recalled: our formulation.
    """
    lower = gradient_tracking if track_lower else diffusion_cta
    upper = diffusion_cta(channel, local_step(upper_step))
    return compose(
        problem,
        soba(problem),
        Phase(y=lower(channel, local_step(lower_step)), times=lower_steps),
        Phase(
            z=gradient_tracking(channel, local_step(linear_step)),
            times=linear_steps,
            restart=not carry_linear,
        ),
        Phase(x=moving_average(upper, average)),
    )
