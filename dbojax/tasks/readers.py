"""Data sets from files: IDX folders, CIFAR folders and LIBSVM text."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from dbojax.tasks.cifar import cifar as cifar
from dbojax.tasks.data import Dataset, require

_UNSIGNED_BYTES = b"\x00\x00\x08"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _read(path):
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"`{path}` is not a whole gzip file: {error}.") from error


def _idx(path, axes):
    """One array of unsigned bytes: magic number, lengths, and the rows."""
    raw = _read(path) if path.suffix == ".gz" else path.read_bytes()
    start = 4 + 4 * axes
    if raw[:4] != _UNSIGNED_BYTES + bytes([axes]) or len(raw) < start:
        raise ValueError(
            f"`{path}` is not an IDX file of unsigned bytes with {axes} axes; it "
            f"starts with {raw[:4].hex(' ') or 'nothing'}."
        )
    shape = tuple(np.frombuffer(raw[4:start], ">u4").tolist())
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"`{path}` announces the shape {shape}, {math.prod(shape)} bytes, but "
            f"holds {len(raw) - start}. Fetch the file again."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _find(folder, part, kind):
    names = [
        f"{part}-{kind}{dot}ubyte{end}" for end in ("", ".gz") for dot in ("-", "_")
    ]
    names += [name.replace("-idx", ".idx") for name in names]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"`{folder}` has no `{names[0]}`, plain or with `.gz`. An IDX folder holds "
        "images and labels of the parts `train` and `t10k`."
    )


def idx_folder(path: str | Path, name: str | None = None) -> tuple[Dataset, Dataset]:
    """Read images and labels in the IDX format, the one of MNIST.

    The folder holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the
    same two with ``t10k``, plain or with ``.gz``.

    Args:
        path: the folder.
        name: of the data sets; the folder's by default.

    Returns:
        The training and the test set; inputs are the pixels, 0 to 255, as float32
        rows. Deal them out with ``data.distribute(train, test=test)``, which scales.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed, or images and labels do not match.
    """
    folder = Path(path)

    def read(part):
        images = _idx(_find(folder, part, "images-idx3"), 3)
        labels = _idx(_find(folder, part, "labels-idx1"), 1)
        if len(images) != len(labels) or not len(labels):
            raise ValueError(
                f"`{folder}` has {len(images)} images and {len(labels)} labels in its "
                f"part `{part}`: every image has one label."
            )
        return images.reshape(len(images), -1).astype(np.float32), labels

    parts = read("train"), read("t10k")
    widths = [images.shape[1] for images, _ in parts]
    if widths[0] != widths[1]:
        raise ValueError(
            f"`{folder}` has training images of {widths[0]} pixels and test images of "
            f"{widths[1]}."
        )
    classes = 1 + max(int(labels.max()) for _, labels in parts)
    train, test = (
        Dataset(images, labels.astype(np.int32), classes, name or folder.name)
        for images, labels in parts
    )
    return train, test


def fashion_mnist(path: str | Path | None = None) -> tuple[Dataset, Dataset]:
    """60 000 and 10 000 pictures of clothes in ten classes, 28 x 28 pixels.

    Args:
        path: the folder with the four IDX files; by default the place where Debian's
            package ``dataset-fashion-mnist`` puts them.

    Returns:
        The training and the test set, as :func:`idx_folder` reads them.

    Raises:
        FileNotFoundError: if the files are not there.
        ValueError: if a file is malformed.

    References:
        Xiao, Rasul and Vollgraf (2017), arXiv:1708.07747.
    """
    folder = FASHION_MNIST if path is None else Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder `{folder}` with Fashion-MNIST. Install the Debian "
            "package `dataset-fashion-mnist`, or pass the folder with the four IDX "
            "files as `fashion_mnist(path)`."
        )
    return idx_folder(folder, "fashion_mnist")


def libsvm(path: str | Path, d: int | None = None) -> Dataset:
    """Read a LIBSVM text file: a label and ``index:value`` pairs in each line.

    Indices count from one, or from zero in a file that has an index zero. Comments
    after ``#`` and ``qid`` pairs are skipped.

    Args:
        path: the file; ``.gz`` and ``.bz2`` are unpacked.
        d: features; by default the largest index, which may be too few in a file of
            test samples.

    Returns:
        A dense data set, its labels renumbered from 0 in increasing order: -1 and +1
        become 0 and 1.

    Raises:
        ValueError: if the file is malformed or empty, its labels are not integers, or
            it has more than ``d`` features.
        FileNotFoundError: if there is no such file.
    """
    load = require("sklearn.datasets", "A LIBSVM file").load_svmlight_file
    try:
        rows, labels = load(str(path))
    except (ValueError, OverflowError, EOFError, OSError, zlib.error) as error:
        # Without a number it is an archive's error, not one of the system.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"`{path}` is not a LIBSVM file, whose lines read "
            f"`label index:value index:value ...` with increasing indices: {error}"
        ) from error
    if not len(labels):
        raise ValueError(f"`{path}` holds no samples.")
    if not np.array_equal(labels, np.rint(labels)):
        raise ValueError(
            f"The labels of `{path}` name classes, so they are integers; got e.g. "
            f"{labels[labels != np.rint(labels)][0]}."
        )
    if not np.isfinite(rows.data).all():
        raise ValueError(f"`{path}` holds values that are not finite.")
    if d is not None and d < rows.shape[1]:
        raise ValueError(
            f"`{path}` has {rows.shape[1]} features, got d={d}. Write that number or a "
            "larger one."
        )
    rows.resize(len(labels), rows.shape[1] if d is None else d)
    classes, numbers = np.unique(labels, return_inverse=True)
    return Dataset(
        rows.toarray(), numbers.astype(np.int32), len(classes), Path(path).stem
    )
