"""CIFAR-10 and CIFAR-100 from the folders in which they are published."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbojax.tasks.data import Dataset

_SHAPE = 3, 32, 32  # of an image in a file: channels first
_PIXELS = math.prod(_SHAPE)


class _Layout(NamedTuple):
    """How one of the four folders is laid out."""

    name: str
    train: tuple[str, ...]
    test: str
    labels: dict[str, int]  # kinds of labels, in their order, and how many classes each
    pickled: bool


_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
_TEN, _HUNDRED = {"labels": 10}, {"coarse_labels": 20, "fine_labels": 100}
_LAYOUTS = (
    _Layout(
        "cifar10", tuple(f"{b}.bin" for b in _BATCHES), "test_batch.bin", _TEN, False
    ),
    _Layout("cifar10", _BATCHES, "test_batch", _TEN, True),
    _Layout("cifar100", ("train.bin",), "test.bin", _HUNDRED, False),
    _Layout("cifar100", ("train",), "test", _HUNDRED, True),
)


class _Stand:
    """Stands in for a NumPy object of a pickle and keeps what it is told."""

    arguments: tuple = ()
    state: Any = None

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


def _encoded(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


# What arrays are made of. None of NumPy's own code sees what the file says: the array
# is built afterwards, from the shape and the bytes.
_ADMITTED: dict[tuple[str, str], Callable] = {
    ("numpy.core.multiarray", "_reconstruct"): _Stand,
    ("numpy._core.multiarray", "_reconstruct"): _Stand,
    ("numpy", "ndarray"): _Stand,
    ("numpy", "dtype"): _Stand,
    ("_codecs", "encode"): _encoded,  # bytes, as Python 3 writes them for Python 2
}


class _Restricted(pickle.Unpickler):
    """Reads numbers, strings, containers and arrays; a pickle may ask for no more."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for `{module}.{name}`")
        return _ADMITTED[module, name]


def _unpickled(path) -> dict:
    try:
        with path.open("rb") as file:
            found = _Restricted(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(
            f"`{path}` is not a pickle of CIFAR, which holds arrays, numbers, strings "
            f"and containers of them and nothing else: {error}. Nothing of it was run. "
            "Fetch the file again from where CIFAR is published."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"`{path}` holds a {type(found).__name__} where CIFAR has a dictionary."
        )
    return {
        key.decode("latin1") if isinstance(key, bytes) else key: value
        for key, value in found.items()
    }


def _bytes_of(stand, path) -> np.ndarray:
    """The array of unsigned bytes, rows of pixels, that a stand-in describes."""
    state = stand.state if isinstance(stand, _Stand) else None
    if isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, raw = state
        kind = dtype.arguments[:1] if isinstance(dtype, _Stand) else ()
        plain = kind in (("u1",), (b"u1",)) and not fortran and isinstance(raw, bytes)
        if plain and shape == (len(raw) / _PIXELS, _PIXELS):
            return np.frombuffer(raw, np.uint8).reshape(shape)
    raise ValueError(
        f"`{path}` needs an array `data` of unsigned bytes with {_PIXELS} in a row, as "
        "CIFAR has it."
    )


def _from_pickle(path, kinds) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    found = _unpickled(path)
    missing = {"data", *kinds} - set(found)
    if missing:
        raise ValueError(f"`{path}` has no {sorted(missing)}; CIFAR has.")
    images = _bytes_of(found["data"], path)
    labels = {}
    for kind in kinds:
        numbers = found[kind]
        if not isinstance(numbers, list) or {type(k) for k in numbers} - {int}:
            raise ValueError(f"`{path}` needs a list of whole numbers as `{kind}`.")
        if len(numbers) != len(images):
            raise ValueError(
                f"`{path}` has {len(images)} images and {len(numbers)} `{kind}`: every "
                "image has one."
            )
        labels[kind] = np.array(numbers, object)
    return images, labels


def _from_rows(path, kinds) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    width = len(kinds) + _PIXELS
    if raw.size % width:
        raise ValueError(
            f"`{path}` holds {raw.size} bytes, which is no multiple of {width}: a row "
            f"is {len(kinds)} label byte(s) and {_PIXELS} pixels. Fetch the file again."
        )
    rows = raw.reshape(-1, width)
    return rows[:, len(kinds) :], {kind: rows[:, k] for k, kind in enumerate(kinds)}


def _read(path, layout, kind) -> tuple[np.ndarray, np.ndarray]:
    read = _from_pickle if layout.pickled else _from_rows
    images, labels = read(path, layout.labels)
    if not len(images):
        raise ValueError(f"`{path}` holds no images.")
    classes, chosen = layout.labels[kind], labels[kind]
    low, high = chosen.min(), chosen.max()
    if low < 0 or high >= classes:
        raise ValueError(
            f"`{path}` has `{kind}` from {low} to {high}; {classes} classes are "
            f"numbered from 0 to {classes - 1}."
        )
    # From (channel, row, column) to (row, column, channel).
    images = images.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1).reshape(-1, _PIXELS)
    return images.astype(np.float32), chosen.astype(np.int32)


def _layout(folder) -> _Layout:
    for layout in _LAYOUTS:
        files = (*layout.train, layout.test)
        missing = [name for name in files if not (folder / name).is_file()]
        if not missing:
            return layout
        if len(missing) < len(files):
            raise FileNotFoundError(
                f"`{folder}` looks like {layout.name}, but has no {missing}."
            )
    raise FileNotFoundError(
        f"`{folder}` is no folder of CIFAR. Pass one of `cifar-10-batches-bin`, "
        "`cifar-100-binary`, `cifar-10-batches-py` and `cifar-100-python`, unpacked "
        "from the archives of that name."
    )


def cifar(path: str | Path, coarse: bool = False) -> tuple[Dataset, Dataset]:
    """Read CIFAR-10 or CIFAR-100, in the binary form or in that for Python.

    The files tell which one it is. Those for Python are pickles, which could run any
    code: here they may hold arrays, numbers, strings and containers of them, and a file
    that asks for anything else is refused before it runs.

    Args:
        path: the unpacked folder, ``cifar-10-batches-bin``, ``cifar-100-binary``,
            ``cifar-10-batches-py`` or ``cifar-100-python``.
        coarse: for CIFAR-100, the twenty groups and not the hundred classes.

    Returns:
        The training and the test set; inputs are the pixels, 0 to 255, as float32 rows
        in the order (row, column, colour): ``inputs.reshape(-1, 32, 32, 3)`` are
        images. Deal them out with ``data.distribute(train, test=test)``, which scales.

    Raises:
        FileNotFoundError: if the folder is none of CIFAR, or a file is missing.
        ValueError: if a file is malformed or holds more than data, a label is none of
            the classes, or coarse labels of CIFAR-10 are asked for.

    References:
        Krizhevsky (2009), Learning multiple layers of features from tiny images.
    """
    folder = Path(path)
    layout = _layout(folder)
    if coarse and layout.name == "cifar10":
        raise ValueError(
            f"`{folder}` is CIFAR-10, which has one kind of labels. Leave `coarse` out."
        )
    *_, finest = layout.labels
    kind = "coarse_labels" if coarse else finest

    def dataset(names):
        parts = [_read(folder / name, layout, kind) for name in names]
        images, labels = (np.concatenate(a) for a in zip(*parts, strict=True))
        return Dataset(images, labels, layout.labels[kind], layout.name)

    return dataset(layout.train), dataset((layout.test,))
