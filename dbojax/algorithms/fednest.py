"""FedNest: a lower loop, a series for the linear system and an upper loop, in turn."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import submodels, trees
from dbojax.algorithms.federated import federated
from dbojax.algorithms.meetings import ask, mean_loss, meeting, trips
from dbojax.algorithms.visits import Sample
from dbojax.base import (
    Algorithm,
    Calls,
    Consensus,
    Coverage,
    Metrics,
    Problem,
    Traffic,
    Tree,
    by_level,
)
from dbojax.oracles import soba
from dbojax.submodels import Fleet


class Loops(NamedTuple):
    """How often a round asks its clients, and how far they go by themselves."""

    inner_rounds: int
    inner_steps: int
    terms: int
    outer_steps: int


def fednest(
    problem: Problem,
    fleet: Fleet,
    *,
    upper_step: float | jax.Array,
    lower_step: float | jax.Array,
    linear_step: float | jax.Array | None = None,
    inner_rounds: int = 1,
    inner_steps: int = 1,
    terms: int = 5,
    outer_steps: int = 1,
    reduced: bool = True,
    sample: Sample | None = None,
    extracted: bool = True,
) -> Algorithm:
    r"""Solve for y, then for z by a Neumann series, then move x; each over the network.

    With bars for means over the clients that take part, a step is

    .. math::
        y_i &\leftarrow y_i - \beta\,(\nabla_y g_i(x, y_i) - \nabla_y g_i(x, y)
            + \overline{\nabla_y g}(x, y)), \quad y \leftarrow \bar y_i, \\
        z &= \eta \textstyle\sum_{k=0}^N c_k, \quad c_0 = \overline{\nabla_y f}, \quad
            c_{k+1} = c_k - \eta\, \overline{\nabla^2_{yy} g\, c_k}, \\
        x_i &\leftarrow x_i - \alpha\,(\nabla_x f_i(x_i, y) - \nabla_x f_i(x, y)
            + \bar h), \quad h_i = \nabla_x f_i - \nabla^2_{xy} g_i\, z, \quad
            x \leftarrow \bar x_i.

    Args:
        problem: objectives of one client.
        fleet: the clients. One draw serves the whole step. Clients with sub-models
            answer on their own units and entries are averaged over who holds them, so
            the series solves a system weighted by coverage.
        upper_step: alpha.
        lower_step: beta.
        linear_step: eta, at most one over the largest curvature of g; by default as
            ``lower_step``.
        inner_rounds: means of y in a row.
        inner_steps: local steps of y before each mean.
        terms: N, Hessian products of the series.
        outer_steps: local steps of x.
        reduced: with the mean gradient, as above, so that local steps of y do not
            drift (SVRG). False descends on each client's own g (SGD), which saves a
            round of communication per mean.
        sample: ``(key, one client's data) -> batch``, drawn anew for each local step;
            mean gradients, the series and h see all of a client's data.
        extracted: as for :func:`dbo.algorithms.federated`.

    Returns:
        An algorithm with the state of :func:`dbo.algorithms.federated`. A step goes
        up and down ``inner_rounds`` times (twice that if ``reduced``), N + 1 times for
        the series and twice for x.

    Raises:
        ValueError: if a number of steps is impossible, or as
            :func:`dbo.algorithms.federated`.
        TypeError: if a part is of another kind.

    Examples:
        >>> task = dbo.tasks.federated_toy(n=3, dx=4, dy=2)
        >>> units = dbo.submodels.coordinates(task.x0, task.y0)
        >>> full = dbo.submodels.fleet(units, [1.0] * 3)
        >>> method = fednest(
        ...     task.problem, full, upper_step=0.1, lower_step=0.3, terms=7
        ... )
        >>> state = method.init(task.x0[None], task.y0[None])
        >>> _, metrics = jax.jit(method.step)(jax.random.key(0), state, task.batch)
        >>> metrics.traffic.rounds == 2 * (2 + (7 + 1) + 2)  # each up and down
        True

    References:
        Tarzanagh, Li, Thrampoulidis and Oymak (2022), arXiv:2205.02215. As in the
        authors' code the series is summed, not stopped at a random term; unlike there
        every term is averaged over the clients, and all phases have the same clients.
    """
    linear_step = lower_step if linear_step is None else linear_step
    loops = _checked(Loops(inner_rounds, inner_steps, terms, outer_steps))
    # The start, the checks and the draws are those of the single-loop methods.
    core = federated(
        problem,
        soba,
        fleet,
        upper_step=upper_step,
        lower_step=lower_step,
        extracted=extracted,
    )
    phases = _phases(
        problem, loops, reduced, sample, upper_step, lower_step, linear_step
    )

    def step(key, state, batch):
        jax.eval_shape(core.step, key, state, batch)
        x, y = (jax.tree.map(lambda a: a[0], v) for v in (state.x, state.y))
        here = meeting(fleet, extracted, key, state.round, x, y, batch)
        y = phases.lower(here, x, y)
        z = phases.series(here, x, y)
        h, x, upper = phases.upper(here, x, y, z)
        rows = jax.tree.map(lambda a: a[None], {"x": x, "y": y, "z": z})
        state = state._replace(**rows, round=state.round + 1)
        least = [submodels.smallest(side.holders) for side in (here.x, here.y)]
        zero = jnp.zeros(())
        metrics = Metrics(
            upper,
            trees.norm(h),
            Consensus(zero, zero, zero),
            _traffic(fleet, loops, reduced, x, y),
            _calls(loops, reduced),
            Coverage(*least),
        )
        return state, metrics

    return Algorithm(core.init, step)


class Phases(NamedTuple):
    """The three parts of a step."""

    lower: Callable[..., Tree]  # (meeting, x, y) -> y
    series: Callable[..., Tree]  # (meeting, x, y) -> z
    upper: Callable[..., tuple[Tree, Tree, jax.Array]]  # -> h, x, mean of f there


def _phases(problem, loops, reduced, sample, upper_step, lower_step, linear_step):
    upper_x, lower_y = jax.grad(problem.upper), jax.grad(problem.lower, 1)

    def drawn(client, step):
        if sample is None:
            return by_level(client.data)
        return by_level(sample(jax.random.fold_in(client.key, step), client.data))

    def lower(here, x, y):
        def slope(client, xs, ys):
            return lower_y(*xs, *ys, by_level(client.data)[1])

        def descend(turn, client, xs, ys):
            (x,), (start, mean) = xs, ys

            def one(step, y):
                _, at = drawn(client, turn * loops.inner_steps + step)
                direction = lower_y(x, y, at)
                if reduced:
                    direction = _corrected(direction, mean, lower_y(x, start, at))
                return _descended(y, lower_step, client.within_y(direction))

            return jax.lax.fori_loop(0, loops.inner_steps, one, start)

        def average(turn, y):
            mean = ask(here, here.y, slope, (x,), (y,)) if reduced else y
            own = functools.partial(descend, turn)
            return ask(here, here.y, own, (x,), (y, mean), otherwise=y)

        return jax.lax.fori_loop(0, loops.inner_rounds, average, y)

    def series(here, x, y):
        def first(client, xs, ys):
            return jax.grad(problem.upper, 1)(*xs, *ys, by_level(client.data)[0])

        def product(client, xs, ys):
            (x,), (y, term), (_, at) = xs, ys, by_level(client.data)
            return jax.jvp(lambda y: lower_y(x, y, at), (y,), (term,))[1]

        def one(_, carry):
            term, total = carry
            bent = ask(here, here.y, product, (x,), (y, term))
            term = _descended(term, linear_step, bent)
            return term, jax.tree.map(jnp.add, total, term)

        term = ask(here, here.y, first, (x,), (y,))
        _, total = jax.lax.fori_loop(0, loops.terms, one, (term, term))
        return jax.tree.map(functools.partial(trees.times, linear_step), total)

    def upper(here, x, y, z):
        def hypergradient(client, xs, ys):
            (x,), (y, z), (above, below) = xs, ys, by_level(client.data)
            (cross,) = jax.vjp(lambda x: lower_y(x, y, below), x)[1](z)
            return jax.tree.map(jnp.subtract, upper_x(x, y, above), cross)

        def descend(client, xs, ys):
            (start, h), (y,) = xs, ys

            def one(step, x):
                # Steps of y count from zero up: these draw from the other side.
                at, _ = drawn(client, -1 - step)
                own = upper_x(start, y, at)
                direction = _corrected(upper_x(x, y, at), h, own)
                return _descended(x, upper_step, client.within_x(direction))

            return jax.lax.fori_loop(0, loops.outer_steps, one, start)

        h = ask(here, here.x, hypergradient, (x,), (y, z))
        x = ask(here, here.x, descend, (x, h), (y,), otherwise=x)
        return h, x, mean_loss(here, problem, x, y)

    return Phases(lower, series, upper)


def _corrected(direction, mean, own):
    return jax.tree.map(lambda d, m, o: d + (m - o), direction, mean, own)


def _descended(v, step, direction):
    return jax.tree.map(lambda a, d: a - trees.times(step, d), v, direction)


def _traffic(fleet, loops, reduced, x, y) -> Traffic:
    """Each message once; what a client has already is not sent again."""

    def sent(down, up, times=1):
        one = trips(fleet, x, y, down, up)
        return dataclasses.replace(one, rounds=2) * times

    total = sent((1, 1), (0, 1))  # x and y down, a slope or y up
    if reduced:
        total += sent((0, 1), (0, 1)) * (2 * loops.inner_rounds - 1)
    else:
        total += sent((0, 1), (0, 1)) * (loops.inner_rounds - 1)
    total += sent((0, 1), (0, 1)) * (loops.terms + 1)  # y or a term down, products up
    total += sent((0, 1), (1, 0))  # z down, the hypergradient up
    return total + sent((1, 0), (1, 0))  # its mean down, x up


def _calls(loops, reduced) -> Calls:
    """Of one client."""
    slopes = loops.inner_steps * (2 if reduced else 1) + (1 if reduced else 0)
    gradients = loops.inner_rounds * slopes + 2 + 2 * loops.outer_steps
    return Calls(gradients=gradients, products=loops.terms + 1)


def _checked(loops: Loops) -> Loops:
    for name, count in loops._asdict().items():
        least = 0 if name == "terms" else 1
        if not isinstance(count, numbers.Integral) or count < least:
            raise ValueError(
                f"`{name}` is a whole number, at least {least}; got {count!r}."
            )
    return loops
