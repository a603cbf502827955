"""DSBO and GDSBO in simplified form: gossip around local hypergradients.

The originals exchange Hessians and Jacobians. Here, as Gao, Gu and Thai (2023), section
6, run them for comparison, Hessian products are implicit and only parameters and
estimators travel: our formulation.
"""
# ruff: noqa: D417 - what means the same in both is described once, in `dsbo`.

from __future__ import annotations

import jax

from dbojax.algorithms.compose import Phase, Step, compose, local_step
from dbojax.algorithms.mdbo import unused
from dbojax.base import Algorithm, Channel, Problem
from dbojax.oracles import local_neumann
from dbojax.strategies import diffusion_cta, gossiped_average


def dsbo(
    problem: Problem,
    *,
    channel: Channel,
    upper_step: Step,
    lower_step: Step,
    smoothness: float | jax.Array,
    terms: int = 10,
    random: bool = False,
) -> Algorithm:
    r"""Mix parameters and step along plain local hypergradients.

    .. math::
        X \leftarrow X - \gamma (I - W) X - \alpha d_x, \quad
        Y \leftarrow Y - \gamma (I - W) Y - \beta d_y

    with the directions of ``dbo.oracles.local_neumann`` at the old point. Nothing is
    averaged and nothing tracked, so parameters alone travel.

    Args:
        problem: objectives of one node.
        channel: how x and y travel, ``dbo.channels.exact(mix, gamma=0.1)``.
        upper_step: alpha, a schedule, or an optax transform.
        lower_step: beta, likewise.
        smoothness: L, at least the largest eigenvalue of any node's Hessian of g.
        terms: J of the truncated series.
        random: draw one power of the series in place of the sum.

    Returns:
        An algorithm that sends ``|x| + |y|`` numbers per link and step.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a part is of another kind.

    References:
        Chen, Huang and Ma (2022), arXiv:2206.05670, simplified: our formulation.
    """
    x, y = (diffusion_cta(channel, local_step(s)) for s in (upper_step, lower_step))
    oracle = local_neumann(problem, terms, smoothness, random)
    return compose(problem, oracle, Phase(x=x, y=y, z=unused()))


def gdsbo(
    problem: Problem,
    *,
    channel: Channel,
    estimator_channel: Channel,
    upper_step: Step,
    lower_step: Step,
    smoothness: float | jax.Array,
    terms: int = 10,
    average: float = 0.1,
    random: bool = False,
) -> Algorithm:
    r"""DSBO along averages of the local directions, which are mixed as well.

    For x, and for y alike,

    .. math::
        U \leftarrow (1 - \theta) W U + \theta d_x, \quad
        X \leftarrow X - \gamma (I - W) X - \alpha U

    from U = 0; the estimator U is a parameter's fellow in each packet.

    Args:
        problem, channel, upper_step, lower_step, smoothness, terms, random: as for
            :func:`dsbo`.
        estimator_channel: how U travels, ``dbo.channels.exact(mix)``.
        average: theta in (0, 1], of both levels.

    Returns:
        An algorithm that sends ``2 (|x| + |y|)`` numbers per link and step, in one
        round.

    Raises:
        ValueError, TypeError: as :func:`dsbo`.

    References:
        Yang, Zhang and Wang (2022), arXiv:2206.10870, simplified: our formulation.
    """

    def move(step):
        along = diffusion_cta(channel, local_step(step))
        return gossiped_average(along, estimator_channel, average)

    x, y = move(upper_step), move(lower_step)
    oracle = local_neumann(problem, terms, smoothness, random)
    return compose(problem, oracle, Phase(x=x, y=y, z=unused()))
