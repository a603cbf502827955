"""Markdown: what each method needs to a common accuracy, and where it ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dbojax.comparison.cells import Cell, final, reached, targets
from dbojax.comparison.tuning import Tuned

Rows = list[dict[str, str]]

NOTES = """\
Target: {share:.0%} of the best uncompressed mean test accuracy at the end, for each
task, graph and h. A method is there at the first evaluation whose mean over the seeds
is; "seeds" counts those that come there by themselves, those that diverge later
included. MB = 1e6 bytes, exact, over one directed link and over all of them.
Gradients and products (of a vector with second derivatives) are those of one node.
Seconds: steps times the median time of one step of one run by itself on the first
graph, compiling apart; all nodes are simulated on one machine, so it is work, not
time on a network. Final accuracy is the mean ± standard deviation over the seeds that
did not diverge, judged at the node mean; consensus errors of x and y are medians over
all seeds at the end. * marks a step size at an end of what was tried."""


def _cells_of_steps(cell: Cell) -> str:
    marks = ("*" if end else "" for end in cell.edge)
    pairs = zip(cell.settings, marks, strict=True)
    return " / ".join(f"{step:.3g}{mark}" for step, mark in pairs)


def _ending(cell: Cell) -> dict[str, str]:
    ends = final(cell)
    kept = ends[np.isfinite(ends)]
    lost = len(ends) - len(kept)
    note = f" ({lost} of {len(ends)} diverged)" if lost else ""
    spread = f"{kept.mean():.4f} ± {kept.std():.4f}{note}" if len(kept) else "diverged"
    errors = [np.median(cell.history[f"consensus_{v}"][-1]) for v in "xy"]
    return {
        "final accuracy": spread,
        "consensus x / y": " / ".join(f"{error:.1e}" for error in errors),
    }


def table(cells: Iterable[Cell], share: float = 0.98) -> Rows:
    """One row per method of what it needs to the target; all cells share a place.

    Args:
        cells: of one task, graph and h.
        share: of the best uncompressed accuracy, the target.

    Raises:
        ValueError: if the cells are of several places, or there is none.
    """
    cells = list(cells)
    places = sorted({cell.place for cell in cells})
    if len(places) != 1:
        raise ValueError(
            f"A table is of one (task, graph, h); these cells are of {places}. Use "
            "`report` for all."
        )
    target = targets(cells, share)[places[0]]
    return [_row(cell, target) for cell in cells]


def _row(cell: Cell, target: float) -> dict[str, str]:
    found, history = reached(cell, target), cell.history
    row = {"method": cell.label, "steps up / low": _cells_of_steps(cell)}
    names = ("MB/link", "MB all", "seconds", "steps", "gradients", "products")
    row |= dict.fromkeys(names, "")
    if found.row is None:
        row["MB/link"] = "not reached"
    else:
        at = {name: history[name][found.row] for name in _SHOWN.values()}
        row |= {name: _text(name, at[column]) for name, column in _SHOWN.items()}
    row["seeds"] = f"{found.seeds} of {len(cell.seeds)}"
    return row | _ending(cell)


_SHOWN = {
    "MB/link": "message_bytes",
    "MB all": "total_bytes",
    "seconds": "seconds",
    "steps": "step",
    "gradients": "gradients",
    "products": "products",
}


def _text(name: str, value) -> str:
    if name.startswith("MB"):
        return f"{value / 1e6:.4g}"
    return f"{value:.3g}" if name == "seconds" else str(value)


def summary(
    cells: Sequence[Cell], column: str = "message_bytes", share: float = 0.98
) -> Rows:
    """Methods against places: what one column shows when the target is reached.

    Args:
        cells: of one task.
        column: a count of the histories, e.g. ``"seconds"``; bytes are shown in MB.
        share: of the best uncompressed accuracy, the target.
    """
    goal = targets(cells, share)
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        found = reached(cell, goal[cell.place]).row
        text = "-"
        if found is not None:
            value = cell.history[column][found]
            text = f"{value / 1e6 if column.endswith('bytes') else value:.4g}"
        row = rows.setdefault(cell.label, {"method": cell.label})
        row[f"{cell.graph}, h = {cell.h:g}"] = text
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return [{name: row.get(name, "") for name in names} for row in rows.values()]


def markdown(rows: Rows) -> list[str]:
    r"""Lines of a table; the first column holds words, the others numbers.

    Examples:
        >>> print(*markdown([{"method": "a", "MB": "1"}]), sep="\n")
        | method | MB |
        | --- | ---: |
        | a | 1 |
    """
    names = list(rows[0])
    rule = ["---"] + ["---:"] * (len(names) - 1)
    lines = [names, rule, *([row[name] for name in names] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def report(cells: Sequence[Cell], share: float = 0.98) -> list[str]:
    """All tables: for each task two summaries, then one table per h and graph."""
    goal, lines = targets(cells, share), [NOTES.format(share=share)]
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        lines += ["", f"## {task}"]
        for title, column in _SUMMARIES.items():
            rows = summary(own, column, share)
            lines += ["", f"{title} to the target (- where the mean never came)", ""]
            lines += markdown(rows)
        for place in dict.fromkeys(cell.place for cell in own):
            here = [cell for cell in own if cell.place == place]
            title = f"### {place[1]}, h = {place[2]:g}: target {goal[place]:.4f}"
            lines += ["", title, "", *markdown(table(here, share))]
    return lines


_SUMMARIES = {"MB over one link": "message_bytes", "Seconds": "seconds"}


def tried(record: Tuned) -> Rows:
    """One row per pair that was tried, for a file.

    Examples:
        >>> pairs = np.array([[1.0, 0.1], [2.0, 0.1]])
        >>> record = dbo.comparison.Tuned(
        ...     (2.0, 0.1), 0.3, (True, True), pairs, np.array([0.5, 0.3])
        ... )
        >>> [row["chosen"] for row in tried(record)]
        ['0', '1']
    """
    # A round begins with the best pair of the last, which is then there twice.
    first = np.flatnonzero((record.tried == np.array(record.settings)).all(1))[0]
    return [
        {
            "upper_step": repr(float(upper)),
            "lower_step": repr(float(lower)),
            "validation_loss": repr(float(loss)),
            "chosen": str(int(index == first)),
        }
        for index, ((upper, lower), loss) in enumerate(
            zip(record.tried, record.losses, strict=True)
        )
    ]
