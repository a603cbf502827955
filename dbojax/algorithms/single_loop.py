"""Single-loop methods: x, y and z move at once, each by a strategy of its own.

D-SOBA and SPARKLE in our formulation; their listings were not checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import optax

from dbojax.algorithms.compose import Phase, Step, compose, local_steps
from dbojax.base import Algorithm, Channel, Oracle, Problem, Strategy
from dbojax.oracles import soba
from dbojax.strategies import ball, diffusion_atc, moving_average, projected

# How a variable travels and steps -> how it moves, e.g. `strategies.exact_diffusion`.
Rule = Callable[[Channel, optax.GradientTransformation], Strategy]


def single_loop(
    problem: Problem,
    *,
    x: Strategy,
    y: Strategy,
    z: Strategy,
    oracle: Oracle | None = None,
    clip: float = math.inf,
    participants: int | None = None,
) -> Algorithm:
    r"""Move x, y and z at once, by any strategy and over any graph per level.

    .. math::
        d_y = \nabla_y g, \quad d_z = \nabla^2_{yy} g\, z - \nabla_y f, \quad
        d_x = \nabla_x f - \nabla^2_{xy} g\, z

    Args:
        problem: objectives of one node.
        x: how the upper variable moves along :math:`d_x`.
        y: how the lower variable moves.
        z: how the solution of the linear system moves.
        oracle: directions, ``dbo.oracles.soba(problem)`` by default.
        clip: z is scaled back to at most this length.
        participants: workers that take part in a step, for server channels.

    Returns:
        An algorithm with as many rounds per step as its slowest strategy.

    Raises:
        ValueError: if ``clip`` is not positive.
        TypeError: if a part is of another kind.

    Examples:
        >>> t, task = dbo.topology, dbo.tasks.quadratic(n=4, dx=3, dy=5)
        >>> above, below = (dbo.channels.exact(dbo.mixing.mixer(t.metropolis(graph)))
        ...                 for graph in (t.complete(4), t.ring(4)))
        >>> move = dbo.strategies.gradient_tracking
        >>> lower = move(below, optax.sgd(0.05))
        >>> method = single_loop(task.problem, x=move(above, optax.sgd(0.1)),
        ...                      y=lower, z=lower)
        >>> start = method.init(*dbo.replicate((task.x0, task.y0), task.n))
        >>> state, _ = dbo.run(method, jax.random.key(0), start, task.batch, 2000)
        >>> slope = task.exact.hypergradient(dbo.node_mean(state.x))
        >>> bool(jnp.linalg.norm(slope) < 1e-6)
        True
    """
    if not (isinstance(clip, float) and math.isinf(clip) and clip > 0):
        z = projected(z, ball(clip))
    oracle = soba(problem) if oracle is None else oracle
    return compose(problem, oracle, Phase(x=x, y=y, z=z), participants=participants)


def sparkle(
    problem: Problem,
    *,
    upper: Rule,
    lower: Rule,
    upper_channel: Channel,
    lower_channel: Channel,
    upper_step: Step,
    lower_step: Step,
    linear_step: Step | None = None,
    average: float = 0.1,
    oracle: Oracle | None = None,
    clip: float = math.inf,
) -> Algorithm:
    r"""Single loop with one strategy above and one below, each over its own graph.

    .. math::
        R \leftarrow (1 - \theta) R + \theta d_x; \quad
        X \text{ moves by `upper` along } R, \; Y, Z \text{ by `lower` along } d_y, d_z

    SPARKLE-GT, -EXTRA and -ED take one strategy twice; a mixed method takes two, e.g.
    exact diffusion below and gradient tracking above.

    Args:
        problem: objectives of one node.
        upper: makes the strategy of x from a channel and a transform, e.g.
            ``dbo.strategies.gradient_tracking``.
        lower: makes those of y and z.
        upper_channel: how x, and what its strategy adds, travel.
        lower_channel: the same for y and z.
        upper_step: alpha, a schedule, or an optax transform.
        lower_step: beta, likewise.
        linear_step: eta of z, likewise; by default as ``lower_step``.
        average: theta in (0, 1].
        oracle: directions, ``dbo.oracles.soba(problem)`` by default.
        clip: z is scaled back to at most this length.

    Returns:
        An algorithm that sends ``|x|`` and ``2 |y|`` numbers per link and step over
        exact channels, and twice that on a level with gradient tracking.

    Raises:
        ValueError: if ``average`` is not in (0, 1] or ``clip`` not positive.
        TypeError: if a part is of another kind.

    Examples:
        >>> mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(4)))
        >>> task, s = dbo.tasks.quadratic(n=4, dx=3, dy=5), dbo.strategies
        >>> wire = dbo.channels.exact(mix)
        >>> method = sparkle(
        ...     task.problem, upper=s.gradient_tracking, lower=s.diffusion_atc,
        ...     upper_channel=wire, lower_channel=wire, upper_step=0.1, lower_step=0.1)
        >>> state = method.init(*dbo.replicate((task.x0, task.y0), task.n))
        >>> _, metrics = method.step(jax.random.key(0), state, task.batch)
        >>> metrics.traffic.message == (2 * 3 + 2 * 5) * state.x.dtype.itemsize
        True

    References:
        SPARKLE, NeurIPS 2024, as recalled: our formulation.
    """
    for name, rule in (("upper", upper), ("lower", lower)):
        if not callable(rule):
            raise TypeError(
                f"`{name}` makes a strategy from a channel and a transform, e.g. "
                f"`dbo.strategies.exact_diffusion`; got {type(rule).__name__}. What is "
                "a strategy already goes into `single_loop`."
            )
    x_step, *steps = local_steps(upper_step, lower_step, linear_step)
    y, z = (lower(lower_channel, step) for step in steps)
    x = moving_average(upper(upper_channel, x_step), average)
    return single_loop(problem, x=x, y=y, z=z, oracle=oracle, clip=clip)


def d_soba(
    problem: Problem,
    *,
    channel: Channel,
    upper_step: Step,
    lower_step: Step,
    linear_step: Step | None = None,
    average: float = 0.1,
    lower_channel: Channel | None = None,
    oracle: Oracle | None = None,
    clip: float = math.inf,
) -> Algorithm:
    r"""Single loop with plain diffusion: cheap per step, biased where nodes differ.

    .. math::
        &R \leftarrow (1 - \theta) R + \theta d_x, \quad
        X \leftarrow W (X - \alpha R) \\
        &Y \leftarrow W (Y - \beta d_y), \quad Z \leftarrow W (Z - \eta d_z)

    With constant steps it stops :math:`O(\alpha + \beta)` away from the solution.

    Args:
        problem: objectives of one node.
        channel: how the variables travel, e.g. ``dbo.channels.exact(mix)``.
        upper_step: alpha, a schedule, or an optax transform.
        lower_step: beta, likewise.
        linear_step: eta, likewise; by default as ``lower_step``.
        average: theta in (0, 1].
        lower_channel: how y and z travel where that differs.
        oracle: directions, ``dbo.oracles.soba(problem)`` by default.
        clip: z is scaled back to at most this length.

    Returns:
        An algorithm that sends ``|x| + 2 |y|`` numbers per link and step.

    Raises:
        ValueError, TypeError: as :func:`sparkle`.

    References:
        Kong, Zhu, Lu, Huang and Yuan (2025), JMLR 26(240), D-SOBA, as recalled: our
        formulation.
    """
    return sparkle(
        problem,
        upper=diffusion_atc,
        lower=diffusion_atc,
        upper_channel=channel,
        lower_channel=channel if lower_channel is None else lower_channel,
        upper_step=upper_step,
        lower_step=lower_step,
        linear_step=linear_step,
        average=average,
        oracle=oracle,
        clip=clip,
    )
