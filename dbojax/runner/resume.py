"""Going on from a checkpoint: which run it belongs to, and which one is intact."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbojax.base import State
from dbojax.runner import checkpoints, feeds, files, history
from dbojax.runner.checkpoints import DamagedError, DamagedWarning, Saved
from dbojax.runner.peers import Peers

_ABSENT, _INTACT, _DAMAGED, _FOREIGN = range(4)


class File(NamedTuple):
    """A checkpoint, and what tells its run from others."""

    path: Path
    meta: dict[str, Any]
    peers: Peers

    def save(self, state: State, done: int, columns: history.Columns) -> None:
        """Write the next generation."""
        meta = {**self.meta, "step": done}
        checkpoints.save(self.path, state, meta, columns, self.peers)


class _Found(NamedTuple):
    """One generation, as all processes see it."""

    path: Path
    kind: int
    saved: Saved | None = None
    error: ValueError | None = None


def file_of(checkpoint, feed: feeds.Feed, key, state, every: int, peers: Peers):
    """The checkpoint of a run, or None.

    Raises:
        ValueError: if there cannot be one.
    """
    if checkpoint is None:
        return None
    if not feed.replayable:
        raise ValueError(
            "A run with a `checkpoint` cannot take its batches from an iterator, "
            "which cannot be replayed from the middle. Pass `from_host(batch_at)`, "
            "or a sampler `(key, step) -> batch`."
        )
    path = Path(checkpoint)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"`checkpoint` must name a file in an existing folder, got {path}. "
            "Make the folder first."
        )
    start = checkpoints.digest(state, peers)
    meta = {"key": checkpoints.digest(key), "start": start, "every": int(every)}
    return File(path, meta, peers)


def begin(file: File | None, state: State, num_steps: int, resume: bool | str):
    """Steps done, state and columns to go on from."""
    if not (isinstance(resume, bool) or resume == "auto"):
        raise ValueError(f'`resume` must be True, False or "auto", got {resume!r}.')
    if file is None:
        return 0, state, {}
    found = _newest(file, state, resume)
    if found.saved is None:
        return 0, state, {}
    step = found.saved.meta["step"]
    if step > num_steps:
        raise ValueError(
            f"The checkpoint {found.path} is at step {step}, beyond "
            f"num_steps={num_steps}. Ask for at least as many steps, or pass another "
            "path."
        )
    return step, found.saved.tree, found.saved.columns


def _newest(file: File, state: State, resume: bool | str) -> _Found:
    if not resume:
        return _refused(file)
    newest = _look(file, file.path, state)
    if newest.kind == _FOREIGN:
        raise newest.error or _not_mine(newest)
    if newest.kind == _INTACT:
        return newest
    older = _look(file, files.previous(file.path), state)
    if newest.kind == _ABSENT:
        # Where hard links are unknown, a kill can leave the previous one alone.
        if older.kind in (_FOREIGN, _DAMAGED):
            raise older.error or _not_mine(older)
        return older
    return _older(file, newest, older, resume)


def _refused(file: File) -> _Found:
    paths = [file.path, files.previous(file.path)]
    there = file.peers.gather(np.array([path.exists() for path in paths], np.uint32))
    for path, exists in zip(paths, np.any(there, axis=0).tolist(), strict=False):
        if exists:
            raise ValueError(
                f"The checkpoint {path} exists and would be overwritten. Pass "
                "`resume=True` to go on from it, or another path, or delete it."
            )
    return _Found(file.path, _ABSENT)


def _older(file: File, newest: _Found, older: _Found, resume: bool | str) -> _Found:
    """What to do where the newer generation is damaged."""
    if older.kind == _FOREIGN:
        raise older.error or _not_mine(older)
    if resume != "auto":
        text = str(newest.error or _not_mine(newest))
        if older.saved is not None:
            text += (
                f" The older one, {older.path}, at step {older.saved.meta['step']}, is "
                'intact: pass `resume="auto"` to go on from it.'
            )
        raise DamagedError(text)
    if older.saved is None:
        also = f", and so is {older.path}" if older.kind == _DAMAGED else ""
        raise DamagedError(
            f"No checkpoint of this run is intact: {newest.path} is damaged{also}. "
            "Restore a copy, or delete what is left to start afresh."
        )
    if file.peers.rank == 0:
        # Else the next save would keep the damaged one in place of the intact one.
        os.replace(older.path, newest.path)
        files.sync_folder(newest.path.parent)
        warnings.warn(
            f"The checkpoint {newest.path} is damaged: the run goes on from the older "
            f"one, at step {older.saved.meta['step']}, which takes its place.",
            DamagedWarning,
            stacklevel=5,
        )
    return older


def _look(file: File, path: Path, state: State) -> _Found:
    """Read one generation; all processes take it for the same."""
    mine = _read(file, path, state)
    step = 0 if mine.saved is None else mine.saved.meta["step"]
    told = file.peers.gather(np.array([mine.kind, step], np.uint32))
    kinds, steps = told[:, 0], told[:, 1]
    worst = int(kinds.max())
    if worst in (_DAMAGED, _FOREIGN):
        return mine if mine.kind == worst else _Found(path, worst)
    if len(np.unique(kinds)) > 1 or len(np.unique(steps)) > 1:
        raise ValueError(
            f"The processes of this run see different checkpoints at {path}: they need "
            "a folder that all of them share. Pass a path in one."
        )
    return mine


def _read(file: File, path: Path, state: State) -> _Found:
    if not path.exists():
        return _Found(path, _ABSENT)
    try:
        saved = checkpoints.load(path, like=state)
        _check_same(path, file.meta, saved.meta)
    except DamagedError as error:
        return _Found(path, _DAMAGED, error=error)
    except ValueError as error:
        return _Found(path, _FOREIGN, error=error)
    except OSError as error:
        text = f"The checkpoint {path} is damaged or cannot be read: {error}."
        return _Found(path, _DAMAGED, error=DamagedError(text))
    return _Found(path, _INTACT, saved)


def _not_mine(found: _Found) -> ValueError:
    what = "is damaged" if found.kind == _DAMAGED else "belongs to another run"
    kind = DamagedError if found.kind == _DAMAGED else ValueError
    return kind(f"The checkpoint {found.path} {what}, as another process found.")


def _check_same(path: Path, wanted: dict[str, Any], meta: dict[str, Any]) -> None:
    texts = {
        "key": "its run had another `key`",
        "start": "its run had another start (the shapes agree, the values do not)",
        "every": f"its run had every={meta.get('every')}, this one has "
        f"every={wanted['every']}",
    }
    for name, text in texts.items():
        if meta.get(name) != wanted[name]:
            raise ValueError(
                f"The checkpoint {path} belongs to another run: {text}. Pass "
                f"the same `{name}`, or another `checkpoint`."
            )
