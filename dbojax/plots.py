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
    "test_accuracy": "test accuracy",
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


def panels(
    histories: Mapping[str, Columns | Sequence[Columns]],
    xs: Sequence[str] = ("message_bytes", "seconds", "step"),
    y: str = "test_accuracy",
    *,
    target: float | None = None,
    logx: bool = True,
    limits: tuple[float, float] | None = None,
) -> list[Any]:
    """Draw one column over several others, side by side: bytes, seconds, steps.

    Args:
        histories: by label, as for :func:`curves`.
        xs: the columns to go right, one panel each.
        y: the column to go up.
        target: where to draw a level line.
        logx: whether the x axes are logarithmic.
        limits: of the common y axis.

    Returns:
        The axes, from left to right.

    Raises:
        ValueError: if there is no panel, a history lacks a column, or there is nothing
            to draw.
        ImportError: if matplotlib is absent.

    Examples:
        >>> history = {name: np.array([1.0, 2.0]) for name in ("step", "seconds", "a")}
        >>> axes = panels({"ours": history}, xs=("step", "seconds"), y="a", target=1.5)
        >>> [ax.get_xlabel() for ax in axes], len(axes[0].lines)
        (['step', 'time (s)'], 2)
        >>> import matplotlib.pyplot as plt
        >>> plt.close(axes[0].figure)
    """
    if not xs:
        raise ValueError("`panels` needs a column to go right, got none.")
    size = (4.2 * len(xs), 4.0)
    _, axes = _subplots(1, len(xs), figsize=size, sharey=True, squeeze=False)
    for ax, x in zip(axes[0], xs, strict=True):
        curves(histories, x, y, ax=ax, logx=logx, logy=False)
        if target is not None:
            ax.axhline(target, color="0.5", linestyle=":", linewidth=1)
        if limits is not None:
            ax.set_ylim(*limits)
        if ax is not axes[0, 0]:
            ax.set_ylabel("")
            if (legend := ax.get_legend()) is not None:
                legend.remove()
    return list(axes[0])


def _axes():
    return _subplots()[1]


def check() -> None:
    """Refuse to start what ends with a picture where matplotlib is absent.

    Raises:
        ImportError: if matplotlib is absent.
    """
    try:
        import matplotlib.pyplot  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install dbojax[plots]"
        ) from error


def _subplots(*shape, **more):
    check()
    import matplotlib.pyplot as plt

    return plt.subplots(*shape, layout="constrained", **more)


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
