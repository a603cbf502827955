"""One estimator first, another one later."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Calls, Hypergradient, Info, State
from dbojax.hypergradients.common import check_state
from dbojax.hypergradients.inner import check_count


class TwoPhaseState(NamedTuple):
    """State of :func:`two_phase`."""

    done: jax.Array  # estimates so far, at most the length of the first phase; int32
    first: State
    second: State


def two_phase(first: Hypergradient, steps: int, second: Hypergradient) -> Hypergradient:
    r"""A cheap estimator for some estimates, then a better one.

    The bound on the outer steps of a forward gradient is linear in the loss at which
    it starts, so it pays to start it where a cheap biased estimator has led.

    Only x is the estimators' in common: the optimiser that uses them is the caller's.
    The paper starts a fresh one with a smaller step for the second phase, which is two
    loops, or an ``optax.join_schedules`` of steps with a boundary at ``steps``.

    Under ``vmap`` both are computed in each estimate, and one is chosen.

    Args:
        first: the estimator of the first phase, e.g. ``truncated(...)``.
        steps: its length, in estimates.
        second: the estimator of all later estimates.

    Returns:
        An estimator with the states of both. What only one of them reports in its
        ``info`` is infinite in the phase of the other.

    Raises:
        ValueError: if ``steps`` is not a whole number, at least one.
        TypeError: if an estimator is none.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> inner = dbo.hypergradients.descent(p, optax.sgd(0.5), 3)
        >>> last = dbo.hypergradients.truncated(p, inner, 1)
        >>> hyper = two_phase(last, 1, dbo.hypergradients.reverse(p, inner))
        >>> key, x, y = jax.random.key(0), jnp.array(2.0), jnp.array(0.0)
        >>> one, _, state, _ = hyper.estimate(key, x, y, hyper.init(x, y), None)
        >>> two, _, state, _ = hyper.estimate(key, x, y, state, None)
        >>> float(one), float(two)
        (0.375, 0.65625)

    References:
        Shen et al. (2024), arXiv:2406.14095, Section 3.2 and Figure 1.
    """
    for part, name in ((first, "first"), (second, "second")):
        trees.check_type(part, Hypergradient, name, "truncated(problem, inner, 1)")
    check_count(steps, "steps", "two_phase")

    def init(x, y):
        return TwoPhaseState(
            jnp.zeros((), jnp.int32), first.init(x, y), second.init(x, y)
        )

    def estimate(key, x, y, state, batch):
        check_state(state, init, x, y)

        def early(state):
            *found, own, info = first.estimate(key, x, y, state.first, batch)
            return *found, state._replace(first=own), info

        def late(state):
            *found, own, info = second.estimate(key, x, y, state.second, batch)
            return *found, state._replace(second=own), info

        infos = [jax.eval_shape(phase, state)[-1] for phase in (early, late)]
        phases = [_reporting(phase, infos) for phase in (early, late)]
        hypergrad, y, state, info = jax.lax.cond(state.done < steps, *phases, state)
        done = jnp.minimum(state.done + 1, steps)  # never overflows
        return hypergrad, y, state._replace(done=done), info

    counts = (dataclasses.astuple(part.calls) for part in (first, second))
    calls, guides = Calls(*map(max, *counts)), max(first.guides, second.guides)
    return Hypergradient(init, estimate, calls, guides)


def _reporting(phase, infos: list[Info]):
    """``phase`` with an info that has each field that one of ``infos`` has."""

    def complete(name, mine):
        held = [getattr(info, name) for info in infos]
        shapes = [shape for shape in held if shape is not None]
        if mine is not None or not shapes:
            return mine
        return jnp.full(shapes[0].shape, jnp.inf, shapes[0].dtype)

    def run(state):
        *found, info = phase(state)
        residual = complete("residual", info.residual)
        variance = complete("variance", info.variance)
        return *found, info._replace(residual=residual, variance=variance)

    return run
