"""Exact and truncated derivatives of an unrolled inner solver."""
# ruff: noqa: D417 - what means the same in all of them is described once, in `reverse`.

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Calls, Hypergradient, Problem, State, Tree
from dbojax.hypergradients.common import cost, finish, no_state, prepare
from dbojax.hypergradients.inner import (
    Inner,
    Solver,
    check_count,
    num_steps,
    objective,
    run,
    schedule,
    solve_calls,
    stepper,
    upper_batch,
)
from dbojax.hypergradients.tangents import sweep

# (key, state, x, batch) -> state after all steps
Unroll = Callable[[jax.Array, State, Tree, Tree], State]

# Inside a scan nothing can be merged with what a checkpoint computes again, so the
# barrier that hinders merging is left out.
_remat = functools.partial(jax.checkpoint, prevent_cse=False)


def reverse(problem: Problem, inner: Inner) -> Hypergradient:
    r"""Exact gradient of the unrolled solver, by reverse mode.

    .. math:: \nabla h(x), \quad h(x) = f(x, y_T(x))

    Memory grows with T; :func:`checkpointed` keeps less and is no slower.

    Args:
        problem: objectives of one node.
        inner: unrolled solver; its steps must be differentiable in reverse, which a
            ``while_loop`` is not.

    Returns:
        An estimator without state.

    Raises:
        ValueError: from ``estimate``, if the variables are not floating point, the
            upper objective is not a scalar, ``Rounds`` are too few, or what the inner
            solver starts from and returns is not like y.
        TypeError: if a part is of another kind.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> hyper = reverse(p, dbo.hypergradients.descent(p, optax.sgd(0.5), 3))
        >>> x, y = jnp.array(2.0), jnp.array(0.0)
        >>> g, y, _, _ = hyper.estimate(jax.random.key(0), x, y, (), None)
        >>> float(g), float(y)
        (0.65625, 1.75)

    References:
        Domke (2012); Maclaurin, Duvenaud and Adams (2015), arXiv:1502.03492.
    """
    return _reverse(problem, inner, lambda *args: run(inner, *args))


def checkpointed(problem: Problem, inner: Inner) -> Hypergradient:
    """Exact gradient of the unrolled solver; each step is computed twice.

    What reverse mode needs of the inside of a step is computed again, so that only
    the T states are kept. The same numbers as :func:`reverse`, with less memory and, as
    less is written, in no more time.

    Args:
        problem, inner: as for :func:`reverse`.

    Returns:
        An estimator without state.

    References:
        Griewank and Walther (2000), with one level of checkpoints.
    """

    def unroll(key, state, x, batch):
        body = _remat(stepper(inner, key, x, batch))
        return jax.lax.scan(body, state, schedule(batch, 0, inner.steps))[0]

    return _reverse(problem, inner, unroll, passes=2)


def nested(
    problem: Problem, inner: Inner, segments: int | None = None
) -> Hypergradient:
    r"""Exact gradient of the unrolled solver with :math:`O(\sqrt T)` states in memory.

    The T steps form segments of equal length; only the states at their ends are kept,
    those inside are computed again, and so is the inside of each step.

    Args:
        problem, inner: as for :func:`reverse`.
        segments: how many; by default the divisor of T next to its root. A T without
            divisors near its root (a prime) splits badly.

    Returns:
        An estimator without state.

    Raises:
        ValueError: if ``segments`` does not divide the number of steps.
        TypeError: if a part is of another kind.

    References:
        Griewank and Walther (2000), with two levels of checkpoints.
    """
    trees.check_type(inner, Inner, "inner", "dbo.hypergradients.descent(...)")
    if segments is None:
        segments = _root_divisor(inner.steps)
    check_count(segments, "segments", "nested")
    if inner.steps % segments:
        raise ValueError(
            f"`segments` must divide the {inner.steps} inner steps into equal parts, "
            f"got {segments}. Write {_root_divisor(inner.steps)}."
        )

    def unroll(key, state, x, batch):
        step = _remat(stepper(inner, key, x, batch))
        xs = jax.tree.map(
            lambda a: a.reshape(segments, -1, *a.shape[1:]),
            schedule(batch, 0, inner.steps),
        )
        segment = _remat(lambda state, part: jax.lax.scan(step, state, part))
        return jax.lax.scan(segment, state, xs)[0]

    return _reverse(problem, inner, unroll, passes=3)


