"""Losses of a sample whose derivatives are cheaper than what JAX derives."""

from __future__ import annotations

import jax


def logistic_loss(margins: jax.Array) -> jax.Array:
    r"""Logistic loss of each margin :math:`m = b\, a^\top y`, labels b in {-1, 1}.

    .. math::
        \ell(m) = \log(1 + e^{-m}), \qquad \ell'(m) = -\sigma(-m)

    The value is that of ``jax.nn.softplus(-m)``. So is the derivative, to rounding, but
    as one sigmoid, where JAX differentiates a logarithm of two exponentials.

    Args:
        margins: of any shape.

    Returns:
        Losses of the same shape, in nats.

    Examples:
        >>> margins = jnp.array([0.0, 3.0, -200.0])
        >>> logistic_loss(margins)[2].tolist(), jax.grad(logistic_loss)(0.0).tolist()
        (200.0, -0.5)
    """
    return _softplus(-margins)


@jax.custom_jvp
def _softplus(v):
    return jax.nn.softplus(v)


_softplus.defjvps(lambda t, value, v: t * jax.nn.sigmoid(v))
