"""Checkpoints: written atomically, read whole or not at all, by any processes."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dbojax.base import Tree
from dbojax.runner import files, pieces
from dbojax.runner.peers import Peers, peers_of, together
from dbojax.runner.pieces import digest as digest

_DIGEST = 64  # hexadecimal digits of sha256
_HASH_WORDS = 8


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


class DamagedWarning(RuntimeWarning):
    """A run goes on from the older checkpoint: the newer one is damaged, or gone."""


class Saved(NamedTuple):
    """What a checkpoint held."""

    tree: Tree
    meta: dict[str, Any]
    columns: dict[str, np.ndarray]


def save(
    path: str | os.PathLike,
    tree: Tree,
    meta: Mapping[str, Any] | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
    peers: Peers | None = None,
) -> None:
    """Write a tree, so that a complete checkpoint is there at any moment.

    The file is an ``.npz`` archive without pickles. Keys are kept as key data and
    bfloat16 and its like as bit patterns; a sha256 of all that precedes it ends the
    file. What was at ``path`` before is kept as ``path + ".previous"``.

    Where the arrays are spread over several processes, all of them must call this,
    with one ``path`` in a folder that all share. Each writes what its devices hold into
    a part beside ``path``, copies once only; when all parts are on the disk, the first
    process writes the file that lists them with their sha256, and removes the parts
    that neither it nor the previous one lists. Nothing is gathered. A copy beside
    ``path`` would lose its parts that way: to keep a checkpoint, copy the file and its
    parts, ``path + ".*"``, into another folder, under the same names.

    Args:
        path: where to; its folder must exist.
        tree: arrays, typed random keys included.
        meta: whatever JSON can hold.
        columns: further arrays by name, whose shapes may change from save to save.
        peers: the processes that take part; found from the arrays.

    Raises:
        ValueError: if a leaf is no array.
        OSError: in all processes if one of them could not write.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.npz"
        >>> tree = {"x": jnp.ones(2, jnp.bfloat16), "key": jax.random.key(3)}
        >>> save(path, tree, {"step": 5})
        >>> saved = load(path, like=tree)
        >>> saved.tree["x"].dtype.name, saved.meta["step"]
        ('bfloat16', 5)
    """
    path, meta = Path(path), dict(meta or {})
    peers = peers_of(tree) if peers is None else peers
    pairs = pieces.named(tree)
    head = {
        "meta": meta,
        "leaves": [[name, *pieces.form(leaf)] for name, leaf in pairs],
    }
    arrays = {f"column_{name}": array for name, array in (columns or {}).items()}
    values = [pieces.numbers(leaf) for _, leaf in pairs]
    if peers.size == 1:
        arrays |= {f"leaf_{i}": pieces.bits(array) for i, array in enumerate(values)}
        _commit(path, head, arrays)
    else:
        _save_parts(path, head, arrays, values, peers)


def _commit(path: Path, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    files.remove_stale(path)
    text = np.frombuffer(json.dumps(head).encode(), np.uint8)
    files.commit(path, lambda file: _write(file, {**arrays, "head": text}))
    if parts := files.parts(path):
        # Whatever cannot be read here may still be of use to somebody: keep all then.
        with contextlib.suppress(Exception):
            files.remove(path.parent, parts - _parts_in_use(path))


def _parts_in_use(path: Path) -> set[str]:
    used = set()
    for generation in (path, files.previous(path)):
        if generation.exists():
            with np.load(generation, allow_pickle=False) as archive:
                used |= {name for name, _ in _head(archive).get("parts", ())}
    return used


def _head(archive) -> dict[str, Any]:
    return json.loads(archive["head"].tobytes())


def _write(file: io.BufferedRandom, arrays: dict[str, np.ndarray]) -> None:
    # The digest is the archive's comment, so that any reader of .npz reads the file.
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    file.seek(-2, os.SEEK_END)
    file.write(_DIGEST.to_bytes(2, "little"))
    total = files.digest(file)
    file.seek(0, os.SEEK_END)
    file.write(total.encode())


def _save_parts(path: Path, head, arrays, values, peers: Peers) -> None:
    step = int(head["meta"].get("step", 0))

    def write():
        total = _write_part(path, step, values, peers)
        return np.frombuffer(bytes.fromhex(total), np.uint32)

    told = together(peers, f"write its part of the checkpoint {path}", write)
    totals = [words.tobytes().hex() for words in told[:, :_HASH_WORDS]]
    head["parts"] = [
        [files.part_name(path, step, rank, peers.size, total), total]
        for rank, total in enumerate(totals)
    ]
    head["pieces"] = [pieces.pieces(array, peers) for array in values]

    def commit():
        if peers.rank == 0:
            _check_shared(path, head["parts"])
            _commit(path, head, arrays)
        return ()

    together(peers, f"write the checkpoint {path}", commit)


def _write_part(path: Path, step: int, values, peers: Peers) -> str:
    arrays = {
        f"leaf_{i}_{j}": pieces.bits(held)
        for i, array in enumerate(values)
        for j, (_, held) in enumerate(pieces.kept(array, peers))
    }
    total = []

    def write(file):
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        total.append(files.digest(file))

    with files.temporary(path, write) as new:
        name = files.part_name(path, step, peers.rank, peers.size, total[0])
        os.replace(new, path.with_name(name))
    files.sync_folder(path.parent)
    return total[0]


def _check_shared(path: Path, parts) -> None:
    for rank, (name, _) in enumerate(parts):
        if not path.with_name(name).exists():
            raise OSError(
                f"Process 0 does not see {name}, which process {rank} wrote beside "
                f"{path}. The checkpoint of several processes needs a folder that all "
                "of them share: pass a path in one."
            )


def load(path: str | os.PathLike, like: Tree) -> Saved:
    """Read what :func:`save` wrote, or refuse.

    It may have been written by another number of processes, from other devices. Where
    ``like`` is spread over several processes, each reads what its devices need.

    Args:
        path: the file.
        like: a tree of the structure, shapes, dtypes and placement to expect.

    Returns:
        The tree, with the leaves placed like those of ``like``; meta; columns.

    Raises:
        DamagedError: a ValueError, if the file or a part of it is damaged.
        ValueError: if it holds something else than ``like``.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.npz"
        >>> save(path, jnp.ones(3))
        >>> load(path, like=jnp.ones(4))
        Traceback (most recent call last):
        ...
        ValueError: ...holds `state` as float64 (3,), expected float64 (4,)...
    """
    path = Path(path)
    pairs = pieces.named(like)
    with contextlib.ExitStack() as stack:
        archive = _opened(stack, path)
        head = _head(archive)
        wanted = [[name, *pieces.form(leaf)] for name, leaf in pairs]
        _check_leaves(path, head["leaves"], wanted)
        source = _source(stack, path, archive, head)
        leaves = [pieces.build(leaf, source(i)) for i, (_, leaf) in enumerate(pairs)]
        columns = {
            name.removeprefix("column_"): archive[name]
            for name in archive.files
            if name.startswith("column_")
        }
    tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Saved(tree, head["meta"], columns)


def _opened(stack: contextlib.ExitStack, path: Path):
    """An archive whose bytes match the checksum at their end."""
    file = stack.enter_context(path.open("rb"))
    length = file.seek(0, os.SEEK_END)
    found = files.digest(file, max(0, length - _DIGEST))
    if found.encode() != file.read():
        raise DamagedError(
            f"The checkpoint {path} is damaged or no checkpoint: its {length} bytes do "
            "not match their checksum, and nothing was read. Restore a copy, or "
            f"{files.afresh(path)}."
        )
    return _archive(stack, file)


def _archive(stack: contextlib.ExitStack, file):
    file.seek(0)
    return stack.enter_context(np.load(file, allow_pickle=False))


def _source(stack: contextlib.ExitStack, path: Path, archive, head):
    """Where ``build`` finds each leaf: source(i)(box) -> the values in the box."""
    if "parts" not in head:
        return functools.partial(_whole, archive)
    part = functools.cache(lambda rank: _part(stack, path, *head["parts"][rank]))

    def source(i):
        boxes = [tuple(map(tuple, box)) for box, _ in head["pieces"][i]]
        ranks = [rank for _, rank in head["pieces"][i]]

        @functools.cache
        def read(number):
            rank = ranks[number]
            return part(rank)[f"leaf_{i}_{ranks[:number].count(rank)}"]

        return lambda box: pieces.joined(box, boxes, read)

    return source


def _whole(archive, i: int):
    read = functools.cache(lambda: archive[f"leaf_{i}"])
    return lambda box: read()[pieces.slices(box)]


def _part(stack: contextlib.ExitStack, path: Path, name: str, total: str):
    try:
        file = stack.enter_context(path.with_name(name).open("rb"))
    except FileNotFoundError as error:
        raise DamagedError(
            f"The checkpoint {path} is damaged: its part {name} is missing. Put it "
            f"back beside it, or {files.afresh(path)}."
        ) from error
    if files.digest(file) != total:
        raise DamagedError(
            f"The checkpoint {path} is damaged: the bytes of its part {name} do not "
            f"match their checksum. Restore a copy, or {files.afresh(path)}."
        )
    return _archive(stack, file)


def _check_leaves(path: Path, found: list, wanted: list) -> None:
    for got, want in itertools.zip_longest(found, wanted):
        if got == want:
            continue
        if got is None:
            text = f"lacks `{want[0]}`"
        elif want is None:
            text = f"holds `{got[0]}`, which the state of this run lacks"
        elif got[0] != want[0]:
            text = f"holds `{got[0]}` where this run has `{want[0]}`"
        else:
            text = f"holds `{got[0]}` as {_show(got)}, expected {_show(want)}"
        raise ValueError(
            f"The checkpoint {path} belongs to another run: it {text}. Pass another "
            "`checkpoint`, or the method and start that wrote this one."
        )


def _show(entry) -> str:
    _, dtype, shape = entry
    return f"{dtype} {tuple(shape)}"
