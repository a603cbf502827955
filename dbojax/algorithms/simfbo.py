"""SimFBO and ShroFBO: single-loop rounds with local steps and server steps."""
# ruff: noqa: D417 - what means the same in both is described once, in `simfbo`.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax

from dbojax.algorithms.compose import Step
from dbojax.algorithms.federated import federated
from dbojax.algorithms.visits import Sample
from dbojax.base import Algorithm, Channel, Compressor, Oracle, Problem
from dbojax.oracles import soba
from dbojax.submodels import Fleet


def simfbo(
    problem: Problem,
    fleet: Fleet,
    *,
    upper_step: float | jax.Array,
    lower_step: float | jax.Array,
    linear_step: float | jax.Array | None = None,
    local_steps: int | Sequence[int] = 1,
    server_steps: tuple[Step, Step, Step] = (1.0, 1.0, 1.0),
    radius: float | jax.Array = math.inf,
    oracle: Callable[[Problem], Oracle] = soba,
    uplink: Compressor | Channel | None = None,
    sample: Sample | None = None,
    extracted: bool = True,
    smaller: Callable[[Mapping[str, int]], Problem] | None = None,
) -> Algorithm:
    r"""Sum local directions of x, y and z at the clients, then step at the server.

    At client i all three move from the same old point, K times,

    .. math::
        y_i \leftarrow y_i - \beta\, d_{y,i}, \quad
        z_i \leftarrow z_i - \eta\, d_{z,i}, \quad x_i \leftarrow x_i - \alpha\, d_{x,i}

    and with the sums :math:`q_i` of the directions the server moves

    .. math::
        x \leftarrow x - \gamma_x \alpha\, \bar q^x, \quad
        y \leftarrow y - \gamma_y \beta\, \bar q^y, \quad
        z \leftarrow \Pi_r(z - \gamma_z \eta\, \bar q^z).

    Args:
        problem: objectives of one client.
        fleet: the clients; for the method at full size all have capacity 1.
        upper_step: alpha.
        lower_step: beta.
        linear_step: eta; by default as ``lower_step``.
        local_steps: K, or one number per level of ``fleet``.
        server_steps: the gammas, in units of the local steps; or optax transforms.
        radius: z is scaled back to at most this length at the server.
        oracle: makes directions; by default with exact Hessian products.
        uplink, sample, extracted, smaller: as for :func:`dbo.algorithms.federated`.

    Returns:
        An algorithm whose round sends ``|x| + 2 |y|`` numbers up and as many down.

    Raises:
        ValueError, TypeError: as :func:`dbo.algorithms.federated`.

    Examples:
        >>> task = dbo.tasks.federated_toy(n=3, dx=4, dy=2)
        >>> units = dbo.submodels.coordinates(task.x0, task.y0)
        >>> full = dbo.submodels.fleet(units, [1.0] * 3)
        >>> method = simfbo(task.problem, full, upper_step=0.1, lower_step=0.1)
        >>> state = method.init(task.x0[None], task.y0[None])
        >>> _, metrics = jax.jit(method.step)(jax.random.key(0), state, task.batch)
        >>> metrics.traffic.message == state.x.dtype.itemsize * (4 + 2 * 2)
        True

    References:
        Yang, Xiao and Ji (2023), arXiv:2305.19442, with equal weights of clients and
        of local steps; the sign of z is ours.
    """
    return federated(
        problem,
        oracle,
        fleet,
        upper_step=upper_step,
        lower_step=lower_step,
        linear_step=linear_step,
        local_steps=local_steps,
        server_steps=server_steps,
        radius=radius,
        uplink=uplink,
        sample=sample,
        extracted=extracted,
        smaller=smaller,
    )


def shrofbo(
    problem: Problem,
    fleet: Fleet,
    *,
    upper_step: float | jax.Array,
    lower_step: float | jax.Array,
    linear_step: float | jax.Array | None = None,
    local_steps: int | Sequence[int] = 1,
    server_steps: tuple[Step, Step, Step] = (1.0, 1.0, 1.0),
    radius: float | jax.Array = math.inf,
    oracle: Callable[[Problem], Oracle] = soba,
    uplink: Compressor | Channel | None = None,
    sample: Sample | None = None,
    extracted: bool = True,
    smaller: Callable[[Mapping[str, int]], Problem] | None = None,
) -> Algorithm:
    r"""SimFBO for clients that take unlike numbers of local steps.

    Sums are divided by each client's number of steps and multiplied by the mean,

    .. math:: q_i \leftarrow q_i\, \bar K / K_i, \quad
        \bar K = \tfrac1{|S|} \textstyle\sum_i K_i

    so that fast clients do not pull the others to optima of their own.

    Args:
        problem, fleet, upper_step, lower_step, linear_step, server_steps, radius: as
            for :func:`simfbo`.
        local_steps: K, one number per level of ``fleet``, the largest capacity first.
        oracle, uplink, sample, extracted, smaller: likewise.

    Returns:
        An algorithm; where all clients take as many steps it is :func:`simfbo`.

    Raises:
        ValueError, TypeError: as :func:`simfbo`.

    References:
        Yang, Xiao and Ji (2023), arXiv:2305.19442, with equal weights of clients and
        of local steps.
    """
    return federated(
        problem,
        oracle,
        fleet,
        upper_step=upper_step,
        lower_step=lower_step,
        linear_step=linear_step,
        local_steps=local_steps,
        server_steps=server_steps,
        radius=radius,
        uplink=uplink,
        sample=sample,
        extracted=extracted,
        smaller=smaller,
        normalise=True,
    )
