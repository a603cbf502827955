"""What a comparison leaves behind: one cell per method, graph and heterogeneity."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dbojax.runner import History

Column = np.ndarray


class Cell(NamedTuple):
    """All seeds of one method on one task, graph and heterogeneity."""

    task: str
    method: str
    message: str
    dense: bool
    graph: str
    h: float
    seeds: tuple[int, ...]
    settings: tuple[float, float]  # upper and lower step
    edge: tuple[bool, bool]  # whether each is at an end of what was tried
    # One row per evaluation; counts are (evaluations,), scores (evaluations, seeds).
    history: History

    @property
    def label(self) -> str:
        """Method and message, for tables and legends."""
        return f"{self.method}, {self.message}"

    @property
    def place(self) -> tuple[str, str, float]:
        """Task, graph and heterogeneity: who shares them shares a target."""
        return self.task, self.graph, self.h


def select(
    cells: Iterable[Cell],
    task: str | None = None,
    graph: str | None = None,
    h: float | None = None,
) -> dict[str, History]:
    """Histories by label, as ``dbo.plots`` takes them; None leaves a key open.

    Raises:
        ValueError: if no cell is left, or two have one label: say more.

    Examples:
        >>> history = History({"step": np.array([1]), "test_accuracy": np.ones((1, 2))})
        >>> cell = Cell("t", "m", "dense", True, "ring", 0.0, (0, 1), (1, 1), (0, 0),
        ...             history)
        >>> list(select([cell], graph="ring"))
        ['m, dense']
    """
    wanted = (task, graph, h)
    cells = list(cells)
    kept = [
        cell
        for cell in cells
        if all(w is None or w == v for w, v in zip(wanted, cell.place, strict=True))
    ]
    found = {cell.label: cell.history for cell in kept}
    if not kept or len(found) < len(kept):
        places = sorted({cell.place for cell in cells})
        raise ValueError(
            f"`select` needs one task, graph and h; (task, graph, h)={wanted} fits "
            f"{len(kept)} cells of {len(found)} labels. There are {places}."
        )
    return found


def final(cell: Cell, column: str = "test_accuracy") -> Column:
    """The last value of each seed; NaN where it diverged."""
    last = np.array(cell.history[column][-1], float)
    return np.where(np.isfinite(cell.history["validation_loss"][-1]), last, np.nan)


def targets(
    cells: Iterable[Cell], share: float = 0.98, column: str = "test_accuracy"
) -> dict[tuple[str, str, float], float]:
    """A share of the best uncompressed mean at the end, for each place.

    A method that diverged on any seed does not count. Where no uncompressed one is
    left the target is NaN, which nobody reaches.

    Args:
        cells: of a comparison.
        share: in (0, 1].
        column: the score to reach.

    Examples:
        >>> history = History({"test_accuracy": np.array([[0.4, 0.6]]),
        ...                    "validation_loss": np.ones((1, 2))})
        >>> cell = Cell("t", "m", "dense", True, "ring", 0.0, (0, 1), (1, 1), (0, 0),
        ...             history)
        >>> targets([cell, cell._replace(dense=False)], share=0.5)
        {('t', 'ring', 0.0): 0.25}
    """
    best: dict[tuple[str, str, float], float] = {}
    for cell in cells:
        mean = float(np.mean(final(cell, column))) if cell.dense else np.nan
        best[cell.place] = float(np.fmax(best.get(cell.place, np.nan), mean))
    return {place: share * value for place, value in best.items()}


class Reached(NamedTuple):
    """When a method came to the target."""

    row: int | None  # of the history: the first whose mean over the seeds is there
    seeds: int  # how many of the seeds came there by themselves


def reached(cell: Cell, target: float, column: str = "test_accuracy") -> Reached:
    """First evaluation at the target, of the mean and, counted, of each seed.

    A seed that has diverged counts no more, and takes the mean with it.

    Examples:
        >>> scores = {"test_accuracy": np.array([[0.1, 0.8], [0.5, 0.9]])}
        >>> history = History({**scores, "validation_loss": np.ones((2, 2))})
        >>> cell = Cell("t", "m", "dense", True, "ring", 0.0, (0, 1), (1, 1), (0, 0),
        ...             history)
        >>> reached(cell, 0.6), reached(cell, 0.95)
        (Reached(row=1, seeds=1), Reached(row=None, seeds=0))
    """
    alive = np.isfinite(cell.history["validation_loss"])
    scores = np.where(alive, cell.history[column], np.nan)
    rows = np.flatnonzero(scores.mean(1) >= target)
    seeds = int((scores >= target).any(0).sum())
    return Reached(int(rows[0]) if rows.size else None, seeds)


_FACTS = ("task", "method", "message", "dense", "graph", "h", "seed")
_STEPS = ("upper_step", "lower_step", "upper_edge", "lower_edge")


def to_csv(cells: Sequence[Cell], path: str | os.PathLike) -> None:
    """Write one row per cell, seed and evaluation; reads back to the same bits.

    A file that is there is replaced in one piece once the new one is whole.

    Raises:
        ValueError: if there is no cell.
    """
    if not cells:
        raise ValueError("`to_csv` needs a cell to write, got none.")
    names = list(cells[0].history)
    draft = f"{os.fspath(path)}.part"
    with open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*_FACTS, *_STEPS, *names])
        for cell in cells:
            writer.writerows(_rows(cell, names))
    os.replace(draft, path)


def _rows(cell: Cell, names):
    facts = (cell.task, cell.method, cell.message, int(cell.dense), cell.graph, cell.h)
    more = (*cell.settings, *(int(end) for end in cell.edge))
    for i, seed in enumerate(cell.seeds):
        columns = [cell.history[name] for name in names]
        own = [c[:, i] if c.ndim == 2 else c for c in columns]
        for row in zip(*(column.tolist() for column in own), strict=True):
            yield (*facts, seed, *more, *row)


_COUNTS = (
    *("step", "message_bytes", "total_bytes", "rounds", "gradients", "products"),
    "seconds",
)


def read_csv(path: str | os.PathLike) -> list[Cell]:
    """The cells of a file, e.g. to draw them again.

    Raises:
        ValueError: if the file is not a whole one of :func:`to_csv`.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    head = (*_FACTS, *_STEPS)
    if not rows or tuple(rows[0])[: len(head)] != head:
        raise ValueError(
            f"{path} is no table of a comparison: its columns must start with {head}."
        )
    if any(None in row.values() or None in row for row in rows):
        raise ValueError(f"{path} has a row that was cut off. Run the comparison anew.")
    groups: dict[tuple, dict[int, list[dict]]] = {}
    for row in rows:
        facts = tuple(row[name] for name in (*_FACTS[:-1], *_STEPS))
        groups.setdefault(facts, {}).setdefault(int(row["seed"]), []).append(row)
    return [_cell(facts, seeds) for facts, seeds in groups.items()]


def _cell(facts, seeds) -> Cell:
    task, method, message, dense, graph, h, *steps = facts
    names = list(next(iter(seeds.values()))[0])[len(_FACTS) + len(_STEPS) :]

    def column(name):
        runs = [[row[name] for row in rows] for rows in seeds.values()]
        if name in _COUNTS:
            kind = float if name == "seconds" else int
            return np.array([kind(value) for value in runs[0]])
        return np.array(runs, float).T

    return Cell(
        *(task, method, message, dense == "1", graph, float(h), tuple(seeds)),
        settings=(float(steps[0]), float(steps[1])),
        edge=(steps[2] == "1", steps[3] == "1"),
        history=History({name: column(name) for name in names}),
    )
