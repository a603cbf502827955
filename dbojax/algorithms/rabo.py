"""RABO and RAFBO: clients train the part of a bilevel problem that fits them.

Our formulation of Li, Zhang, Zheng, Shi, Yuan, Cheng and Yu (2025), arXiv:2512.24667,
whose listing was not checked: the estimator, the rule of the masks and what separates
the two methods are our choices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from dbojax.algorithms.federated import federated
from dbojax.base import Algorithm, Oracle, Problem
from dbojax.oracles import finite_difference
from dbojax.submodels import Fleet


def rafbo(
    problem: Problem,
    fleet: Fleet,
    *,
    perturbation: float | jax.Array = 1e-2,
    oracle: Callable[[Problem], Oracle] | None = None,
    **settings: Any,
) -> Algorithm:
    r"""All clients share the lower level; nobody takes a second derivative.

    Client i steps on :math:`x_i = m^x_i \odot x`, :math:`y_i = m^y_i \odot y` and
    :math:`z_i = m^y_i \odot z` at once, with :math:`\delta = r / \|z_i\|`,

    .. math::
        d_y = \nabla_y g, \quad
        d_z = \frac{\nabla_y g(x_i, y_i + \delta z_i)
        - \nabla_y g(x_i, y_i - \delta z_i)}{2 \delta} - \nabla_y f, \quad
        d_x = \nabla_x f - \frac{\nabla_x g(x_i, y_i + \delta z_i)
        - \nabla_x g(x_i, y_i - \delta z_i)}{2 \delta}

    each on its own units, and the server averages every entry over those who hold it.
    With unlike masks its fixed point is not that of any single masked problem: a floor
    is left, which is larger for masks that never move.

    Args:
        problem: objectives of one client; g strongly convex in y.
        fleet: who the clients are and what they hold, ``dbo.submodels.fleet``.
        perturbation: r; 0.01 to 0.1 in float32, about 1e-4 in float64.
        oracle: other directions, made for objectives: e.g.
            ``functools.partial(dbo.oracles.perturbed, delta=0.01)``, which bends the
            lower problem, or ``dbo.oracles.soba`` for exact products.
        settings: ``upper_step``, ``lower_step`` and whatever else
            :func:`dbo.algorithms.federated` takes: ``local_steps``, ``server_steps``,
            ``radius`` (of the projection of z), ``uplink``, ``sample``, ``extracted``.

    Returns:
        An algorithm that sends x, y and z of each sub-model both ways; masks follow
        from the round and the client and are not sent.

    Raises:
        ValueError, TypeError: as :func:`dbo.algorithms.federated`, or if
            ``perturbation`` is not positive.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: jnp.sum((y - b) ** 2),
        ...                 lambda x, y, b: jnp.sum((y - x) ** 2))
        >>> units = dbo.submodels.layout(jnp.ones(8), jnp.ones(8), "unit", "unit")
        >>> half = dbo.submodels.fleet(units, [1.0, 0.5, 0.5])
        >>> method = rafbo(p, half, upper_step=0.1, lower_step=0.3, extracted=False)
        >>> state = method.init(jnp.zeros((1, 8)), jnp.zeros((1, 8)))
        >>> batch = jnp.ones((3, 8))
        >>> state, history = dbo.run(method, jax.random.key(0), state, batch, 200)
        >>> bool(jnp.allclose(state.x, 1.0, atol=1e-3))
        True
        >>> float(history["coverage_x"].min()), int(history["message_bytes"][0]) // 8
        (1.0, 24)

    References:
        Our formulation of arXiv:2512.24667; the directions are our reading of FdeHBO,
        arXiv:2312.03807, without its momentum (``dbo.oracles.storm``).
    """
    return federated(problem, _directions(oracle, perturbation), fleet, **settings)


def rabo(
    problem: Problem,
    fleet: Fleet,
    *,
    perturbation: float | jax.Array = 1e-2,
    oracle: Callable[[Problem], Oracle] | None = None,
    inner_steps: int = 1,
    **settings: Any,
) -> Algorithm:
    r"""Each client has a lower level of its own; x alone travels.

    .. math::
        \min_x \tfrac1M \textstyle\sum_i f_i(x, y_i^*(x)), \quad
        y_i^*(x) = \arg\min_y g_i(x, y)

    A client takes ``inner_steps`` on y and then steps on all three as in
    :func:`rafbo`; its y and z stay with it, at full width, and what it does not hold in
    a round does not move. Freeze its part with
    ``dbo.submodels.fleet(..., frozen=layout.lower_groups)``.

    Args:
        problem: as for :func:`rafbo`.
        fleet: likewise.
        perturbation: likewise.
        oracle: likewise.
        inner_steps: steps of y alone, before the others.
        settings: likewise.

    Returns:
        An algorithm that sends x of each sub-model both ways. Its ``y`` and ``z`` have
        a row per client, of which those that take part are read and written.

    Raises:
        ValueError, TypeError: as :func:`rafbo`.

    References:
        Our formulation of arXiv:2512.24667.
    """
    return federated(
        problem,
        _directions(oracle, perturbation),
        fleet,
        personal=True,
        inner_steps=inner_steps,
        **settings,
    )


def _directions(oracle, perturbation) -> Callable[[Problem], Oracle]:
    if oracle is not None:
        return oracle
    return functools.partial(finite_difference, radius=perturbation)
