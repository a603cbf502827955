"""Several questions in a row to the same clients, answered on what each one holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import submodels
from dbojax.algorithms.uplinks import part_bytes, summed
from dbojax.base import Problem, Traffic, Tree, by_level
from dbojax.submodels import Drawn, Fleet


class Side(NamedTuple):
    """How one of x and y is shared out in a round."""

    labels: Tree
    holders: Tree  # how many clients hold each entry
    like: Tree  # the whole variable


class Meeting(NamedTuple):
    """The clients of one round."""

    x: Side
    y: Side
    units: dict[str, int]
    batch_labels: Tree
    extracted: bool  # clients cut out smaller variables; False: zeros at full width
    drawn: tuple[Drawn, ...]
    keys: tuple[jax.Array, ...]  # one per client, (s,) per level
    rows: tuple[Tree, ...]  # the clients' data


class Client(NamedTuple):
    """One client, as a question sees it."""

    key: jax.Array
    data: Tree
    # Zero in a tree like x, or like y, whatever the client does not hold.
    within_x: Callable[[Tree], Tree]
    within_y: Callable[[Tree], Tree]


def meeting(
    fleet: Fleet, extracted: bool, key, turn, x: Tree, y: Tree, batch: Tree
) -> Meeting:
    """Draw the clients of a round, and what each one holds."""
    key_draw, key_local, _ = jax.random.split(key, 3)
    layout, scores = fleet.layout, None
    if fleet.rule.by_magnitude:
        scores = submodels.scores(layout, x, y)
    drawn = submodels.draw(fleet, key_draw, turn, scores)

    def side(labels, like):
        held = submodels.counts(labels, layout.units, drawn, like)
        return Side(labels, held, like)

    return Meeting(
        side(layout.x, x),
        side(layout.y, y),
        layout.units,
        layout.batch,
        extracted,
        drawn,
        tuple(
            jax.vmap(jax.random.fold_in, (None, 0))(key_local, part.clients)
            for part in drawn
        ),
        tuple(
            jax.tree.map(lambda a, part=part: a[part.clients], batch) for part in drawn
        ),
    )


def ask(
    here: Meeting,
    side: Side,
    question: Callable[..., Tree],
    xs: tuple[Tree, ...],
    ys: tuple[Tree, ...],
    otherwise: Tree | None = None,
) -> Tree:
    """Mean over the holders of the clients' answers to a question.

    ``question(client, xs, ys)`` sees each client's own part of ``xs`` and ``ys`` and
    answers with its part of ``side``. An entry that nobody holds is zero, or as in
    ``otherwise``.
    """
    answers = _answers(here, question, xs, ys)
    if not here.extracted:

        def cut(answer, kept):
            return submodels.take(side.labels, here.units, answer, kept)

        pairs = zip(answers, here.drawn, strict=True)
        answers = [jax.vmap(cut)(answer, part.kept) for answer, part in pairs]
    zeros = jax.tree.map(jnp.zeros_like, side.like)
    total = summed(side.labels, here.units, here.drawn, answers, zeros)

    def mean(total, count, rest):
        by = jnp.maximum(count, 1).astype(total.dtype)
        return jnp.where(count > 0, total / by, rest)

    otherwise = zeros if otherwise is None else otherwise
    return jax.tree.map(mean, total, side.holders, otherwise)


def mean_loss(here: Meeting, problem: Problem, x: Tree, y: Tree) -> jax.Array:
    """Mean over the clients of f at their own parts of x and y."""

    def loss(client, xs, ys):
        (x,), (y,) = xs, ys
        return problem.upper(x, y, by_level(client.data)[0])

    return jnp.mean(jnp.concatenate(_answers(here, loss, (x,), (y,))))


def _answers(here, question, xs, ys) -> list[Tree]:
    """One tree per level, a row per client."""

    def one(kept, key, data):
        def zeroed(labels, tree):
            return submodels.masked(labels, here.units, kept, tree)

        def cut(labels, tree):
            return submodels.take(labels, here.units, tree, kept)

        def same(labels, tree):
            del labels
            return tree

        restrict = cut if here.extracted else zeroed
        if here.extracted and here.batch_labels is not None:
            data = cut(here.batch_labels, data)
        own = [
            tuple(restrict(side.labels, v) for v in values)
            for side, values in ((here.x, xs), (here.y, ys))
        ]
        # Smaller variables have nothing to zero.
        within = same if here.extracted else zeroed
        client = Client(
            key,
            data,
            functools.partial(within, here.x.labels),
            functools.partial(within, here.y.labels),
        )
        return question(client, *own)

    return [
        jax.vmap(one)(part.kept, keys, rows)
        for part, keys, rows in zip(here.drawn, here.keys, here.rows, strict=True)
    ]


def trips(fleet: Fleet, x: Tree, y: Tree, down, up) -> Traffic:
    """Bytes of ``(of x, of y)`` variables sent down and up, without rounds."""
    counts = [level.participants for level in fleet.levels]
    parts = part_bytes(fleet, fleet.layout.x, x), part_bytes(fleet, fleet.layout.y, y)
    sizes = [
        (count, down[0] * a + down[1] * b, up[0] * a + up[1] * b)
        for count, a, b in zip(counts, *parts, strict=True)
    ]
    total = sum(count * (below + above) for count, below, above in sizes)
    most_down, most_up = (max(size[k] for size in sizes) for k in (1, 2))
    return Traffic(most_up, total, rounds=0, down=most_down)
