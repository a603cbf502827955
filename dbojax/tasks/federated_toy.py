"""A small federated problem whose true hypergradient is known to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Batch, Problem
from dbojax.tasks.task import Task, at_mean

SOFTPLUS, BUMP, START = 0.1, 0.1, 0.5
# From the minimiser of the quadratic part; the softplus bends the Hessian by at most
# 0.025 against an identity of at least 0.5, so that four steps reach rounding.
NEWTON_STEPS = 6


class Regression(NamedTuple):
    """Lower-level data: one client's, or stacked with the client axis first."""

    h: jax.Array | np.ndarray  # (n, dy, dy), symmetric positive definite
    a: jax.Array | np.ndarray  # (n, dy, dx)
    b: jax.Array | np.ndarray  # (n, dy)


class Solved(NamedTuple):
    """What Newton's method and dense solves tell of the toy, to rounding."""

    solution: Callable[[jax.Array], jax.Array]  # x -> y*(x), (dy,), or (n, dy)
    value: Callable[[jax.Array], jax.Array]  # x -> F(x)
    hypergradient: Callable[[jax.Array], jax.Array]  # x -> grad F(x), (dx,)


def _upper(x, y, batch):
    return BUMP * jnp.sum(x**2 / (1 + x**2)) + jnp.sum(jnp.sqrt(1 + (y - batch) ** 2))


def _lower(x, y, batch):
    rest = y - batch.a @ jnp.tanh(x) - batch.b
    return 0.5 * rest @ (batch.h @ rest) + SOFTPLUS * jnp.sum(jax.nn.softplus(y))


_PROBLEM = Problem(_upper, _lower)


def solve_federated_toy(batch: Batch, personal: bool = False) -> Solved:
    r"""Solve the toy of :func:`federated_toy` to rounding.

    .. math::
        F(x) = \tfrac1n \textstyle\sum_i f_i(x, y^*(x)), \quad
        y^*(x) = \arg\min_y \tfrac1n \textstyle\sum_i g_i(x, y)

    by Newton's method and a dense solve; with ``personal`` each client has a solution
    :math:`y_i^*(x) = \arg\min_y g_i(x, y)` of its own.

    Args:
        batch: all data, the toy's ``task.batch``.
        personal: each client solves its own lower problem.

    Returns:
        The solution, the value and the hypergradient, as functions of x.

    Examples:
        >>> task = federated_toy(n=3, dx=4, dy=2)
        >>> exact = solve_federated_toy(task.batch)
        >>> slope = jax.jit(jax.grad(exact.value))(task.x0)  # through Newton's steps
        >>> found = jax.jit(exact.hypergradient)(task.x0)
        >>> bool(jnp.allclose(slope, found, atol=1e-5))
        True
    """
    if personal:
        return _every(batch)
    h = jnp.mean(batch.lower.h, 0)

    def upper(x, y):
        return jnp.mean(jax.vmap(_upper, (None, None, 0))(x, y, batch.upper))

    def gradient(x, y):
        slopes = jax.vmap(jax.grad(_lower, 1), (None, None, 0))(x, y, batch.lower)
        return jnp.mean(slopes, 0)

    def solution(x):
        start = jnp.linalg.solve(h, -gradient(x, jnp.zeros(h.shape[:1], h.dtype)))

        def newton(_, y):
            return y - jnp.linalg.solve(_curvature(h, y), gradient(x, y))

        return jax.lax.fori_loop(0, NEWTON_STEPS, newton, start)

    def hypergradient(x):
        y = solution(x)
        upper_x, upper_y = jax.grad(upper, (0, 1))(x, y)
        z = jnp.linalg.solve(_curvature(h, y), upper_y)
        return upper_x - jax.vjp(lambda x: gradient(x, y), x)[1](z)[0]

    return Solved(solution, lambda x: upper(x, solution(x)), hypergradient)


def _curvature(h, y):
    """Hessian of the lower level in y, whatever x."""
    slope = jax.nn.sigmoid(y)
    return h + SOFTPLUS * jnp.diag(slope * (1 - slope))


def _every(batch):
    """Each client by itself; means of values and hypergradients."""

    def one(name):
        def at(x):
            def client(data):
                alone = jax.tree.map(lambda leaf: leaf[None], data)
                return getattr(solve_federated_toy(alone), name)(x)

            return jax.vmap(client)(batch)

        return at

    value, hypergradient = one("value"), one("hypergradient")
    return Solved(
        one("solution"),
        lambda x: jnp.mean(value(x)),
        lambda x: jnp.mean(hypergradient(x), 0),
    )


