"""Going on from a checkpoint: which run it belongs to, and which one is intact."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dbojax.base import State
from dbojax.runner import checkpoints, feeds, files, history
from dbojax.runner.checkpoints import DamagedError, DamagedWarning, Saved
from dbojax.runner.peers import Peers

_ABSENT, _INTACT, _DAMAGED, _FOREIGN, _UNREAD = range(5)


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
    error: ValueError | OSError | None = None


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
    if peers.size == 1 < jax.process_count():
        _check_own(path)
    start = checkpoints.digest(state, peers)
    meta = {"key": checkpoints.digest(key), "start": start, "every": every}
    return File(path, meta, peers)


def _check_own(path: Path) -> None:
    # Nobody can be asked: the others may be in no run, or in another one. But no two
    # processes have one number, so that no two of them get past this with one file.
    index = jax.process_index()
    if [int(number) for number in re.findall(r"\d+", path.stem)][-1:] != [index]:
        raise ValueError(
            f"The state is this process's alone, one of {jax.process_count()}, and the "
            f"others could write to the same `checkpoint`, {path}. Place the state on "
            "a mesh of all with `dbo.devices.place`; or, if each has a run of its own, "
            f"end the name with `jax.process_index()`, e.g. "
            f"{path.with_stem(f'{path.stem}-{index}')}."
        )


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
        if older.saved is not None and file.peers.rank == 0:
            warnings.warn(
                f"The checkpoint {newest.path} is gone: the run goes on from the older "
                f"one, {older.path}, at step {older.saved.meta['step']}; to start "
                "afresh, delete that too.",
                DamagedWarning,
                stacklevel=4,
            )
        return older
    return _older(file, newest, older, resume)


def _refused(file: File) -> _Found:
    paths = [file.path, files.previous(file.path)]
    there = file.peers.gather(np.array([path.exists() for path in paths], np.uint32))
    for path, exists in zip(paths, np.any(there, axis=0).tolist(), strict=False):
        if exists:
            raise ValueError(
                f"The checkpoint {path} exists and would be overwritten. Pass "
                "`resume=True` to go on from it, or another path, or "
                f"{files.afresh(path)}."
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
            f"{newest.error or _not_mine(newest)}"
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
    if worst == _UNREAD:
        raise mine.error or _unread(path, "another process met an error")
    if worst in (_DAMAGED, _FOREIGN):
        return mine if mine.kind == worst else _Found(path, worst)
    if len(np.unique(kinds)) > 1 or len(np.unique(steps)) > 1:
        raise ValueError(
            f"The processes of this run see different checkpoints at {path}: they need "
            "a folder that all of them share. Pass a path in one."
        )
    return mine


def _read(file: File, path: Path, state: State) -> _Found:
    try:
        saved = checkpoints.load(path, like=state)
        _check_same(path, file.meta, saved.meta)
    except FileNotFoundError:
        return _Found(path, _ABSENT)
    except DamagedError as error:
        return _Found(path, _DAMAGED, error=error)
    except ValueError as error:
        return _Found(path, _FOREIGN, error=error)
    except OSError as error:
        # The disk or the network says nothing of what was written: replace nothing.
        return _Found(path, _UNREAD, error=_unread(path, str(error)))
    return _Found(path, _INTACT, saved)


def _unread(path: Path, why: str) -> OSError:
    return OSError(
        f"The checkpoint {path} could not be read: {why}. Nothing was changed: start "
        "again when it can be."
    )


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
            argument = "state" if name == "start" else name
            raise ValueError(
                f"The checkpoint {path} belongs to another run: {text}. Pass "
                f"the same `{argument}`, or another `checkpoint`."
            )
