"""Clients of unlike capacity: who takes part in a round, and what each one holds."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees
from dbojax.base import Tree
from dbojax.submodels.layout import Layout
from dbojax.submodels.parts import Kept
from dbojax.submodels.rules import Group, Rule, staggered


class Level(NamedTuple):
    """Clients of one capacity; all of it is static."""

    capacity: float
    members: np.ndarray  # (n_l,), numbers of the clients
    participants: int  # how many of them take part in a round
    kept: dict[str, int]  # group -> units that each of them holds; whole ones left out


class Fleet(NamedTuple):
    """All clients, and the rule by which they get their sub-models."""

    layout: Layout
    levels: tuple[Level, ...]  # the largest capacity first
    rule: Rule
    clients: int
    frozen: tuple[str, ...]  # groups whose masks stay as in round 0


class Drawn(NamedTuple):
    """The clients of one level that take part in a round."""

    clients: jax.Array  # (s,), their numbers
    kept: Kept  # group -> (s, k)


def fleet(
    layout: Layout,
    capacities: Sequence[float] | np.ndarray,
    rule: Rule | None = None,
    participants: int | Mapping[float, int] | None = None,
    minimum: int = 1,
    frozen: Sequence[str] = (),
) -> Fleet:
    r"""Say how much of each group every client holds, and how many take part.

    A client of capacity :math:`\beta` holds :math:`\lceil \beta n_l \rceil` of the
    :math:`n_l` units of each group, so a matrix between two groups shrinks to
    :math:`\beta^2` of it. Which units they are is a function of the round and the
    client (``rule``), and is never sent. Each level of capacity draws a fixed number of
    its members, all sets alike, so that all shapes are known beforehand.

    Args:
        layout: the groups, from ``dbo.submodels.layers``, ``coordinates`` or
            ``layout``.
        capacities: of each client, in (0, 1].
        rule: which units; by default ``dbo.submodels.staggered()``.
        participants: how many take part in a round: None is all, a number is shared
            out among the levels in proportion to their members, a mapping tells
            capacity by capacity.
        minimum: clients of capacity 1 in every round, so that each entry of x and y is
            held by at least as many. With 0 an entry may go uncovered for a round and
            then keeps its value.
        frozen: groups whose units stay those of the first round, e.g.
            ``layout.lower_groups`` for personal y whose part never changes.

    Returns:
        A fleet; ``levels`` have the largest capacity first.

    Raises:
        ValueError: if a capacity is not in (0, 1], a number of participants is
            impossible, or fewer than ``minimum`` clients of capacity 1 take part.
        TypeError: if a part is of another kind.

    Examples:
        >>> units = dbo.submodels.coordinates(jnp.ones(8), jnp.ones(4))
        >>> ten = fleet(units, [1.0] * 2 + [0.5] * 4 + [0.25] * 4, participants=5)
        >>> [(level.capacity, level.participants, level.kept) for level in ten.levels]
        [(1.0, 1, {}), (0.5, 2, {'x0': 4, 'y0': 2}), (0.25, 2, {'x0': 2, 'y0': 1})]

    References:
        Our formulation of arXiv:2512.24667; levels of capacity as in arXiv:2010.01264.
    """
    rule = staggered() if rule is None else rule
    trees.check_type(layout, Layout, "layout", "dbo.submodels.layers(apply, x, y, i)")
    trees.check_type(rule, Rule, "rule", "dbo.submodels.staggered()")
    capacities = _checked(capacities)
    unknown = sorted(set(frozen) - set(layout.units))
    if unknown:
        raise ValueError(
            f"`frozen` names groups of the layout, {list(layout.units)}; got {unknown}."
        )
    if frozen and rule.by_magnitude:
        raise ValueError(
            "`frozen` keeps the units of the first round, but this rule ranks them "
            "anew in each. Leave `frozen` out, or take a rule of the round alone, e.g. "
            "`dbo.submodels.staggered()`."
        )
    values = sorted(set(capacities.tolist()), reverse=True)
    members = [np.flatnonzero(capacities == value) for value in values]
    sizes = dict(zip(values, map(len, members), strict=True))
    shares = _shares(sizes, participants, minimum)
    levels = tuple(
        Level(value, own, shares[value], _kept(layout, value))
        for value, own in zip(values, members, strict=True)
        if shares[value]
    )
    full = shares.get(1.0, 0)
    if full < minimum:
        raise ValueError(
            f"{full} clients of capacity 1 take part in a round, fewer than "
            f"minimum={minimum}: some entries may be held by nobody. Give a client "
            "capacity 1 and let it take part, or write minimum=0; uncovered entries "
            "then keep their values for the round."
        )
    return Fleet(layout, levels, rule, len(capacities), tuple(frozen))


def _checked(capacities) -> np.ndarray:
    capacities = np.asarray(capacities, float)
    good = (capacities > 0) & (capacities <= 1)  # false for NaN
    if capacities.ndim != 1 or not capacities.size or not good.all():
        raise ValueError(
            "`capacities` gives each client's share of the units, in (0, 1]; got shape "
            f"{capacities.shape} with {capacities[~good][:3].tolist()} out of range. A "
            "client that can hold nothing takes no part: leave it out."
        )
    return capacities


def _kept(layout, capacity) -> dict[str, int]:
    kept = {
        name: math.ceil(capacity * size - 1e-9) for name, size in layout.units.items()
    }
    return {name: k for name, k in kept.items() if k < layout.units[name]}


def _shares(sizes, participants, minimum) -> dict[float, int]:
    total = sum(sizes.values())
    if participants is None:
        return sizes
    if isinstance(participants, Mapping):
        wrong = {
            value: count
            for value, count in participants.items()
            if not _whole(count) or not 0 <= count <= sizes.get(value, 0)
        }
        if wrong or not sum(participants.values()):
            raise ValueError(
                f"`participants` maps capacities to how many of their members, "
                f"{sizes}, take part, at least one in all; got {dict(participants)}."
            )
        return {value: int(participants.get(value, 0)) for value in sizes}
    if not _whole(participants) or not 1 <= participants <= total:
        raise ValueError(
            f"Of {total} clients a whole number from 1 to {total} can take part in a "
            f"round; got participants={participants!r}."
        )
    if participants < minimum:
        raise ValueError(
            f"participants={participants} leaves no room for minimum={minimum} clients "
            "of capacity 1 in every round."
        )
    # Largest remainders; among equal ones the largest capacity.
    quotas = {value: participants * size / total for value, size in sizes.items()}
    shares = {value: int(quota) for value, quota in quotas.items()}
    order = sorted(quotas, key=lambda v: (shares[v] - quotas[v], -v))
    for value in order[: participants - sum(shares.values())]:
        shares[value] += 1
    while shares.get(1.0, minimum) < min(minimum, sizes.get(1.0, 0)):
        shares[1.0] += 1
        shares[max(shares, key=lambda v: (v != 1.0, shares[v]))] -= 1
    idle = [f"{value:g}" for value, count in shares.items() if not count]
    if idle:
        raise ValueError(
            f"With {participants} participants shared out among {len(sizes)} levels, "
            f"clients of capacities {', '.join(idle)} would never take part. Use fewer "
            "capacities or more participants, or tell the numbers level by level, e.g. "
            "`{1.0: 1, 0.5: 3}`."
        )
    return shares


def _whole(count) -> bool:
    return isinstance(count, numbers.Integral) and not isinstance(count, bool)


def draw(
    fleet: Fleet, key: jax.Array, turn: jax.Array | int, scores: Tree | None = None
) -> tuple[Drawn, ...]:
    """Draw who takes part in a round, and look up what each one holds.

    Args:
        fleet: the clients.
        key: another one in each round.
        turn: number of the round, from 0.
        scores: group -> (size,), how much each unit matters; for rules that ask.

    Returns:
        One draw per level, in the order of ``fleet.levels``.

    Examples:
        >>> units = dbo.submodels.coordinates(jnp.ones(8), jnp.ones(4))
        >>> two = fleet(units, [1.0, 0.5, 0.5], participants={1.0: 1, 0.5: 1})
        >>> [part.clients.shape for part in draw(two, jax.random.key(0), 0)]
        [(1,), (1,)]
    """
    names = list(fleet.layout.units)
    # Frozen groups are looked up in round 0, whatever the round.
    turns = {name: jnp.asarray(turn, jnp.int32) for name in names}
    turns |= {name: jnp.zeros((), jnp.int32) for name in fleet.frozen}

    def one(number, level):
        clients = jnp.asarray(level.members, jnp.int32)
        if level.participants < len(level.members):
            clients = jax.random.permutation(jax.random.fold_in(key, number), clients)
        clients = clients[: level.participants]
        kept = {}
        for name, k in level.kept.items():
            size = fleet.layout.units[name]
            group = Group(name, names.index(name), size, k, fleet.clients)
            score = None if scores is None else scores[name]
            keep = functools.partial(_keep, fleet.rule, turns[name], group, score)
            kept[name] = jax.vmap(keep)(clients)
        return Drawn(clients, kept)

    return tuple(one(number, level) for number, level in enumerate(fleet.levels))


def _keep(rule, turn, group, score, client):
    return rule.keep(turn, client, group, score)


def scores(layout: Layout, x: Tree, y: Tree) -> dict[str, jax.Array]:
    """Norm of all entries of x and y that go with each unit: group -> (size,)."""
    squares = {name: jnp.zeros(size) for name, size in layout.units.items()}
    pairs = zip(
        jax.tree.leaves((layout.x, layout.y)), jax.tree.leaves((x, y)), strict=True
    )
    for label, leaf in pairs:
        for axis, name in enumerate(label.split()):
            if name in squares:
                others = [a for a in range(leaf.ndim) if a != axis]
                sums = jnp.sum(jnp.abs(leaf) ** 2, axis=others)
                squares[name] += sums.reshape(-1, layout.units[name]).sum(0)
    return {name: jnp.sqrt(square) for name, square in squares.items()}
