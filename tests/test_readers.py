"""Readers: what is written comes back, and what is broken is refused."""

import bz2
import gzip

import numpy as np
import pytest

from dbojax.tasks import data, readers


def idx(array, code=8):
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, code, array.ndim]) + lengths + array.tobytes()


def parts(rng=None):
    rng = np.random.default_rng(0) if rng is None else rng
    return {
        "train-images-idx3-ubyte": rng.integers(256, size=(12, 3, 2), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(12, dtype=np.uint8) % 4,
        "t10k-images-idx3-ubyte": rng.integers(256, size=(5, 3, 2), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(5, dtype=np.uint8) % 3,
    }


def write(folder, packed=False, **changed):
    """Write the four files, some of them with other bytes; None leaves one out."""
    for name, array in parts().items():
        raw = changed.get(name.replace("-", "_"), idx(array))
        if raw is not None and packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        elif raw is not None:
            (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_folder_comes_back(tmp_path, packed):
    train, test = readers.idx_folder(write(tmp_path, packed), name="tiny")
    wanted = parts()
    for found, part in ((train, "train"), (test, "t10k")):
        images = wanted[f"{part}-images-idx3-ubyte"]
        np.testing.assert_array_equal(found.inputs, images.reshape(len(images), 6))
        np.testing.assert_array_equal(found.labels, wanted[f"{part}-labels-idx1-ubyte"])
        assert found.inputs.dtype == np.float32
        assert (found.num_classes, found.name) == (4, "tiny")
    shards = data.distribute(train, n=2, test=test)
    assert shards.test.inputs.shape == (5, 6)


def test_names_with_a_dot_are_found(tmp_path):
    for path in list(write(tmp_path).iterdir()):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    train, _ = readers.idx_folder(tmp_path)
    assert train.name == tmp_path.name
    assert readers.fashion_mnist(tmp_path)[0].name == "fashion_mnist"


IMAGES = parts()["train-images-idx3-ubyte"]
BROKEN = {
    "empty": ({"train_images_idx3_ubyte": b""}, "starts with nothing"),
    "short header": ({"train_images_idx3_ubyte": idx(IMAGES)[:9]}, "not an IDX file"),
    "short": ({"train_images_idx3_ubyte": idx(IMAGES)[:-1]}, "72 bytes, but holds 71"),
    "long": ({"train_images_idx3_ubyte": idx(IMAGES) + b"\0"}, "but holds 73"),
    "type": ({"train_images_idx3_ubyte": idx(IMAGES, 13)}, "00 00 0d 03"),
    "axes": ({"train_labels_idx1_ubyte": idx(IMAGES)}, "with 1 axes"),
    "text": ({"train_labels_idx1_ubyte": b"<html>gone</html>"}, "not an IDX file"),
    "lengths": ({"train_images_idx3_ubyte": idx(IMAGES[:7])}, "7 images and 12"),
    "pixels": ({"t10k_images_idx3_ubyte": idx(IMAGES[:5, :2])}, "test images of 4"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_idx_file_is_refused(tmp_path, case, packed):
    changed, words = BROKEN[case]
    with pytest.raises(ValueError, match=words):
        readers.idx_folder(write(tmp_path, packed, **changed))


# Named: an archive tells its second, and workers that collect in different seconds
# would find different tests.
BROKEN_ARCHIVES = {"no gzip": b"no gzip", "short": gzip.compress(idx(IMAGES))[:-12]}


@pytest.mark.parametrize("raw", BROKEN_ARCHIVES.values(), ids=BROKEN_ARCHIVES)
def test_a_broken_archive_is_refused(tmp_path, raw):
    write(tmp_path, train_images_idx3_ubyte=None)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(raw)
    with pytest.raises(ValueError, match="not a whole gzip file"):
        readers.idx_folder(tmp_path)


def test_missing_files_are_named(tmp_path):
    write(tmp_path, t10k_labels_idx1_ubyte=None)
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        readers.idx_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="package `dataset-fashion-mnist`"):
        readers.fashion_mnist(tmp_path / "nowhere")


@pytest.mark.skipif(
    not readers.FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist not installed"
)
def test_fashion_mnist():
    train, test = readers.fashion_mnist()
    assert train.inputs.shape == (60000, 784)
    assert np.bincount(test.labels).tolist() == [1000] * 10


LIBSVM = "-1 1:0.5 3:2\n+1 2:-1.5\n-1 1:1\n"


@pytest.mark.parametrize("packed", [False, True])
def test_a_libsvm_file_comes_back(tmp_path, packed):
    pytest.importorskip("sklearn")
    path = tmp_path / ("tiny.txt.gz" if packed else "tiny.txt")
    raw = LIBSVM.encode()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    found = readers.libsvm(path)
    wanted = [[0.5, 0, 2], [0, -1.5, 0], [1, 0, 0]]
    np.testing.assert_array_equal(found.inputs, wanted)
    assert found.labels.tolist() == [0, 1, 0]
    assert found.num_classes == 2
    assert readers.libsvm(path, d=5).inputs.shape == (3, 5)


BAD_LINES = {
    "words": ("nothing of the sort\n", "not a LIBSVM file"),
    "value": ("1 1:a\n", "not a LIBSVM file"),
    "no value": ("1 1\n", "not a LIBSVM file"),
    "order": ("1 3:1 2:1\n", "not a LIBSVM file"),
    "too few features": ("1 9:1\n", "has 9 features, got d=4"),
    "empty": ("", "no samples"),
    "regression": ("0.25 1:1\n1 1:2\n", "got e.g. 0.25"),
    "not finite": ("1 1:nan\n", "not finite"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_broken_libsvm_file_is_refused(tmp_path, case):
    pytest.importorskip("sklearn")
    text, words = BAD_LINES[case]
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        readers.libsvm(path, d=4)


def damaged(raw):
    """An archive with flipped bits in its middle."""
    packed = bytearray(gzip.compress(raw))
    packed[len(packed) // 2 : len(packed) // 2 + 9] = b"\xff" * 9
    return bytes(packed)


ARCHIVES = {
    "bits.gz": damaged(LIBSVM.encode() + np.random.default_rng(0).bytes(500)),
    "short.gz": gzip.compress(LIBSVM.encode())[:-12],
    "text.gz": LIBSVM.encode(),
    "short.bz2": bz2.compress(LIBSVM.encode())[:-9],
    "text.bz2": LIBSVM.encode(),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_broken_libsvm_archive_is_refused(tmp_path, name):
    pytest.importorskip("sklearn")
    (tmp_path / name).write_bytes(ARCHIVES[name])
    with pytest.raises(ValueError, match="not a LIBSVM file"):
        readers.libsvm(tmp_path / name)


def test_a_missing_libsvm_file_is_missing(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(FileNotFoundError):
        readers.libsvm(tmp_path / "nowhere")


def test_comments_queries_and_an_index_zero(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "tiny.txt"
    path.write_text("# a\n7 qid:1 1:2 # b\n\n3 qid:1 2:1\n")
    found = readers.libsvm(path)
    assert (found.inputs.tolist(), found.labels.tolist()) == ([[2, 0], [0, 1]], [1, 0])
    path.write_text("7 0:2\n3 1:1\n")
    assert readers.libsvm(path, d=2).inputs.tolist() == [[2, 0], [0, 1]]
