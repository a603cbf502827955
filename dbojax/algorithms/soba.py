"""SOBA and its relatives SABA and MA-SOBA, with a server.

Every method is one phase in which x, y and z move at once along means of local
directions.
"""
# ruff: noqa: D417 - what means the same in all of them is described once, in `soba`.

from __future__ import annotations

import math
import numbers

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.algorithms.compose import Step, local_steps
from dbojax.algorithms.single_loop import single_loop
from dbojax.base import Algorithm, Mix, Oracle, Problem
from dbojax.channels import server
from dbojax.oracles import saba as saba_oracle
from dbojax.strategies import allreduce


def soba(
    problem: Problem,
    *,
    mix: Mix,
    upper_step: Step,
    lower_step: Step,
    linear_step: Step | None = None,
    clip: float = math.inf,
    oracle: Oracle | None = None,
    participants: int | None = None,
) -> Algorithm:
    r"""Move x, y and z at once along means of local directions.

    .. math::
        x \leftarrow x - \alpha \bar d_x, \quad y \leftarrow y - \beta \bar d_y, \quad
        z \leftarrow z - \eta \bar d_z

    with :math:`d_y = \nabla_y g`, :math:`d_z = \nabla^2_{yy} g\, z - \nabla_y f` and
    :math:`d_x = \nabla_x f - \nabla^2_{xy} g\, z`.

    Args:
        problem: objectives of one worker.
        mix: gives everyone the mean, ``dbo.mixing.averaging(n)``.
        upper_step: alpha, a schedule, or an optax transform.
        lower_step: beta, likewise.
        linear_step: eta, likewise; by default as ``lower_step``.
        clip: z is scaled back to at most this length; any value above
            :math:`\|z^*\|` does no harm.
        oracle: directions, ``dbo.oracles.soba(problem)`` by default.
        participants: workers that take part in a step, drawn anew each time.

    Returns:
        An algorithm that sends ``|x| + 2 |y|`` numbers up and as many down.

    Raises:
        ValueError: if ``mix`` does not average or a setting is out of range.
        TypeError: if a part is of another kind.

    References:
        Dagréou, Ablin, Vaiter and Moreau (2022), arXiv:2201.13409; the sign of z is
        opposite there.
    """
    channel = server(mix)
    steps = local_steps(upper_step, lower_step, linear_step)
    x, y, z = (allreduce(channel, step) for step in steps)
    return single_loop(
        problem, x=x, y=y, z=z, oracle=oracle, clip=clip, participants=participants
    )


def saba(
    problem: Problem,
    *,
    mix: Mix,
    num_upper: int,
    num_lower: int,
    upper_step: Step,
    lower_step: Step,
    linear_step: Step | None = None,
    clip: float = math.inf,
    participants: int | None = None,
) -> Algorithm:
    r"""SOBA with directions whose variance vanishes: constant steps converge linearly.

    Args:
        problem, mix, upper_step, lower_step, linear_step, clip, participants: as for
            :func:`soba`.
        num_upper: samples of f at a worker, padding included.
        num_lower: samples of g.

    Returns:
        An algorithm for batches of ``dbo.Indexed`` samples, as
        ``dbo.tasks.samplers.indexed`` draws them; it sends what :func:`soba` sends.

    Raises:
        ValueError, TypeError: as :func:`soba` and :func:`dbo.oracles.saba`.

    References:
        Dagréou, Ablin, Vaiter and Moreau (2022), arXiv:2201.13409, SABA.
    """
    return soba(
        problem,
        mix=mix,
        upper_step=upper_step,
        lower_step=lower_step,
        linear_step=linear_step,
        clip=clip,
        oracle=saba_oracle(problem, num_upper, num_lower),
        participants=participants,
    )


def ma_soba(
    problem: Problem,
    *,
    mix: Mix,
    upper_step: Step,
    lower_step: Step,
    linear_step: Step | None = None,
    average: float = 0.1,
    new_average: bool = False,
    clip: float = math.inf,
    oracle: Oracle | None = None,
    participants: int | None = None,
) -> Algorithm:
    r"""SOBA whose x follows a moving average of its direction.

    .. math:: x \leftarrow x - \alpha h, \quad h \leftarrow (1 - \theta) h
        + \theta \bar d_x

    Args:
        problem, mix, upper_step, lower_step, linear_step, clip, oracle, participants:
            as for :func:`soba`.
        average: theta in (0, 1].
        new_average: x follows the average that already holds this step's direction.

    Returns:
        An algorithm that sends what :func:`soba` sends.

    Raises:
        ValueError, TypeError: as :func:`soba`, or if ``average`` is not in (0, 1].

    References:
        Chen, Xiao and Balasubramanian (2023), arXiv:2306.12067.
    """
    channel = server(mix)
    x_step, *steps = local_steps(upper_step, lower_step, linear_step)
    x_step = optax.chain(averaged(average, new_average), x_step)
    x, y, z = (allreduce(channel, step) for step in (x_step, *steps))
    return single_loop(
        problem, x=x, y=y, z=z, oracle=oracle, clip=clip, participants=participants
    )


def averaged(weight: float, new: bool) -> optax.GradientTransformation:
    """Moving average from zero; the old one is what stood before this update."""
    if isinstance(weight, numbers.Real) and not 0 < weight <= 1:
        raise ValueError(f"`average` must be in (0, 1], got {weight}.")

    def init(params):
        return jax.tree.map(jnp.zeros_like, trees.wide(params))

    def update(updates, state, params=None):
        del params
        after = trees.averaged(weight, state, updates)
        return trees.cast(after if new else state, updates), after

    return optax.GradientTransformation(init, update)
