"""Curves of runs: medians, and bands over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Columns = Mapping[str, np.ndarray]

LABELS = {
    "step": "step",
    "rounds": "communication rounds",
    "message_bytes": "sent over one link (MB)",
    "down_bytes": "received from the server (MB)",
    "total_bytes": "sent over all links (MB)",
    "seconds": "time (s)",
    "gradients": "gradients per node",
    "products": "second-derivative products per node",
    "upper": "upper loss",
    "hypergrad_norm": "norm of the hypergradient",
    "consensus_x": "consensus error of x",
    "consensus_y": "consensus error of y",
    "consensus_z": "consensus error of z",
}

# Okabe and Ito (2008): told apart with any colour vision; black comes last.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#F0E442",
    "#000000",
)
DASHES = ("-", "--", ":", "-.")


def curves(
    histories: Columns | Mapping[str, Columns | Sequence[Columns]],
    x: str = "total_bytes",
    y: str = "upper",
    *,
    ax: Any = None,
    logx: bool = False,
    logy: bool = True,
) -> Any:
    """Draw one column of histories over another.

    A column with an axis of runs, or a list of histories under one label, is drawn as
    the median with a band from the smallest to the largest. Rows without a value are
    skipped; a run that turns into NaN leaves the band there.

    Args:
        histories: one history, or histories (or lists of them) by label.
        x: the column to go right; bytes are shown in MB, i.e. 10⁶ bytes.
        y: the column to go up.
        ax: the matplotlib axes to draw on; None makes a figure.
        logx: whether the x axis is logarithmic.
        logy: whether the y axis is logarithmic.

    Returns:
        The axes; ``ax.figure.savefig("curves.png")`` writes a file.

    Raises:
        ValueError: if a history lacks a column, or there is nothing to draw.
        ImportError: if matplotlib is absent.

    Examples:
        >>> history = {"total_bytes": np.array([1e6, 2e6]), "upper": np.array([2, 1])}
        >>> ax = curves({"ours": history})
        >>> ax.lines[0].get_xdata().tolist(), ax.get_xlabel()
        ([1.0, 2.0], 'sent over all links (MB)')
        >>> import matplotlib.pyplot as plt
        >>> plt.close(ax.figure)
    """
    groups = _groups(histories)
    lines = {label: _line(group, x, y, label) for label, group in groups.items()}
    ax = _axes() if ax is None else ax
    for number, (label, line) in enumerate(lines.items()):
        _draw(ax, number, label, *line)
    ax.set_xscale("log" if logx else "linear")
    ax.set_yscale("log" if logy else "linear")
    ax.set_xlabel(LABELS.get(x, x.replace("_", " ")))
    ax.set_ylabel(LABELS.get(y, y.replace("_", " ")))
    if any(groups):
        ax.legend(frameon=False)
    return ax


def _axes():
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "`curves` needs matplotlib: pip install dbojax[plots]"
        ) from error
    return plt.subplots(layout="constrained")[1]


def _groups(histories) -> dict[str, list[Columns]]:
    if not histories:
        raise ValueError("`curves` needs a history to draw, got none.")
    if all(isinstance(value, np.ndarray) for value in histories.values()):
        return {"": [histories]}
    return {
        label: [group] if isinstance(group, Mapping) else list(group)
        for label, group in histories.items()
    }


def _line(group: list[Columns], x: str, y: str, label: str):
    """Values to go right, and median, smallest and largest to go up."""
    pairs = [_pair(history, x, y, label) for history in group]
    lengths = {len(right) for right, _ in pairs}
    if len(lengths) != 1:
        raise ValueError(
            f"The histories under one label need as many rows each; those of "
            f"{label!r} have {sorted(lengths)} with a value of {y!r}. Give them "
            "labels of their own, or cut them to one length."
        )
    right = np.median([right for right, _ in pairs], axis=0)
    runs = np.concatenate([up for _, up in pairs], axis=1)
    band = np.nanmedian(runs, 1), np.nanmin(runs, 1), np.nanmax(runs, 1)
    return right, *band


def _pair(history: Columns, x: str, y: str, label: str):
    for name in (x, y):
        if name not in history:
            raise ValueError(
                f"The history {label!r} has no column {name!r}; it has "
                f"{sorted(history)}."
            )
    scale = 1e-6 if x.endswith("_bytes") else 1.0
    up = np.asarray(history[y], float).reshape(len(history[y]), -1)
    rows = ~np.isnan(up).all(axis=1)
    if not rows.any():
        raise ValueError(
            f"The column {y!r} of the history {label!r} holds no number to draw."
        )
    return np.asarray(history[x], float)[rows] * scale, up[rows]


def _draw(ax, number: int, label: str, right, middle, low, high) -> None:
    colour = COLOURS[number % len(COLOURS)]
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    marker = "o" if len(right) == 1 else None
    ax.plot(right, middle, dash, color=colour, marker=marker, label=label or None)
    if (low != high).any():
        ax.fill_between(right, low, high, color=colour, alpha=0.2, linewidth=0)
