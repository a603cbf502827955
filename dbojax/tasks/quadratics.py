"""Heterogeneous quadratics whose every quantity is known in closed form."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Batch, Problem
from dbojax.tasks.task import ClosedForm, Task, at_mean

RIDGE = 0.1  # of the upper level in x


class Curvature(NamedTuple):
    """Lower-level data: one node's, or stacked with the node axis first."""

    a: jax.Array | np.ndarray  # (n, dy, dy), symmetric positive definite
    b: jax.Array | np.ndarray  # (n, dy, dx)
    c: jax.Array | np.ndarray  # (n, dy)


def _upper(x, y, batch):
    return 0.5 * jnp.sum((y - batch) ** 2) + 0.5 * RIDGE * jnp.sum(x**2)


def _lower(x, y, batch):
    return 0.5 * y @ (batch.a @ y) - y @ (batch.b @ x + batch.c)


def _draw(n, dx, dy, seed):
    """Data of all nodes in float64; the order of the draws is part of the task."""
    rng = np.random.default_rng(seed)
    nodes = []
    for _ in range(n):
        m = rng.normal(size=(dy, dx))
        a = m @ m.T / dx + 0.5 * np.eye(dy)
        b = rng.normal(size=(dy, dx)) / np.sqrt(dx)
        c, t = 3 * rng.normal(size=dy), 3 * rng.normal(size=dy)
        nodes.append((a, b, c, t))
    a, b, c, t = (np.stack(parts) for parts in zip(*nodes, strict=True))
    return Batch(upper=t, lower=Curvature(a, b, c))


def _closed_form(batch):
    """Solve in NumPy's float64, whatever precision JAX runs in."""
    lower = jax.tree.map(lambda leaf: np.mean(np.asarray(leaf, float), 0), batch.lower)
    targets = np.asarray(batch.upper, float)
    slope, start = np.linalg.solve(lower.a, lower.b), np.linalg.solve(lower.a, lower.c)
    hessian = RIDGE * np.eye(slope.shape[1]) + slope.T @ slope
    x_star = np.linalg.solve(hessian, slope.T @ (targets.mean(0) - start))
    slope, start, targets, x_star = map(jnp.asarray, (slope, start, targets, x_star))
    mean_target = jnp.mean(targets, 0)

    def solution(x):
        return slope @ x + start

    def value(x):
        return jnp.mean(jax.vmap(_upper, (None, None, 0))(x, solution(x), targets))

    def hypergradient(x):
        return RIDGE * x + slope.T @ (solution(x) - mean_target)

    return ClosedForm(solution, value, hypergradient, x_star)


def _no_samples(batch_size):
    raise ValueError(
        f"The quadratics have no samples to draw, so no batches of {batch_size}; pass "
        "`task.batch`, which is all there is, to every step."
    )


def _task(batch):
    n, dy, dx = batch.lower.b.shape
    exact = _closed_form(batch)
    batch = jax.tree.map(jnp.asarray, batch)

    def measure(x, y):
        del y
        return {"hypergrad_true": jnp.linalg.norm(exact.hypergradient(x))}

    return Task(
        Problem(_upper, _lower),
        x0=jnp.zeros(dx),
        y0=jnp.zeros(dy),
        batch=batch,
        sampler=_no_samples,
        evaluate=at_mean(measure),
        n=n,
        exact=exact,
    )


