"""Gradients with noise of known size, for tests of rates."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Batch, Problem, Tree, by_level
from dbojax.tasks.task import Task


class Noisy(NamedTuple):
    """One level's data, and linear terms that tilt its gradients."""

    data: Tree
    x: Tree  # as x, or ()
    y: Tree  # as y


def with_gradient_noise(task: Task, sigma: float) -> Task:
    r"""Add independent Gaussian noise to every gradient.

    .. math::
        F = f + \langle \xi_x, x \rangle + \langle \xi_y, y \rangle, \quad
        G = g + \langle \xi, y \rangle, \qquad \xi \sim N(0, \sigma^2 / b)

    so that each entry of the directions of x, y and z gets noise of standard deviation
    :math:`\sigma / \sqrt b`, b being the batch size.

    Args:
        task: any.
        sigma: standard deviation of one sample.

    Returns:
        The task with ``batch`` free of noise and ``sampler(b)`` with noise.

    Raises:
        ValueError: if ``sigma`` is negative.

    Examples:
        >>> task = with_gradient_noise(dbo.tasks.quadratic(n=2, dx=3, dy=4), 2.0)
        >>> draw = task.sampler(4)(jax.random.key(0), 0)
        >>> draw.upper.x.shape, draw.lower.y.shape
        ((2, 3), (2, 4))
    """
    if isinstance(sigma, int | float) and sigma < 0:
        raise ValueError(f"A standard deviation is not negative, got sigma={sigma}.")
    upper_data, lower_data = by_level(task.batch)
    shapes = tuple(trees.replicate(v, task.n) for v in (task.x0, task.y0))
    still_x, still_y = jax.tree.map(jnp.zeros_like, shapes)

    def tilted(objective):
        def tilted_objective(x, y, batch):
            tilt = _dot(batch.y, y)
            if jax.tree.leaves(batch.x):
                tilt += _dot(batch.x, x)
            return objective(x, y, batch.data) + tilt

        return tilted_objective

    def sampler(batch_size):
        def draw(key, step):
            keys = jax.random.split(jax.random.fold_in(key, step), 3)
            scale = sigma / batch_size**0.5
            x, upper_y, y = (
                _normal(k, like, scale)
                for k, like in zip(keys, (still_x, still_y, still_y), strict=True)
            )
            return Batch(Noisy(upper_data, x, upper_y), Noisy(lower_data, (), y))

        return draw

    return task._replace(
        problem=Problem(tilted(task.problem.upper), tilted(task.problem.lower)),
        batch=Batch(
            Noisy(upper_data, still_x, still_y), Noisy(lower_data, (), still_y)
        ),
        sampler=sampler,
    )


def _dot(a, b):
    return sum(
        jnp.vdot(u, v) for u, v in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def _normal(key, like, scale):
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        scale * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)
