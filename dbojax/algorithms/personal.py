"""Methods whose nodes share x and each have a lower level of their own."""

from __future__ import annotations

import optax

from dbojax.algorithms.compose import Phase, compose
from dbojax.base import Algorithm, Hypergradient, Problem, Strategy
from dbojax.channels import private
from dbojax.oracles import from_hypergradient
from dbojax.strategies import diffusion_cta


def personal(problem: Problem, hyper: Hypergradient, upper: Strategy) -> Algorithm:
    r"""Agree on x, with any estimator of each node's own hypergradient.

    .. math:: \min_x \tfrac1n \textstyle\sum_i h_i(x), \quad
        h_i(x) = f_i(x, y_{T,i}(x))

    where node i makes :math:`y_{T,i}` from its own data: nothing of the lower level
    travels.

    Args:
        problem: objectives of one node.
        hyper: estimator of one node's hypergradient.
        upper: how x moves and agrees, e.g. ``dbo.strategies.gradient_tracking(channel,
            optax.adam(0.01))``.

    Returns:
        An algorithm; y carries on where the inner solver ended, unless that solver
        starts anew by itself.

    Raises:
        TypeError: if a part is of another kind.

    Examples:
        >>> h = dbo.hypergradients
        >>> p = dbo.Problem(lambda x, y, b: (y - b) ** 2, lambda x, y, b: (y - x) ** 2)
        >>> inner = h.descent(p, optax.sgd(0.25), 40, start=lambda key, x, y: 0 * y)
        >>> channel = dbo.channels.exact(dbo.mixing.averaging(2))
        >>> method = personal(p, h.checkpointed(p, inner),
        ...                   dbo.strategies.gradient_tracking(channel, optax.sgd(0.2)))
        >>> state = method.init(jnp.zeros(2), jnp.zeros(2))
        >>> state, _ = dbo.run(method, jax.random.key(0), state, jnp.array([1.0, 5.0]),
        ...                    60)
        >>> bool(jnp.allclose(state.x, 3.0, atol=1e-4))
        True
    """
    own = diffusion_cta(private(), optax.sgd(1.0))
    return compose(problem, from_hypergradient(hyper), Phase(x=upper, y=own, z=own))