def quadratic(n: int = 10, dx: int = 20, dy: int = 60, seed: int = 0) -> Task:
    r"""Quadratics that differ from node to node in curvature, slope and target.

    .. math::
        g_i(x, y) = \tfrac12 y^\top A_i y - y^\top (B_i x + c_i), \quad
        f_i(x, y) = \tfrac12 \|y - t_i\|^2 + 0.05 \|x\|^2

    so that, with bars for means over the nodes,
    :math:`y^*(x) = \bar A^{-1} (\bar B x + \bar c)` and
    :math:`\nabla \Psi(x) = 0.1 x + \bar B^\top \bar A^{-1} (y^*(x) - \bar t)`.

    Args:
        n: nodes.
        dx: length of x.
        dy: length of y.
        seed: of NumPy's default generator, so the data are the same everywhere.

    Returns:
        A task whose ``batch`` is ``Batch(upper=t, lower=Curvature(a, b, c))``, whose
        ``exact`` holds the closed forms, and whose ``evaluate`` gives
        ``hypergrad_true``, the norm of the true hypergradient at the mean of x.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> task = quadratic(n=4, dx=3, dy=5)
        >>> slope = jax.grad(task.exact.value)(task.exact.x_star)
        >>> bool(jnp.linalg.norm(slope) < 1e-10)
        True

    References:
        The defaults are the toy on which this project fixes its golden values.
    """
    if min(n, dx, dy) < 1:
        raise ValueError(
            f"`quadratic` needs at least one node and one entry in x and y; got n={n}, "
            f"dx={dx}, dy={dy}."
        )
    return _task(_draw(n, dx, dy, seed))


def worker_quadratic(
    n: int = 8, d: int = 20, heterogeneity: float = 1.0, seed: int = 0
) -> Task:
    r"""Quadratics around moving targets, as different from worker to worker as asked.

    .. math::
        g_i = \tfrac12 (y - B_i x - b_i)^\top A_i (y - B_i x - b_i), \quad
        f_i = \tfrac12 \|y - c_i\|^2 + 0.05 \|x\|^2

    with :math:`A_i = I + 0.3 h M_i M_i^\top`, :math:`B_i = I / 2 + 0.2 h N_i`,
    :math:`b_i = h v_i`, :math:`c_i = 1 + h v'_i`, entries of M and N of variance 1/d
    and those of v and v' of variance 1. With h = 0 all workers are alike.

    Args:
        n: workers.
        d: length of x and of y.
        heterogeneity: h.
        seed: of NumPy's default generator.

    Returns:
        A task of the form of :func:`quadratic`, ``Curvature(A, A B, A b)`` being its
        lower data; terms of g in x alone are left out.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> task = worker_quadratic(heterogeneity=0.0)
        >>> round(float(jnp.linalg.norm(task.exact.hypergradient(task.x0))), 4)
        2.2361

    References:
        The toy on which this project fixes golden values of the server methods.
    """
    if min(n, d) < 1:
        raise ValueError(
            f"`worker_quadratic` needs at least one worker and one entry; got n={n}, "
            f"d={d}."
        )
    rng, workers = np.random.default_rng(seed), []
    for _ in range(n):
        m, slope = (rng.normal(size=(d, d)) / np.sqrt(d) for _ in range(2))
        start, target = (heterogeneity * rng.normal(size=d) for _ in range(2))
        a = np.eye(d) + 0.3 * heterogeneity * m @ m.T
        b = 0.5 * np.eye(d) + 0.2 * heterogeneity * slope
        workers.append((a, a @ b, a @ start, 1 + target))
    a, b, c, t = (np.stack(parts) for parts in zip(*workers, strict=True))
    return _task(Batch(upper=t, lower=Curvature(a, b, c)))


def with_equal_curvature(task: Task) -> Task:
    r"""Give every node the mean curvature, :math:`A_i = \bar A`, :math:`B_i = \bar B`.

    Methods that invert each node's own Hessian are biased on different curvatures and
    exact on equal ones; the solution and the hypergradient do not change.

    Args:
        task: made by :func:`quadratic`.

    Returns:
        The task with averaged ``a`` and ``b``; ``c`` and the targets stay.

    Examples:
        >>> task = quadratic(n=4, dx=3, dy=5)
        >>> equal = with_equal_curvature(task)
        >>> bool(jnp.allclose(equal.exact.x_star, task.exact.x_star))
        True
    """
    lower = task.batch.lower

    def averaged(leaf):
        return jnp.broadcast_to(jnp.mean(leaf, 0, keepdims=True), leaf.shape)

    equal = lower._replace(a=averaged(lower.a), b=averaged(lower.b))
    return _task(task.batch._replace(lower=equal))
