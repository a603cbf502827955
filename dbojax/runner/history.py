"""What a run remembers: columns of numbers, one row per step."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dbojax.base import Metrics

Columns = Mapping[str, np.ndarray]
FLAG = "evaluated"


class History(dict[str, np.ndarray]):
    """Columns of one length, one row per step; a dictionary of NumPy arrays.

    ``step`` counts from 1. The columns of ``Metrics`` come next, then the cumulative
    counts, exact int64: ``message_bytes`` (what one node has handed to one link),
    ``total_bytes`` (over all directed links), ``rounds``, and ``gradients`` and
    ``products`` of one node. ``seconds`` is the time in the compiled program,
    cumulative, read at the end of a chunk with the device blocked and spread evenly
    over the chunk's steps; compiling, ``evaluate``, reading batches on the host and
    writing checkpoints are not in it. The columns of ``evaluate`` are NaN in rows at
    which it did not run; ``evaluated`` says at which it did.

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
        """Write one JSON object per step; NaN and infinities as Python spells them."""
        lists = {name: column.tolist() for name, column in self.items()}
        with open(path, "w", encoding="utf-8") as file:
            for row in zip(*lists.values(), strict=True):
                file.write(json.dumps(dict(zip(lists, row, strict=True))) + "\n")


def _flat(columns: Columns) -> dict[str, np.ndarray]:
    flat = {}
    for name, column in columns.items():
        for index in np.ndindex(column.shape[1:]):
            suffix = "".join(f"[{i}]" for i in index)
            flat[name + suffix] = column[(slice(None), *index)]
    return flat


def quantities(metrics: Metrics) -> dict[str, np.ndarray]:
    """The measured leaves, (steps, ...) in float64, e.g. under ``consensus.x``."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(metrics)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf, float)
        for path, leaf in pairs
    }


def rows(
    measured: Columns, metrics: Metrics, first: int, seconds: float, last: Columns
) -> dict[str, Any]:
    """The columns of one chunk: ``first`` steps went before, ``last`` ended them."""
    length = len(next(iter(measured.values())))
    count = np.arange(1, length + 1)
    per_step = {
        "message_bytes": metrics.traffic.message,
        "total_bytes": metrics.traffic.total,
        "rounds": metrics.traffic.rounds,
        "gradients": metrics.calls.gradients,
        "products": metrics.calls.products,
        "seconds": seconds / length,
    }
    before = {name: last[name][-1] if last else 0 for name in per_step}
    return {
        "step": first + count,
        **{name.replace(".", "_"): column for name, column in measured.items()},
        **{name: before[name] + count * each for name, each in per_step.items()},
    }


def scored(part: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Put what ``evaluate`` returned into the last row of a chunk.

    Raises:
        ValueError: if a score would hide a column of the run.
    """
    taken = sorted({*part, FLAG} & set(scores))
    if taken:
        raise ValueError(
            f"`evaluate` must not name a score like a column of the run; got {taken}. "
            f"Rename it, e.g. to {'test_' + taken[0]!r}."
        )
    ends = np.arange(len(part["step"])) == len(part["step"]) - 1
    columns = {}
    for name, score in scores.items():
        value = np.asarray(score, float)
        columns[name] = np.full((len(ends), *value.shape), np.nan)
        columns[name][-1] = value
    return {**part, FLAG: ends, **columns}


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
