"""What a run remembers: columns of numbers, one row per step."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dbojax.base import Metrics

Columns = Mapping[str, np.ndarray]
FLAG = "evaluated"


class History(dict[str, np.ndarray]):
    """Columns of one length, one row per step; a dictionary of NumPy arrays.

    ``step`` counts from 1. The columns of ``Metrics`` come next, then the cumulative
    counts, exact int64: ``message_bytes`` (what one node has handed to one link),
    ``down_bytes`` (what a server has handed to one worker), ``total_bytes`` (over all
    directed links), ``rounds``, and ``gradients`` and ``products`` of one node.
    ``seconds`` is the time in the compiled program, cumulative, read at the end of a
    chunk with the device blocked and spread evenly over the chunk's steps; compiling,
    ``evaluate``, reading batches on the host and writing checkpoints are not in it. The
    columns of ``evaluate`` are NaN in rows at which it did not run; ``evaluated`` says
    at which it did. Likewise the columns of ``Metrics`` in steps that ``measure`` left
    out.

    Args:
        columns: the arrays, by name.
        compile_seconds: what tracing and compiling cost.

    Examples:
        >>> h = History({"step": np.arange(1, 4), "loss": np.array([3.0, 2.0, 1.0])})
        >>> h["loss"][-1] < h["loss"][0]
        np.True_
    """

    def __init__(self, columns: Columns, compile_seconds: float = 0.0):
        super().__init__(columns)
        self.compile_seconds = compile_seconds

    def evaluated(self) -> History:
        """The rows at which ``evaluate`` ran.

        Examples:
            >>> h = History(
            ...     {
            ...         "step": np.array([1, 2]),
            ...         "score": np.array([np.nan, 0.5]),
            ...         "evaluated": np.array([False, True]),
            ...     }
            ... )
            >>> h.evaluated()["step"].tolist()
            [2]
        """
        rows = self.get(FLAG, np.zeros(len(self["step"]), bool))
        return History({k: v[rows] for k, v in self.items()}, self.compile_seconds)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write one line per step; numbers read back to the same bits.

        A column with further axes, e.g. of runs, is written as ``name[0]``,
        ``name[1]`` and so on.
        """
        flat = _flat(self)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(flat)
            # The writer prints Python floats by repr, which round-trips.
            writer.writerows(zip(*(c.tolist() for c in flat.values()), strict=True))

    def to_jsonl(self, path: str | os.PathLike) -> None:
        """Write one JSON object per step; null where a number is not finite."""
        lists = {name: _nulled(column).tolist() for name, column in self.items()}
        with open(path, "w", encoding="utf-8") as file:
            for row in zip(*lists.values(), strict=True):
                file.write(json.dumps(dict(zip(lists, row, strict=True))) + "\n")


def _nulled(column: np.ndarray) -> np.ndarray:
    nulled = column.astype(object)
    nulled[~np.isfinite(column)] = None
    return nulled


def _flat(columns: Columns) -> dict[str, np.ndarray]:
    flat = {}
    for name, column in columns.items():
        for index in np.ndindex(column.shape[1:]):
            suffix = "".join(f"[{i}]" for i in index)
            flat[name + suffix] = column[(slice(None), *index)]
    return flat


class Chunk(NamedTuple):
    """What one chunk of steps left behind."""

    metrics: Metrics  # leaves (steps, ...)
    seconds: float
    scores: Columns | None = None  # what `evaluate` returned at its end
    measured: np.ndarray | None = None  # (steps,), where metrics are; None: everywhere

    @property
    def length(self) -> int:
        """Number of steps."""
        return len(self.metrics.upper)


