"""Directions from an estimator that solves the lower level by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Calls, Hypergradient, Oracle


def from_hypergradient(hyper: Hypergradient) -> Oracle:
    r"""Let each node estimate its own hypergradient; its lower level is personal.

    .. math::
        d_x = \widehat\nabla h_i(x_i), \quad d_y = y_i - y_{T,i}(x_i), \quad d_z = 0

    so that a step of length one along :math:`-d_y` puts y where the inner solver ended.
    This is no estimate where all nodes share one lower solution.

    Args:
        hyper: an estimator, e.g. ``dbo.hypergradients.forward_gradient(problem,
            inner)``.

    Returns:
        An oracle whose ``z`` is an unused scalar and whose memory is the estimator's
        state.

    Raises:
        TypeError: if ``hyper`` is not a ``Hypergradient``.

    Examples:
        >>> h = dbo.hypergradients
        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> oracle = from_hypergradient(h.reverse(p, h.descent(p, optax.sgd(0.5), 3)))
        >>> x, y = jnp.array(2.0), jnp.array(0.0)
        >>> z, memory = oracle.init(x, y)
        >>> (d_x, d_y, _), _ = oracle.directions(
        ...     jax.random.key(0), x, y, z, memory, None)
        >>> float(d_x), float(y - d_y)
        (0.65625, 1.75)
    """
    example = "dbo.hypergradients.reverse(problem, inner)"
    trees.check_type(hyper, Hypergradient, "hyper", example)

    def init(x, y):
        return jnp.zeros(()), hyper.init(x, y)

    def directions(key, x, y, z, memory, batch):
        d_x, end, memory, _ = hyper.estimate(key, x, y, memory, batch)
        d_y = jax.tree.map(jnp.subtract, y, end)
        return (d_x, d_y, jnp.zeros_like(z)), memory

    return Oracle(init, directions, (hyper.calls, Calls(), Calls()))
