"""Hyperparameters of a regression on digits, and its hypergradients written by hand.

Multinomial logistic regression on scikit-learn's digits: y is (64, 10), x one
regularisation weight per entry; gradient descent inside, 20 steps of a linear solver.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import dbojax as dbo

h = dbo.hypergradients
STEP = 0.5  # of gradient descent and of the Neumann series
TERMS = 20  # of the linear solvers, and steps of truncated reverse mode
DIRECTIONS = 8


def fit(y, samples):
    inputs, targets = samples
    return optax.losses.softmax_cross_entropy(inputs @ y, targets).mean()


def upper(x, y, samples):
    del x
    return fit(y, samples)


def lower(x, y, samples):
    return fit(y, samples) + jnp.sum(jnp.exp(x) * y**2)


def arguments(dtype):
    """x, y and the batch: half of the digits for each level."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    inputs, targets = images[order] / 16, np.eye(10)[labels[order]]
    parts = np.array_split(inputs, 2), np.array_split(targets, 2)
    levels = (
        tuple(jnp.asarray(a, dtype) for a in pair) for pair in zip(*parts, strict=True)
    )
    x = jnp.full((64, 10), -6.0, dtype)
    return x, jnp.zeros_like(x), dbo.Batch(*levels)


# By hand: every function returns the hypergradient, y and the upper loss, as ours do.


def descend(x, y, batch, steps, wrap=lambda body: body):
    def body(y, _):
        return y - STEP * jax.grad(lower, 1)(x, y, batch.lower), None

    return jax.lax.scan(wrap(body), y, None, length=steps)[0]


def with_aux(unroll):
    """Hypergradient, y and loss by reverse mode through ``unroll(x, y, batch)``."""

    def estimate(x, y, batch):
        def end(x):
            solution = unroll(x, y, batch)
            return upper(x, solution, batch.upper), solution

        (value, solution), grad = jax.value_and_grad(end, has_aux=True)(x)
        return grad, solution, value

    return estimate


def hand_truncated(x, y, batch, steps):
    def unroll(x, y, batch):
        start = descend(jax.lax.stop_gradient(x), y, batch, steps - TERMS)
        return descend(x, jax.lax.stop_gradient(start), batch, TERMS)

    return with_aux(unroll)(x, y, batch)


def hand_forward(x, y, batch, steps):
    law = h.directions.rademacher.draw(
        h.directions.direction_key(jax.random.key(0)), x.size, DIRECTIONS, x.dtype
    )
    signs = law(jnp.arange(DIRECTIONS)).reshape(DIRECTIONS, *x.shape)

    def end(x):
        solution = descend(x, y, batch, steps)
        return upper(x, solution, batch.upper), solution

    def along(v):
        value, w, solution = jax.jvp(end, (x,), (v,), has_aux=True)
        return w, value, solution

    w, value, solution = jax.vmap(along, out_axes=(0, None, None))(signs)
    return jnp.tensordot(w, signs, 1) / DIRECTIONS, solution, value


def hand_implicit(solve):
    """Solve H z = grad_y f by hand, then one product with the mixed block."""

    def estimate(x, y, batch, steps):
        y = descend(x, y, batch, steps)
        value, right = jax.value_and_grad(upper, 1)(x, y, batch.upper)

        def slope(y):
            return jax.grad(lower, 1)(x, y, batch.lower)

        z = solve(lambda v: jax.jvp(slope, (y,), (v,))[1], right)
        pull = jax.vjp(lambda x: jax.grad(lower, 1)(x, y, batch.lower), x)[1]
        return -pull(z)[0], y, value

    return estimate


def conjugate_gradient(product, right):
    def body(carry, _):
        z, r, p, square = carry
        image = product(p)
        alpha = square / jnp.vdot(p, image)
        z, r = z + alpha * p, r - alpha * image
        new = jnp.vdot(r, r)
        return (z, r, r + new / square * p, new), None

    start = jnp.zeros_like(right), right, right, jnp.vdot(right, right)
    return jax.lax.scan(body, start, None, length=TERMS)[0][0]


def neumann_series(product, right):
    def body(p, _):
        return p - STEP * product(p) + right, None

    return STEP * jax.lax.scan(body, right, None, length=TERMS)[0]


HAND = {
    "reverse": lambda x, y, batch, steps: with_aux(
        functools.partial(descend, steps=steps)
    )(x, y, batch),
    "checkpointed": lambda x, y, batch, steps: with_aux(
        functools.partial(
            descend,
            steps=steps,
            wrap=functools.partial(jax.checkpoint, prevent_cse=False),
        )
    )(x, y, batch),
    "truncated": hand_truncated,
    "forward_gradient": hand_forward,
    "cg": hand_implicit(conjugate_gradient),
    "neumann": hand_implicit(neumann_series),
    "hessian_free": hand_implicit(lambda product, right: right),
}