def quantities(metrics: Metrics) -> dict[str, np.ndarray]:
    """The measured leaves, (steps, ...) in float64, e.g. under ``consensus.x``."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(metrics)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf, float)
        for path, leaf in pairs
    }


def columns(chunks: Sequence[Chunk], before: Columns) -> dict[str, np.ndarray]:
    """The columns of all steps; ``before`` are those of earlier chunks, or empty."""
    if not chunks:
        return dict(before)
    metrics = _concatenated([chunk.metrics for chunk in chunks])
    lengths = [chunk.length for chunk in chunks]
    taken = [_taken(chunk) for chunk in chunks]
    measured = _masked(quantities(metrics), np.concatenate(taken))
    count = np.arange(1, sum(lengths) + 1)
    base = {name: column[-1] for name, column in before.items()}
    totals = {name: count * each for name, each in per_step(metrics).items()}
    each = [chunk.seconds / chunk.length for chunk in chunks]
    totals["seconds"] = np.repeat(each, lengths).cumsum()
    part = {
        "step": base.get("step", 0) + count,
        **{name.replace(".", "_"): column for name, column in measured.items()},
        **{name: base.get(name, 0) + column for name, column in totals.items()},
    }
    part |= _scores(chunks, np.cumsum(lengths) - 1)
    return joined([before, part]) if before else part


def _taken(chunk: Chunk) -> np.ndarray:
    return np.ones(chunk.length, bool) if chunk.measured is None else chunk.measured


def _masked(columns: Columns, taken: np.ndarray) -> dict[str, np.ndarray]:
    """NaN in the rows that were not taken."""

    def masked(column):
        rows = taken.reshape((-1,) + (1,) * (column.ndim - 1))
        return np.where(rows, column, np.nan)

    return {name: masked(column) for name, column in columns.items()}


def per_step(metrics: Metrics) -> dict[str, int]:
    """The exact counts of one step."""
    return {
        "message_bytes": metrics.traffic.message,
        "down_bytes": metrics.traffic.down,
        "total_bytes": metrics.traffic.total,
        "rounds": metrics.traffic.rounds,
        "gradients": metrics.calls.gradients,
        "products": metrics.calls.products,
    }


def _concatenated(metrics: Sequence[Metrics]) -> Metrics:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *metrics)


def scored(chunk: Chunk, scores: Mapping[str, Any], before: Mapping[str, Any]) -> Chunk:
    """Add what ``evaluate`` returned; ``before`` has the scores of earlier chunks.

    Raises:
        TypeError: if a name is no string.
        ValueError: if a score would hide a column of the run, or changes its shape.
    """
    for name in scores:
        if not isinstance(name, str):
            raise TypeError(
                f"`evaluate` must name its scores by strings, got {name!r}. Write "
                f'e.g. `"score_{name}"`.'
            )
    values = {name: np.array(score, float) for name, score in scores.items()}
    measured = (name.replace(".", "_") for name in quantities(chunk.metrics))
    taken = {"step", "seconds", FLAG, *measured, *per_step(chunk.metrics)}
    hidden = sorted(taken & set(values))
    if hidden:
        raise ValueError(
            f"`evaluate` must not name a score like a column of the run; got {hidden}. "
            f"Rename it, e.g. to {'test_' + hidden[0]!r}."
        )
    for name, value in values.items():
        if name in before and np.shape(before[name]) != value.shape:
            raise ValueError(
                f"The score {name!r} of `evaluate` must keep its shape, "
                f"{np.shape(before[name])}; got {value.shape}."
            )
    return chunk._replace(scores=values)


def _scores(chunks: Sequence[Chunk], ends) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for chunk, end in zip(chunks, ends, strict=True):
        if chunk.scores is None:
            continue
        found.setdefault(FLAG, np.zeros(ends[-1] + 1, bool))[end] = True
        for name, value in chunk.scores.items():
            blank = np.full((ends[-1] + 1, *value.shape), np.nan)
            found.setdefault(name, blank)[end] = value
    return found


def joined(parts: Iterable[Columns]) -> dict[str, np.ndarray]:
    """One set of columns from those of the chunks; NaN where a chunk lacks one."""
    parts = list(parts)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _column(parts, name) for name in names}


def _column(parts, name) -> np.ndarray:
    like = next(part[name] for part in parts if name in part)
    blank = False if like.dtype == bool else np.nan

    def piece(part):
        if name in part:
            return part[name]
        return np.full((len(part["step"]), *like.shape[1:]), blank)

    return np.concatenate([piece(part) for part in parts])
