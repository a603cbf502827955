"""The same number of tuning runs for everybody, on seeds that no table sees."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np


class Grid(NamedTuple):
    """How step sizes are sought; one grid for all methods, around each one's centre.

    In the first round the factors multiply the centre, in each further one a good pair
    so far, and are drawn together by a square root: a bad centre can be left. The pair
    of the least loss is chosen in the end.
    """

    upper: tuple[float, ...] = (0.1, 1.0, 10.0)
    lower: tuple[float, ...] = (0.2, 1.0, 5.0)
    rounds: int = 2
    # Pairs within this share of the least loss are as good a centre for the next round;
    # the smallest upper step of them is taken, then the smallest lower one, so that
    # further pairs are not laid out beyond the brink of stability.
    slack: float = 0.05

    @property
    def runs(self) -> int:
        """Runs per way to deal out the data; the centre of a round comes again."""
        return self.rounds * len(self.upper) * len(self.lower)


class Tuned(NamedTuple):
    """What tuning chose for one heterogeneity, and all that it saw."""

    settings: tuple[float, float]
    loss: float  # infinite if all pairs diverged
    # Whether the chosen upper or lower step is the smallest or largest that was tried.
    edge: tuple[bool, bool]
    tried: np.ndarray  # (runs, 2)
    losses: np.ndarray  # (runs,), means over the seeds; infinite where a run diverged


def laid_out(grid: Grid, centre: Sequence[float], turn: int) -> np.ndarray:
    """The pairs of one round around a centre, (pairs, 2).

    Raises:
        ValueError: if a factor or the centre is not positive, or there is no round.

    Examples:
        >>> laid_out(Grid(upper=(1.0,), lower=(0.25, 4.0)), (3.0, 1.0), turn=1).tolist()
        [[3.0, 0.5], [3.0, 2.0]]
    """
    if not grid.slack >= 0:
        raise ValueError(f"`slack` is a share of the least loss, got {grid.slack}.")
    numbers = (*grid.upper, *grid.lower, *centre)
    if not (grid.upper and grid.lower and min(numbers) > 0 and grid.rounds >= 1):
        raise ValueError(
            f"A grid multiplies a positive centre by positive factors, at least once; "
            f"got {grid} around {tuple(centre)}."
        )
    factors = np.array(list(itertools.product(grid.upper, grid.lower)))
    return np.asarray(centre) * factors ** (0.5**turn)


def tune(
    losses: Callable[[np.ndarray], np.ndarray],
    grid: Grid,
    centre: tuple[float, float],
    groups: int,
) -> list[Tuned]:
    """Seek the pair of steps of the smallest mean loss, or nearly, for each group.

    Args:
        losses: from pairs, ``(groups, pairs, 2)``, to the losses of their runs,
            ``(groups, seeds, pairs)``; called once per round with one shape.
        grid: how to seek.
        centre: where.
        groups: how many to tune apart, e.g. one for each heterogeneity.

    Returns:
        One record per group; a pair that diverges on one seed is out.

    Examples:
        >>> def losses(pairs):
        ...     away = np.abs(np.log(pairs / np.array([30.0, 0.5]))).sum(-1)
        ...     return np.where(pairs[..., 0] > 50, np.nan, away)[:, None]
        >>> [found] = tune(losses, Grid(), (10.0, 1.0), groups=1)
        >>> [round(float(v), 2) for v in found.settings], found.edge, len(found.tried)
        ([31.62, 0.45], (False, False), 18)
    """
    laid_out(grid, centre, 0)  # refuses an impossible one before any run
    centres = [centre] * groups
    tried: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    for turn in range(grid.rounds):
        pairs = np.stack([laid_out(grid, c, turn) for c in centres])
        found = np.asarray(losses(pairs), float)
        # A mean over the seeds is finite only if all are.
        means = np.where(np.isfinite(found), found, np.inf).mean(1)
        tried.append(pairs)
        seen.append(means)
        centres = [_good(grid.slack, *group)[0] for group in _grouped(tried, seen)]
    return [recorded(*group) for group in _grouped(tried, seen)]


def _grouped(tried, seen):
    """Pairs and means of all rounds, group by group."""
    return zip(np.concatenate(tried, 1), np.concatenate(seen, 1), strict=True)


def _good(slack, pairs, means):
    """The smallest pair within the slack of the least loss, and its loss."""
    least = means.min()
    allowed = least + slack * abs(least) if np.isfinite(least) else least
    good = np.flatnonzero(means <= allowed)
    index = good[np.lexsort((pairs[good, 1], pairs[good, 0]))[0]]
    return (float(pairs[index, 0]), float(pairs[index, 1])), float(means[index])


def recorded(pairs: np.ndarray, means: np.ndarray) -> Tuned:
    """What tuning makes of all that it saw.

    Args:
        pairs: that were tried, ``(runs, 2)``.
        means: their losses, ``(runs,)``; of equal ones the smallest steps are taken.
    """
    settings, loss = _good(0.0, pairs, means)
    ends = pairs.min(0), pairs.max(0)
    upper, lower = (any(settings[i] == end[i] for end in ends) for i in (0, 1))
    return Tuned(settings, loss, (upper, lower), pairs, means)


def keys_of(key: jax.Array, seeds: Sequence[int]) -> jax.Array:
    """One key per case; ``dbo.run`` with it repeats that case by itself."""
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(np.asarray(seeds))
