"""FedBiO: local steps of all three variables, then plain averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax

from dbojax.algorithms.federated import federated
from dbojax.algorithms.visits import Sample
from dbojax.base import Algorithm, Channel, Compressor, Oracle, Problem
from dbojax.oracles import soba
from dbojax.submodels import Fleet


def fedbio(
    problem: Problem,
    fleet: Fleet,
    *,
    upper_step: float | jax.Array,
    lower_step: float | jax.Array,
    linear_step: float | jax.Array | None = None,
    local_steps: int | Sequence[int] = 5,
    oracle: Callable[[Problem], Oracle] = soba,
    uplink: Compressor | Channel | None = None,
    sample: Sample | None = None,
    extracted: bool = True,
    smaller: Callable[[Mapping[str, int]], Problem] | None = None,
) -> Algorithm:
    r"""Average x, y and z over the clients after every K local steps of all three.

    .. math::
        x \leftarrow \tfrac1{|S|} \textstyle\sum_i x_i^{(K)}, \quad
        y \leftarrow \tfrac1{|S|} \textstyle\sum_i y_i^{(K)}, \quad
        z \leftarrow \tfrac1{|S|} \textstyle\sum_i z_i^{(K)}

    where :math:`z_i` descends on the quadratic whose minimiser gives the
    hypergradient, :math:`d_{z,i} = \nabla^2_{yy} g_i\, z_i - \nabla_y f_i`. There are
    no steps of the server's own and no projection.

    Args:
        problem: objectives of one client.
        fleet: the clients; for the method at full size all have capacity 1.
        upper_step: local step size of x.
        lower_step: of y.
        linear_step: of z; by default as ``lower_step``.
        local_steps: K, or one number per level of ``fleet``.
        oracle: makes directions; by default with exact Hessian products.
        uplink: as for :func:`dbo.algorithms.federated`.
        sample: likewise.
        extracted: likewise.
        smaller: likewise.

    Returns:
        An algorithm that sends ``|x| + 2 |y|`` numbers up and as many down.

    Raises:
        ValueError: as :func:`dbo.algorithms.federated`.
        TypeError: likewise.

    References:
        Li, Huang and Huang (2023), arXiv:2302.06701, as we recall it: its listing was
        not checked, and all three variables here move from the same old point.
    """
    return federated(
        problem,
        oracle,
        fleet,
        upper_step=upper_step,
        lower_step=lower_step,
        linear_step=linear_step,
        local_steps=local_steps,
        uplink=uplink,
        sample=sample,
        extracted=extracted,
        smaller=smaller,
    )
