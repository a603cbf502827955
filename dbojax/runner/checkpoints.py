"""Checkpoints: one file, written atomically, read whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Tree

_DIGEST = 64  # hexadecimal digits of sha256


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
) -> None:
    """Write a tree to one file, so that the file is always the old or the new one.

    The file is an ``.npz`` archive without pickles. Keys are kept as key data and
    bfloat16 and its like as bit patterns; a sha256 of all that precedes it ends the
    file.

    Args:
        path: where to; its folder must exist.
        tree: arrays, typed random keys included.
        meta: whatever JSON can hold.
        columns: further arrays by name, whose shapes may change from save to save.

    Raises:
        ValueError: if a leaf is spread over several processes, or is no array.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.npz"
        >>> tree = {"x": jnp.ones(2, jnp.bfloat16), "key": jax.random.key(3)}
        >>> save(path, tree, {"step": 5})
        >>> saved = load(path, like=tree)
        >>> saved.tree["x"].dtype.name, saved.meta["step"]
        ('bfloat16', 5)
    """
    pairs = _named(tree)
    table = [[name, *_form(leaf)] for name, leaf in pairs]
    head = json.dumps({"meta": dict(meta or {}), "leaves": table})
    arrays = {f"leaf_{i}": _bits(leaf) for i, (_, leaf) in enumerate(pairs)}
    arrays |= {f"column_{name}": array for name, array in (columns or {}).items()}
    arrays["head"] = np.frombuffer(head.encode(), np.uint8)
    _replace(Path(path), lambda file: _write(file, arrays))


def load(path: str | os.PathLike, like: Tree) -> Saved:
    """Read what :func:`save` wrote, or refuse.

    Args:
        path: the file.
        like: a tree of the structure, shapes, dtypes and placement to expect.

    Returns:
        The tree, with the leaves placed like those of ``like``; meta; columns.

    Raises:
        ValueError: if the file is damaged or holds something else than ``like``.

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
    arrays = _read(path)
    head = json.loads(arrays.pop("head").tobytes())
    pairs = _named(like)
    _check_leaves(path, head["leaves"], [[name, *_form(leaf)] for name, leaf in pairs])
    leaves = [_unbits(arrays[f"leaf_{i}"], leaf) for i, (_, leaf) in enumerate(pairs)]
    tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
    columns = {
        name.removeprefix("column_"): array
        for name, array in arrays.items()
        if name.startswith("column_")
    }
    return Saved(tree, head["meta"], columns)


def digest(tree: Tree) -> str:
    """A sha256 over names, dtypes, shapes and bits of all leaves."""
    total = hashlib.sha256()
    for name, leaf in _named(tree):
        total.update(json.dumps([name, *_form(leaf)]).encode())
        total.update(np.ascontiguousarray(_bits(leaf)).data)
    return total.hexdigest()


def _named(tree: Tree) -> list[tuple[str, Any]]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [("state" + jax.tree_util.keystr(path), leaf) for path, leaf in pairs]


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _form(leaf) -> tuple[str, list[int]]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return str(leaf.dtype), list(leaf.shape)


def _bits(leaf) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            "A checkpoint needs arrays that one process can read, but an array of "
            f"shape {leaf.shape} is spread over several. Gather it first, e.g. with "
            "`jax.experimental.multihost_utils.process_allgather`."
        )
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    if array.dtype.hasobject:
        raise ValueError(
            f"A checkpoint holds arrays of numbers, got {leaf!r}. Take it out of the "
            "tree, or put it into `meta`."
        )
    native = array.dtype.isbuiltin == 1
    return array if native else array.view(f"u{array.dtype.itemsize}")


def _unbits(array: np.ndarray, like) -> jax.Array:
    if isinstance(like, jax.Array) and _is_key(like):
        leaf = jax.random.wrap_key_data(
            jnp.asarray(array), impl=jax.random.key_impl(like)
        )
    else:
        leaf = jnp.array(array.view(np.dtype(_form(like)[0])))
    placed = isinstance(like, jax.Array) and like.committed
    return jax.device_put(leaf, like.sharding) if placed else leaf


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


def _write(file: io.BufferedRandom, arrays: dict[str, np.ndarray]) -> None:
    # The digest is the archive's comment, so that any reader of .npz reads the file.
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    file.seek(-2, os.SEEK_END)
    file.write(_DIGEST.to_bytes(2, "little"))
    file.seek(0)
    total = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(total.encode())


def _read(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    body, total = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(body).hexdigest().encode() != total:
        raise ValueError(
            f"The checkpoint {path} is damaged or no checkpoint: its {len(content)} "
            "bytes do not match their checksum, and nothing was read. Restore a copy, "
            "or delete the file to start afresh."
        )
    return dict(np.load(io.BytesIO(content), allow_pickle=False))


def _replace(path: Path, write) -> None:
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _remove_stale(path: Path) -> None:
    # A killed process leaves one; the length of the token keeps other files safe.
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.tmp")
    for other in path.parent.iterdir():
        if pattern.fullmatch(other.name):
            with contextlib.suppress(OSError):
                other.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