def truncated(problem: Problem, inner: Inner, last: int) -> Hypergradient:
    r"""Reverse mode through the last steps of the solver alone; biased.

    .. math::
        \nabla_x f + \sum_{t=T-s+1}^T \nabla_y f\, A_T \cdots A_{t+1} B_t,
        \quad A_t = \partial_y \Omega_t, \; B_t = \partial_x \Omega_t

    Args:
        problem, inner: as for :func:`reverse`.
        last: s, from 1 to T. Even with all T steps, what the start owes to x is left
            out.

    Returns:
        An estimator without state, whose memory grows with s instead of T.

    Raises:
        ValueError: if ``last`` is not a whole number from 1 to the number of steps;
            from ``estimate``, as :func:`reverse`.
        TypeError: if a part is of another kind.

    References:
        Shaban, Cheng, Hatch and Boots (2019), arXiv:1810.10667.
    """
    trees.check_type(inner, Inner, "inner", "dbo.hypergradients.descent(...)")
    check_count(last, "last", "truncated")
    if last > inner.steps:
        raise ValueError(
            f"`truncated` goes back through at most all {inner.steps} steps, got "
            f"last={last}."
        )
    early = inner.steps - last

    def unroll(key, state, x, batch):
        still = jax.lax.stop_gradient(x)
        state = run(inner, key, state, still, batch, last=early)
        return run(inner, key, jax.lax.stop_gradient(state), x, batch, first=early)

    return _reverse(problem, inner, unroll, back=last, through_start=False)


def forward(problem: Problem, inner: Inner | Solver, chunk: int = 8) -> Hypergradient:
    r"""Exact gradient of the unrolled solver, by forward mode along every entry of x.

    .. math:: Z_t = A_t Z_{t-1} + B_t, \quad \nabla h = \nabla_y f\, Z_T + \nabla_x f

    Memory does not depend on T; time grows with the N entries of x.

    Args:
        problem: objectives of one node.
        inner: steps, or a function ``(key, x, y, batch) -> y`` that forward mode can
            pass through, ``while_loop`` included.
        chunk: entries at a time; each chunk runs the solver anew.

    Returns:
        An estimator without state. ``calls`` are those of one run of the solver, as
        what hangs on the size of x is not known before; ``info.cost`` tells all.

    Raises:
        ValueError: if ``chunk`` is not a whole number, at least one; from
            ``estimate``, as :func:`reverse`.
        TypeError: if a part is of another kind.

    References:
        Franceschi, Donini, Frasconi and Pontil (2017), arXiv:1703.01785.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    check_count(chunk, "chunk", "forward")
    h = objective(problem, inner)

    def estimate(key, x, y, state, batch):
        x, start = prepare(problem, x, y, batch, inner)
        flat = trees.ravel(x)

        def basis(entries):  # numbers beyond the last entry give zeros
            return (entries[:, None] == jnp.arange(flat.size)[None]).astype(flat.dtype)

        width = min(chunk, flat.size)
        count = -(-flat.size // width) * width
        swept = sweep(lambda x: h(key, x, start, batch), x, basis, count, width)
        calls = solve_calls(inner) * (count // width)
        calls = calls + Calls(tangents=flat.size * num_steps(inner))
        hypergrad, y, info = finish(
            trees.unravel(swept.total, x), swept.aux, start, swept.value, cost(calls)
        )
        return hypergrad, y, state, info

    return Hypergradient(no_state, estimate, solve_calls(inner))


def _root_divisor(steps: int) -> int:
    """The divisor of a number that is next to its root."""
    divisors = (d for d in range(1, steps + 1) if steps % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d * d / steps)))


def _reverse(problem, inner, unroll: Unroll, passes=1, back=None, through_start=True):
    """Reverse mode through one way to unroll.

    Args:
        problem: objectives of one node.
        inner: the solver.
        unroll: takes its steps.
        passes: how often each of the differentiated steps is computed.
        back: how many steps are differentiated, by default all.
        through_start: whether the start may depend on x.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_type(inner, Inner, "inner", "dbo.hypergradients.descent(...)")
    back = inner.steps if back is None else back
    again = inner.calls * (back * (passes - 1))
    # One pull-back through a step meets both blocks of second derivatives.
    calls = solve_calls(inner) + again + Calls(gradients=2, products=2 * back)

    def estimate(key, x, y, state, batch):
        x, start = prepare(problem, x, y, batch, inner)
        key_start, key_steps = jax.random.split(key)

        def h(x):
            origin = x if through_start else jax.lax.stop_gradient(x)
            inner_state = unroll(
                key_steps, inner.start(key_start, origin, start), x, batch
            )
            y = inner.read(inner_state)
            return problem.upper(x, y, upper_batch(batch)), y

        (value, y), hypergrad = jax.value_and_grad(h, has_aux=True)(x)
        hypergrad, y, info = finish(hypergrad, y, start, value, cost(calls))
        return hypergrad, y, state, info

    return Hypergradient(no_state, estimate, calls)
