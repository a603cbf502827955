"""AMSGrad as CD-Adam's authors run it, and their schedule."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Tree


class AmsgradState(NamedTuple):
    """Moments, at least float32, and how many steps they have seen."""

    steps: jax.Array  # (), int32
    mu: Tree
    nu: Tree
    nu_max: Tree


def scale_by_amsgrad(
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
    max_of_corrected: bool = False,
) -> optax.GradientTransformation:
    r"""Divide the momentum by the root of the largest second moment so far.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) u, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) u^2, \quad
        \hat v \leftarrow \max(\hat v, v), \qquad
        \frac{m / (1 - \beta_1^t)}{\sqrt{\hat v / (1 - \beta_2^t)} + \epsilon}

    The maximum is over the moment as it is, and the correction comes at use, as in
    ``torch.optim.Adam(amsgrad=True)``; ``optax.scale_by_amsgrad`` takes the maximum of
    the corrected moment, in which the first gradients count for more.

    Args:
        b1: of the momentum.
        b2: of the second moment.
        eps: keeps the divisor from zero.
        bias_correction: False leaves both factors :math:`1 - \beta^t` out; with
            ``eps_inside_sqrt`` that is :math:`m / \sqrt{\hat v + \epsilon}`, the form
            that analyses treat.
        eps_inside_sqrt: adds epsilon to what is under the root instead.
        max_of_corrected: takes the maximum as optax does.

    Returns:
        An optax transform without a sign: chain ``optax.scale_by_learning_rate``.

    Examples:
        >>> tx = scale_by_amsgrad(b1=0.0, eps=0.0, bias_correction=False)
        >>> u, state = jnp.array([10.0]), tx.init(jnp.zeros(1))
        >>> _, state = tx.update(u, state)
        >>> later, _ = tx.update(u / 100, state)  # the largest moment stays
        >>> float(later[0] / (u[0] / 100)) == float(1 / jnp.sqrt(state.nu_max[0]))
        True

    References:
        Reddi, Kale and Kumar (2018), arXiv:1904.09237; step 6 of our formulation of
        CD-Adam (arXiv 2111.00705), following the authors' public code.
    """

    def init(params) -> Any:
        def zeros():
            return jax.tree.map(lambda p: jnp.zeros(p.shape, _wide(p.dtype)), params)

        return AmsgradState(jnp.zeros((), jnp.int32), zeros(), zeros(), zeros())

    def update(updates, state, params=None) -> Any:
        del params
        steps = jnp.asarray(optax.safe_increment(state.steps))
        wide = jax.tree.map(lambda u: u.astype(_wide(u.dtype)), updates)
        mu = averaged(state.mu, wide, b1)
        nu = averaged(state.nu, jax.tree.map(jnp.square, wide), b2)
        first = 1 - b1**steps if bias_correction else 1.0
        second = 1 - b2**steps if bias_correction else 1.0
        largest = corrected(nu, second) if max_of_corrected else nu
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, largest)
        used = nu_max if max_of_corrected else corrected(nu_max, second)

        def scaled(u, m, v):
            # A number under the root would meet short floats as a wide one.
            small = jnp.asarray(eps, v.dtype)
            root = jnp.sqrt(v + small) if eps_inside_sqrt else jnp.sqrt(v) + small
            return (m / root).astype(u.dtype)

        scaled_updates = jax.tree.map(scaled, updates, corrected(mu, first), used)
        return scaled_updates, AmsgradState(steps, mu, nu, nu_max)

    return optax.GradientTransformation(init, update)


def averaged(old: Tree, new: Tree, decay) -> Tree:
    """``decay old + (1 - decay) new`` in the dtypes of ``old``."""
    return jax.tree.map(
        lambda a, b: trees.times(decay, a) + trees.times(1 - decay, b), old, new
    )


def corrected(moment: Tree, weight) -> Tree:
    """A moment that started at zero, divided by the weight it has gathered."""
    return jax.tree.map(lambda a: a / jnp.asarray(weight, a.dtype), moment)


def two_step_decay(learning_rate: float, steps: int) -> optax.Schedule:
    r"""A tenth of the rate from the middle on, a hundredth from three quarters on.

    .. math::
        \alpha_t = \alpha \cdot \begin{cases}
        1 & t < \lfloor T/2 \rfloor \\
        1/10 & \lfloor T/2 \rfloor \le t < \lfloor 3T/4 \rfloor \\
        1/100 & \text{after} \end{cases}, \qquad t = 1, \dots, T.

    One-bit messages stall at a constant rate; decay is what lets them settle.

    Args:
        learning_rate: alpha.
        steps: T.

    Returns:
        An optax schedule, which counts steps from 0.

    Raises:
        ValueError: if ``steps`` is not a positive integer.

    Examples:
        >>> rate = two_step_decay(1.0, 8)
        >>> [round(float(rate(step)), 2) for step in range(8)]
        [1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01, 0.01]

    References:
        Our formulation of CD-Adam (arXiv 2111.00705), following the authors' public
        code.
    """
    if not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(
            f"`two_step_decay` needs a whole number steps >= 1, got {steps!r}."
        )

    def rate(count):
        t = jnp.asarray(count) + 1
        late = jnp.where(t < 3 * steps // 4, 0.1, 0.01)
        return learning_rate * jnp.where(t < steps // 2, 1.0, late)

    return rate


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)
