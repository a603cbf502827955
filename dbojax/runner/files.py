"""Files that are always the old or the new ones, whenever the process is killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_YOUNG = 3600  # seconds for which a temporary file may be another writer's
_PART = r"\.\d+\.part-\d{5}-of-\d{5}-[0-9a-f]{16}"


def previous(path: Path) -> Path:
    """Where the generation before the one at ``path`` is kept."""
    return path.with_name(path.name + ".previous")


def afresh(path: Path) -> str:
    """What to do to start afresh; ``path`` may be of either generation."""
    newest = path.with_name(path.name.removesuffix(".previous"))
    return f"delete {newest} and {previous(newest)} to start afresh"


def part_name(path: Path, step: int, rank: int, size: int, total: str) -> str:
    """The name of one process's part: another content, another name."""
    return f"{path.name}.{step}.part-{rank:05d}-of-{size:05d}-{total[:16]}"


def commit(path: Path, write: Callable[[Any], object]) -> None:
    """Write a new generation; the one at ``path`` becomes the previous one."""
    with temporary(path, write) as new:
        if path.exists():
            _keep(path)
        os.replace(new, path)
    sync_folder(path.parent)


def _keep(path: Path) -> None:
    # Two names for one file, then one rename: a complete generation at any moment.
    link = _temporary_name(path)
    try:
        os.link(path, link)
    except OSError:
        # No hard links here. Whoever looks for `path` now finds the previous one.
        os.replace(path, previous(path))
        return
    try:
        os.replace(link, previous(path))
    except BaseException:
        link.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def temporary(path: Path, write: Callable[[Any], object]):
    """A file beside ``path`` that is on the disk, and gone if it is not renamed."""
    name = _temporary_name(path)
    try:
        with open(name, "x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield name
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def remove_stale(path: Path) -> None:
    """Remove what killed writers left half written, an hour ago or earlier."""
    # The length of the token keeps files of other names safe.
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.tmp")
    found = (name for name in _names(path) if pattern.fullmatch(name))
    remove(path.parent, (name for name in found if _is_old(path.with_name(name))))


def _is_old(path: Path) -> bool:
    # Of a file that is gone by now, nothing has to be removed.
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > _YOUNG
    return False


def parts(path: Path) -> set[str]:
    """The names of all parts of all generations."""
    pattern = re.compile(re.escape(path.name) + _PART)
    return {name for name in _names(path) if pattern.fullmatch(name)}


def _names(path: Path) -> list[str]:
    return [other.name for other in path.parent.iterdir()]


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, those of others or already gone excepted."""
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a loss of power."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(file, length: int | None = None) -> str:
    """The sha256 of what an open file holds, or of its first ``length`` bytes."""
    file.seek(0)
    if length is None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        total.update(block)
        length -= len(block)
    return total.hexdigest()
