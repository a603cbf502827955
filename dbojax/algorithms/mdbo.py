"""MDBO: momentum and gradient tracking on hypergradients with local Hessians.

Gao, Gu and Thai (2023), AISTATS, PMLR 206:9238-9281.
"""

from __future__ import annotations

import jax
import optax

from dbojax.algorithms.compose import Phase, Step, compose, local_step
from dbojax.base import Algorithm, Channel, Problem
from dbojax.channels import private
from dbojax.oracles import local_neumann
from dbojax.strategies import diffusion_cta, gradient_tracking, moving_average


def mdbo(
    problem: Problem,
    *,
    channel: Channel,
    tracker_channel: Channel,
    upper_step: Step,
    lower_step: Step,
    smoothness: float | jax.Array,
    terms: int = 10,
    average: float = 0.1,
    random: bool = False,
) -> Algorithm:
    r"""Track averages of local hypergradients; only x, y and their trackers travel.

    With :math:`d_x, d_y` of ``dbo.oracles.local_neumann``, for x, and for y alike,

    .. math::
        &U^+ = (1 - \theta) U + \theta d_x, \quad
        T \leftarrow W T + U^+ - U, \quad U \leftarrow U^+ \\
        &X \leftarrow X - \gamma (I - W) X - \alpha T

    from :math:`U = T = d_x` at the start. The published method ties the settings
    together by one rate :math:`\eta`: ``channel = dbo.channels.exact(mix, gamma=eta)``,
    ``tracker_channel = dbo.channels.exact(mix)``, :math:`\alpha = b_1 \eta`,
    :math:`\beta = b_2 \eta` and :math:`\theta = a \eta`; it runs with
    :math:`\eta = 0.1` and :math:`a = b = 1`.

    Each node inverts its own Hessian, so where curvatures differ it settles at a point
    that is not the solution.

    Args:
        problem: objectives of one node.
        channel: how x and y travel.
        tracker_channel: how their trackers travel.
        upper_step: alpha, a schedule, or an optax transform.
        lower_step: beta, likewise.
        smoothness: L, at least the largest eigenvalue of any node's Hessian of g.
        terms: J of the truncated series.
        average: theta in (0, 1], of both levels.
        random: draw one power of the series, as published, in place of the sum.

    Returns:
        An algorithm that sends ``2 (|x| + |y|)`` numbers per link and step, in one
        round.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a part is of another kind.

    Examples:
        >>> mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(4)))
        >>> task = dbo.tasks.quadratic(n=4, dx=3, dy=5)
        >>> method = mdbo(task.problem, channel=dbo.channels.exact(mix, gamma=0.1),
        ...               tracker_channel=dbo.channels.exact(mix), upper_step=0.1,
        ...               lower_step=0.1, smoothness=5.0)
        >>> state = method.init(*dbo.replicate((task.x0, task.y0), task.n))
        >>> _, metrics = method.step(jax.random.key(0), state, task.batch)
        >>> metrics.traffic.message == 2 * (3 + 5) * state.x.dtype.itemsize
        True

    References:
        PMLR 206:9238-9281, Algorithm MDBO.
    """

    def tracked(step):
        move = gradient_tracking(channel, local_step(step), tracker_channel)
        return moving_average(move, average, from_first=True)

    oracle = local_neumann(problem, terms, smoothness, random)
    x, y = tracked(upper_step), tracked(lower_step)
    return compose(problem, oracle, Phase(x=x, y=y, z=unused()))


def unused():
    """Keeps the scalar z of ``local_neumann`` where it is, at no cost."""
    return diffusion_cta(private(), optax.sgd(1.0))