def _draw(n, dx, dy, identical, seed):
    """Data of all clients in float64; the order of the draws is part of the task."""
    rng, clients = np.random.default_rng(seed), []
    for _ in range(1 if identical else n):
        m = rng.normal(size=(dy, dy)) / np.sqrt(dy)
        h = 0.5 * np.eye(dy) + 0.5 * m @ m.T
        a = rng.normal(size=(dy, dx)) / np.sqrt(dx)
        b, t = rng.normal(size=dy), rng.normal(size=dy)
        clients.append((h, a, b, t))
    start = START * rng.normal(size=dx)
    h, a, b, t = (np.stack(parts) for parts in zip(*clients, strict=True))
    batch = Batch(upper=t, lower=Regression(h, a, b))
    if identical:
        batch = jax.tree.map(lambda leaf: np.repeat(leaf, n, 0), batch)
    return batch, start


def federated_toy(
    n: int = 12, dx: int = 24, dy: int = 18, identical: bool = False, seed: int = 0
) -> Task:
    r"""Regressions on a squashed x that differ from client to client.

    .. math::
        g_i(x, y) &= \tfrac12 \|y - A_i \tanh x - b_i\|^2_{H_i}
            + 0.1 \textstyle\sum_k \log(1 + e^{y_k}), \\
        f_i(x, y) &= 0.1 \textstyle\sum_j \frac{x_j^2}{1 + x_j^2}
            + \textstyle\sum_k \sqrt{1 + (y_k - t_{ik})^2}

    with :math:`H_i = \tfrac12 (I + M_i M_i^\top)`, entries of :math:`M_i` of variance
    1/dy, those of :math:`A_i` of variance 1/dx and those of :math:`b_i` and
    :math:`t_i` of variance 1. The upper level is smooth, not convex in x, and its
    gradient in y is bounded by :math:`\sqrt{d_y}`; the lower level is strongly convex
    with :math:`\mu \ge \tfrac12`.

    Args:
        n: clients.
        dx: length of x.
        dy: length of y.
        identical: every client has the data of the first.
        seed: of NumPy's default generator, so the data are the same everywhere.

    Returns:
        A task whose ``batch`` is ``Batch(upper=t, lower=Regression(h, a, b))`` and
        whose ``evaluate`` gives the norm of the true hypergradient at the mean of x:
        ``hypergrad_true`` with one lower solution for all clients, and
        ``hypergrad_personal`` with one for each. The functions themselves come from
        :func:`solve_federated_toy`. For sub-models its layout is
        ``dbo.submodels.coordinates(task.x0, task.y0)``.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> from types import SimpleNamespace
        >>> task = federated_toy(identical=True)
        >>> at_start = SimpleNamespace(x=task.x0[None], y=task.y0[None])
        >>> found = task.evaluate(at_start)  # one solution is that of all
        >>> one, each = found["hypergrad_true"], found["hypergrad_personal"]
        >>> bool(abs(one - each) < 1e-4)
        True

    References:
        Our formulation of a test problem for federated bilevel methods with sub-models
        (arXiv:2512.24667); that paper does not name it.
    """
    if min(n, dx, dy) < 1:
        raise ValueError(
            f"`federated_toy` needs at least one client and one entry in x and y; got "
            f"n={n}, dx={dx}, dy={dy}."
        )
    batch, start = _draw(n, dx, dy, identical, seed)
    batch = jax.tree.map(jnp.asarray, batch)
    shared, personal = (
        solve_federated_toy(batch),
        solve_federated_toy(batch, personal=True),
    )

    def measure(x, y):
        del y
        return {
            "hypergrad_true": jnp.linalg.norm(shared.hypergradient(x)),
            "hypergrad_personal": jnp.linalg.norm(personal.hypergradient(x)),
        }

    return Task(
        _PROBLEM,
        x0=jnp.asarray(start),
        y0=jnp.zeros(dy),
        batch=batch,
        sampler=_no_samples,
        evaluate=at_mean(measure),
        n=n,
    )


def _no_samples(batch_size):
    raise ValueError(
        f"The toy has no samples to draw, so no batches of {batch_size}; pass "
        "`task.batch`, which is all there is, to every step, or add noise with "
        "`dbo.tasks.with_gradient_noise`."
    )
