"""What one client does in a round, on the part of the model that it holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Oracle, Problem, Tree, by_level
from dbojax.submodels import Kept, Level, mask, masked, take

Sample = Callable[[jax.Array, Tree], Tree]  # (key, one client's data) -> its batch


class Held(NamedTuple):
    """The three variables, or something of their shapes."""

    x: Tree
    y: Tree
    z: Tree


class Work(NamedTuple):
    """What every client does in a round."""

    problem: Problem
    oracle: Callable[[Problem], Oracle]
    steps: Held  # local step sizes
    units: dict[str, int]
    labels: Held
    batch_labels: Tree
    inner_steps: int
    project: Callable[[Tree], Tree]  # of z, at the client
    sample: Sample | None
    extracted: bool
    smaller: Callable[[Mapping[str, int]], Problem] | None
    keep: bool  # what is not trained stays at the server's values, for comparison


class Visit(NamedTuple):
    """What a client comes back with, on its own units alone."""

    moves: Held  # start minus end
    ends: Held
    upper: jax.Array  # f on the last batch


def visit(
    work: Work, level: Level, local_steps: int, key, kept: Kept, held: Held, data: Tree
) -> Visit:
    """Local steps of one client; ``held`` are the whole variables it starts from."""
    key_sample, key_oracle = jax.random.split(key)

    def cut(labels, tree):
        return take(labels, work.units, tree, kept)

    def restrict(labels, tree):
        # A smaller network has no units to mask; nor has a client that holds all.
        if work.extracted or not kept:
            return tree
        return masked(labels, work.units, kept, tree)

    def batch_of(step):
        drawn = data
        if work.sample is not None:
            drawn = work.sample(jax.random.fold_in(key_sample, step), data)
        if work.extracted and work.batch_labels is not None:
            drawn = cut(work.batch_labels, drawn)
        return drawn

    start = Held(*map(cut if work.extracted else restrict, work.labels, held))
    if work.keep:
        start = held
    problem = _own_problem(work, level, kept, start)
    oracle = work.oracle(problem)

    def descend(step, y):
        _, samples = by_level(batch_of(step))
        d_y = jax.grad(problem.lower, 1)(start.x, y, samples)
        return _moved(y, restrict(work.labels.y, d_y), work.steps.y)

    def take_step(carry, step):
        now, memory = carry
        batch = batch_of(work.inner_steps + step)
        own = jax.random.fold_in(key_oracle, step)
        directions, memory = oracle.directions(own, *now, memory, batch)
        directions = map(restrict, work.labels, directions)
        now = Held(*map(_moved, now, directions, work.steps))
        return (now._replace(z=work.project(now.z)), memory), None

    y = start.y
    if work.inner_steps:
        y = jax.lax.fori_loop(0, work.inner_steps, descend, y)
    _, memory = oracle.init(start.x, y)
    now = start._replace(y=y), memory
    if local_steps == 1:
        (now, _), _ = take_step(now, 0)
    else:
        (now, _), _ = jax.lax.scan(take_step, now, jnp.arange(local_steps))
    last, _ = by_level(batch_of(work.inner_steps + local_steps - 1))
    upper = problem.upper(now.x, now.y, last)
    if not work.extracted:
        start, now = (Held(*map(cut, work.labels, v)) for v in (start, now))
    moves = jax.tree.map(jnp.subtract, start, now)
    return Visit(moves, now, upper)


def _own_problem(work: Work, level, kept, start: Held) -> Problem:
    """The objectives of a client, which do not see what it does not hold."""
    if work.extracted:
        if work.smaller is None or not level.kept:
            return work.problem
        sizes = {name: level.kept.get(name, n) for name, n in work.units.items()}
        return work.smaller(sizes)

    def within(labels, v, otherwise):
        own = mask(labels, work.units, kept, v)
        return jax.tree.map(jnp.where, own, v, otherwise)

    def seen(objective):
        # Oracles may move y along vectors of their own, which reach beyond its part.
        def of_part(x, y, batch):
            x = within(work.labels.x, x, start.x)
            y = within(work.labels.y, y, start.y)
            return objective(x, y, batch)

        return of_part

    # With `keep` a client holds all of both variables, and trains a part of them.
    whole = work.keep or not kept
    return work.problem if whole else Problem(*map(seen, work.problem))


def _moved(v, direction, step):
    return jax.tree.map(lambda a, d: a - trees.times(step, d), v, direction)


def check_work(
    work: Work, levels: tuple[Level, ...], local_steps: list[int], held: Held, batch
):
    """Refuse objectives that do not take sub-models, before any is computed."""
    data = trees.one_node(batch)
    for level, count in zip(levels, local_steps, strict=True):
        kept = {
            name: jax.ShapeDtypeStruct((k,), jnp.int32)
            for name, k in level.kept.items()
        }
        run = functools.partial(visit, work, level, count)
        key = jax.eval_shape(lambda: jax.random.key(0))
        try:
            upper = jax.eval_shape(run, key, kept, held, data).upper
        except Exception as error:
            if not (work.extracted and level.kept):
                raise
            raise ValueError(
                f"The objectives do not take a sub-model of capacity {level.capacity:g}"
                f", which holds {level.kept} units: {error} Write objectives that read "
                "widths off their arguments, pass `smaller=` to build them for given "
                "widths, label the batch (`batch_units`), or write extracted=False."
            ) from error
        if upper.shape != ():
            raise ValueError(
                "`problem.upper(x, y, batch)` must return a scalar, e.g. with "
                f"`jnp.mean`; got shape {upper.shape}."
            )
