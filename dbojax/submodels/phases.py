"""Phases that are searched for, so that every pair of units is trained together."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dbojax.submodels.rules import (
    Group,
    Phase,
    Rule,
    aligned,
    per_layer,
    shifts,
    staggered,
    turned,
)

STRIDES = (1, 2, 3, 4, 5, 7, 9, 11, 13, 17)
SPREADS = (1, 2, 3, 5, 7)
CELLS = 64  # a larger circle of units is looked at through so many cells
WINDOWS = 16_384  # at most so many clients x rounds are counted
SHOTS = 16  # rounds that are looked at one by one


class Score(NamedTuple):
    """How well units are covered; compared from the first field on."""

    pair: float  # clients x rounds that hold the least covered pair, over the window
    per_round: float  # those that hold the least covered pair of a round, in the mean
    unit: float  # the same for single units
    share: float  # share of the pairs that are held in a round, in the mean


class Trail(NamedTuple):
    """The windows of one group, on a circle of cells."""

    starts: np.ndarray  # (rounds, clients)
    widths: np.ndarray  # (clients,)
    cells: int


def coverage_aware(
    layout: Any, capacities: Sequence[float], rounds: int | None = None
) -> Rule:
    r"""Search staggered phases that cover every pair of units that meets in a leaf.

    .. math::
        \max_{s, p} \min_{l \sim m} \min_{a, b}
        \big|\{(i, q) : a \in \mathcal K_{i,l}^q,\ b \in \mathcal K_{i,m}^q\}\big|,
        \quad q < Q,

    group after group against those before it, over a small table of strides and
    spreads; the smallest coverage of single rounds decides between equals. The result
    is never worse in this measure than :func:`~dbojax.submodels.rules.per_layer` or
    :func:`~dbojax.submodels.rules.aligned`. All clients count as present.

    To stay quick, groups of more than 64 units are looked at through 64 cells, and of
    more than 16 384 pairs of client and round as many are counted: the measure is exact
    below, and close above.

    Args:
        layout: names the groups and where they meet.
        capacities: (M,) in (0, 1], one per client.
        rounds: the window :math:`Q`; as many as the largest group has units if None.

    Returns:
        A staggered rule, the same whenever it is searched again.

    Raises:
        ValueError: if ``rounds`` is not a whole number from 1 on, or a capacity is not
            in (0, 1].

    Examples:
        Four clients of one half cover every weight in every round, where the default
        covers them only over several:

        >>> x = [jnp.ones((3, 4)), jnp.ones((4, 4))]
        >>> units = dbo.submodels.layout(x, jnp.ones(4), ["_ a", "a b"], "b")
        >>> search(units, [0.5] * 4)
        {'a': Phase(stride=2, spread=1, offset=0),
         'b': Phase(stride=1, spread=2, offset=0)}

    References:
        Our formulation.
    """
    return staggered(search(layout, capacities, rounds))


def search(
    layout: Any, capacities: Sequence[float], rounds: int | None = None
) -> dict[str, Phase]:
    """The phases behind :func:`coverage_aware`, by group."""
    shares = _check_capacities(capacities)
    if rounds is not None and (not isinstance(rounds, numbers.Integral) or rounds < 1):
        raise ValueError(
            "`coverage_aware` looks at a whole number of rounds from 1 on, got "
            f"rounds={rounds!r}. Leave it out for one turn of the largest group."
        )
    window = _window(int(rounds or max(layout.units.values(), default=1)), len(shares))
    groups = [
        Group(name, number, size, kept=size, clients=len(shares))
        for number, (name, size) in enumerate(layout.units.items())
    ]
    pairs = sorted(meetings(layout))

    def trail(group, phase):
        return _trail(phase, group.size, shares, window)

    found: dict[str, Phase] = {}
    known: dict[str, Trail] = {}
    for group in groups:
        near = {a if b == group.name else b for a, b in pairs if group.name in (a, b)}
        rivals = [known[name] for name in known if name in near]
        table = itertools.starmap(Phase, itertools.product(STRIDES, SPREADS))
        choices = dict.fromkeys((per_layer(group), *(table if rivals else ())))
        choices = {phase: trail(group, phase) for phase in choices}
        found[group.name] = _best(choices, rivals)
        known[group.name] = choices[found[group.name]]

    def total(phases):
        moves = {g.name: trail(g, phases[g.name]) for g in groups}
        return _worst([_score(moves[a], moves[b]) for a, b in pairs])

    plain = [{g.name: rule(g) for g in groups} for rule in (per_layer, aligned)]
    return max([found, *plain], key=total)


def meetings(layout: Any) -> set[tuple[str, str]]:
    """Pairs of different groups that share a leaf of x or y, names in order."""
    labels = jax.tree.leaves((layout.x, layout.y))
    named = [sorted(set(label.split()) - {"_"}) for label in labels]
    return {pair for names in named for pair in itertools.combinations(names, 2)}


def _check_capacities(capacities) -> np.ndarray:
    shares = np.asarray(capacities, float)
    if shares.ndim != 1 or not shares.size or not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(
            "Capacities are one number in (0, 1] per client; got "
            f"{capacities!r}. A client that holds nothing is left out."
        )
    return shares


def _window(rounds: int, clients: int) -> np.ndarray:
    """All rounds; or many, at distances that no stride divides."""
    most = max(1, WINDOWS // clients)
    if rounds <= most:
        return np.arange(rounds)
    golden = (math.sqrt(5) - 1) / 2
    return np.unique((np.arange(most) * golden % 1 * rounds).astype(np.int64))


def _trail(phase: Phase, size: int, shares: np.ndarray, window: np.ndarray) -> Trail:
    cells = min(size, CELLS)
    first = shifts(phase, size, len(shares))
    starts = (turned(phase.stride, window, size)[:, None] + first) % size
    kept = np.ceil(shares * size - 1e-9)
    widths = np.maximum(1, np.round(kept * cells / size)).astype(int)
    return Trail(starts * cells // size, widths, cells)


def _best(choices: dict[Phase, Trail], rivals: list[Trail]) -> Phase:
    """The choice that meets all rivals best; the first among equals."""
    pair = {
        phase: min((_pair(trail, other) for other in rivals), default=0.0)
        for phase, trail in choices.items()
    }
    most = max(pair.values())
    rest = {phase: choices[phase] for phase in choices if pair[phase] == most}
    return max(rest, key=lambda p: _worst([_score(rest[p], r) for r in rivals]))


def _score(a: Trail, b: Trail) -> Score:
    shots = np.unique(np.linspace(0, len(a.starts) - 1, SHOTS).astype(int))
    held_a, held_b = _held(a, shots), _held(b, shots)
    pairs = np.swapaxes(held_a, 1, 2) @ held_b  # (shots, cells of a, cells of b)
    units = min(held.sum(1).min(-1).mean() for held in (held_a, held_b))
    return Score(
        _pair(a, b),
        float(pairs.min((1, 2)).mean()),
        float(units),
        float((pairs > 0).mean()),
    )


def _pair(a: Trail, b: Trail) -> float:
    """How often the least covered pair is held, over the window."""
    levels = _levels(np.stack([a.widths, b.widths]))
    return float(np.sum([_meet(a, b, level) for level in levels], axis=0).min())


def _meet(a: Trail, b: Trail, clients: np.ndarray) -> np.ndarray:
    """How often clients of one capacity hold each pair: (cells of a, cells of b)."""
    places = a.starts[:, clients] * b.cells + b.starts[:, clients]
    starts = np.bincount(places.ravel(), minlength=a.cells * b.cells)
    starts = starts.reshape(a.cells, b.cells).astype(float)
    width_a, width_b = a.widths[clients[0]], b.widths[clients[0]]
    return _band(a.cells, width_a).T @ starts @ _band(b.cells, width_b)


def _band(cells: int, width: Any) -> np.ndarray:
    """Row s marks the cells of a window that starts at s."""
    apart = np.arange(cells)[None] - np.arange(cells)[:, None]
    return (apart % cells < width).astype(float)


def _levels(widths: np.ndarray) -> list[np.ndarray]:
    """Numbers of the clients of each capacity."""
    _, level = np.unique(widths, axis=1, return_inverse=True)
    level = level.ravel()
    return [np.flatnonzero(level == value) for value in range(level.max() + 1)]


def _held(trail: Trail, shots: np.ndarray) -> np.ndarray:
    apart = np.arange(trail.cells) - trail.starts[shots][..., None]
    return (apart % trail.cells < trail.widths[:, None]).astype(np.float32)


def _worst(scores: list[Score]) -> Score:
    """The smallest of each field; of nothing, a score that all share."""
    if not scores:
        return Score(0.0, 0.0, 0.0, 0.0)
    return Score(*(min(values) for values in zip(*scores, strict=True)))
