"""C²DFB: compressed, fully first-order decentralised bilevel optimisation.

Our formulation of Wen, Liu, Abdelmoniem, Zhou and Xu (2024), arXiv:2410.14115.
"""

from __future__ import annotations

from dbojax.algorithms.compose import Phase, Step, compose, local_step
from dbojax.base import Algorithm, Channel, Problem
from dbojax.oracles import penalty as penalty_oracle
from dbojax.strategies import gradient_tracking


def c2dfb(
    problem: Problem,
    *,
    outer: Channel,
    inner: Channel,
    upper_step: Step,
    lower_step: Step,
    penalty: float = 10.0,
    inner_steps: int = 10,
    inner_tracker: Channel | None = None,
    carry: bool = True,
) -> Algorithm:
    r"""First-order bilevel method with gradient tracking and compressed inner rounds.

    Each step moves x by gradient tracking at the old (y, z), then y and z by ``K``
    rounds of gradient tracking at the new x (the directions are those of
    ``dbo.oracles.penalty``):

    .. math::
        \min_x \min_y \max_z\; f(x, y) + \lambda \big(g(x, y) - g(x, z)\big)

    In the state ``y`` is the penalised lower variable and ``z`` the plain one, the
    estimate of :math:`y^*(x)`. Trackers and reference points persist over steps.

    Args:
        problem: objectives of one node.
        outer: channel of x and its tracker, dense in our formulation:
            ``dbo.channels.exact(mix, gamma=0.6)``.
        inner: channel of y, z and their trackers: ``dbo.channels.reference_point``, or
            ``dbo.channels.error_feedback`` for the naive ablation C²DFB(nc).
        upper_step: step size of x, a schedule, or an optax transform.
        lower_step: the same for y and z; start at 0.5 / smoothness of g.
        penalty: lambda; the hypergradient's bias is proportional to 1 / lambda.
        inner_steps: rounds K of y and z per step.
        inner_tracker: channel of the trackers of y and z where it differs.
        carry: False forgets the memories of y and z in each step; it stalls under
            heterogeneity and is there to show that. Reference points then restart at
            the current values, as if those were common knowledge at no cost.

    Returns:
        An algorithm with K + 1 communication rounds per step.

    Raises:
        ValueError: if ``penalty`` or ``inner_steps`` is not positive.

    Examples:
        >>> mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(4)))
        >>> p = dbo.Problem(lambda x, y, b: y @ y, lambda x, y, b: (y - x) @ (y - x))
        >>> wire = dbo.channels.exact(mix)
        >>> method = c2dfb(p, outer=wire, inner=wire, upper_step=0.1, lower_step=0.1)
        >>> start = dbo.replicate(jnp.ones(3), 4)
        >>> _, metrics = method.step(jax.random.key(0), method.init(start, start), None)
        >>> metrics.traffic.rounds
        11

    References:
        arXiv:2410.14115; the inner rounds follow the update of BEER, arXiv:2201.13320.
    """
    lower = gradient_tracking(inner, local_step(lower_step), inner_tracker)
    return compose(
        problem,
        penalty_oracle(problem, penalty),
        Phase(x=gradient_tracking(outer, local_step(upper_step))),
        Phase(y=lower, z=lower, times=inner_steps, restart=not carry),
    )
