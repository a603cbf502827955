"""CIFAR folders: what is written comes back, and no pickle runs code."""

import functools
import os
import pickle
import struct

import numpy as np
import pytest

from dbojax.tasks import data, readers

BATCHES = [f"data_batch_{k}" for k in range(1, 6)]
FILES = {
    "cifar-10-batches-bin": ([f"{name}.bin" for name in BATCHES], "test_batch.bin"),
    "cifar-10-batches-py": (BATCHES, "test_batch"),
    "cifar-100-binary": (["train.bin"], "test.bin"),
    "cifar-100-python": (["train"], "test"),
}


def rows(name, count):
    """Pixels, coarse and fine labels of a file, a function of its name."""
    rng = np.random.default_rng(sum(name.partition(".")[0].encode()))
    pixels = rng.integers(256, size=(count, 3072), dtype=np.uint8)
    return pixels, rng.integers(20, size=count), rng.integers(100, size=count)


def python_2(value):
    """A pickle of protocol 2 with the opcodes that Python 2 wrote."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python_2, value)) + b"e"
    if isinstance(value, dict):
        pairs = b"".join(python_2(k) + python_2(v) for k, v in value.items())
        return b"}(" + pairs + b"u"
    shape = python_2(len(value)) + python_2(value.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n(" + python_2(b"u1") + b"K\x00K\x01tR"
    dtype += (
        b"(K\x03" + python_2(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t"
    array += python_2(b"b") + b"tR(K\x01" + shape + dtype + b"\x89"
    return array + python_2(value.tobytes()) + b"tb"


def packed(content, protocol=None):
    if protocol is None:
        return b"\x80\x02" + python_2(content) + b"."
    return pickle.dumps(content, protocol=protocol)


def write(folder, kind, count=4, protocol=None):
    train, test = FILES[kind]
    for name in (*train, test):
        pixels, coarse, fine = rows(name, count)
        ten = kind.startswith("cifar-10-")
        if "py" in kind:
            labels = {b"labels": (fine % 10).tolist()} if ten else {}
            if not ten:
                labels[b"coarse_labels"] = coarse.tolist()
                labels[b"fine_labels"] = fine.tolist()
            content = {b"batch_label": b"x", **labels, b"data": pixels}
            raw = packed(content, protocol)
        else:
            labels = [fine % 10] if ten else [coarse, fine]
            columns = np.stack(labels, 1).astype(np.uint8)
            raw = np.concatenate([columns, pixels], 1).tobytes()
        (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [(kind, None) for kind in FILES]
    + [("cifar-10-batches-py", p) for p in (2, 4)]
    + [("cifar-100-python", 3)],
)
def test_a_folder_comes_back(tmp_path, kind, protocol):
    train, test = readers.cifar(write(tmp_path, kind, protocol=protocol))
    ten = kind.startswith("cifar-10-")
    for found, names in ((train, FILES[kind][0]), (test, [FILES[kind][1]])):
        parts = zip(*(rows(name, 4) for name in names), strict=True)
        pixels, _, fine = map(np.concatenate, parts)
        assert found.labels.tolist() == (fine % 10 if ten else fine).tolist()
        assert (found.num_classes, found.name) == (
            (10, "cifar10") if ten else (100, "cifar100")
        )
        assert found.inputs.dtype == np.float32
        images = found.inputs.reshape(-1, 32, 32, 3)
        wanted = pixels.reshape(-1, 3, 32, 32)
        for colour in range(3):
            np.testing.assert_array_equal(images[..., colour], wanted[:, colour])


def test_cifar_is_dealt_out_with_its_own_test_set(tmp_path):
    train, test = readers.cifar(write(tmp_path, "cifar-10-batches-bin", count=8))
    shards = data.distribute(train, n=2, fractions=(0.5, 0.5, 0.0), test=test)
    assert shards.test.inputs.shape == (8, 3072)
    assert float(shards.train.inputs.max()) == 1.0


def test_both_forms_of_cifar_100_have_coarse_labels(tmp_path):
    for kind in ("cifar-100-binary", "cifar-100-python"):
        (tmp_path / kind).mkdir()
        train, _ = readers.cifar(write(tmp_path / kind, kind), coarse=True)
        assert train.num_classes == 20
        assert train.labels.tolist() == rows("train", 4)[1].tolist()
    write(tmp_path, "cifar-10-batches-bin")
    with pytest.raises(ValueError, match="one kind of labels"):
        readers.cifar(tmp_path, coarse=True)


class Malice:
    """Leaves a file behind when it is unpickled without care."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(trace):
    """Pickles that would write a file, or reach code by another way."""
    command = f"touch {trace}"
    yield pickle.dumps({b"data": Malice(os.system, command)}, protocol=2)
    yield pickle.dumps({b"data": Malice(eval, f"open({str(trace)!r}, 'w')")})
    yield pickle.dumps({b"data": Malice(functools.partial, os.system)})
    # By a dotted name below a module that is admitted.
    name = b"multiarray.os.system".decode()
    stack = b"\x8c" + bytes([10]) + b"numpy.core" + b"\x8c" + bytes([len(name)])
    yield (
        b"\x80\x04"
        + stack
        + name.encode()
        + b"\x93"
        + b"\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"\x85R."
    )
    # A codec of another kind, and an array of another class.
    yield b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    yield b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00a\x85R."


def test_a_malicious_pickle_is_refused_before_it_runs(tmp_path):
    trace = tmp_path / "trace"
    # The first one is real: unpickled without care it leaves its trace.
    pickle.loads(next(attacks(trace)))
    trace.unlink()
    write(tmp_path, "cifar-10-batches-py")
    for raw in attacks(trace):
        (tmp_path / "data_batch_3").write_bytes(raw)
        with pytest.raises(ValueError, match="Nothing of it was run"):
            readers.cifar(tmp_path)
        assert not trace.exists()


def test_numpy_never_sees_what_a_pickle_says(tmp_path):
    """An array whose header lies is refused, whatever NumPy would make of it."""
    pixels = rows("data_batch_2", 4)[0]
    honest = packed({b"labels": [1] * 4, b"data": pixels})
    write(tmp_path, "cifar-10-batches-py")
    lies = {
        "type": honest.replace(python_2(b"u1"), python_2(b"O8")),
        "shape": honest.replace(python_2(4) + python_2(3072), python_2(8) * 2),
        "negative": honest.replace(python_2(4), python_2(-4)),
        "class": honest.replace(b"numpy\nndarray", b"builtins\nlist"),
    }
    for raw in lies.values():
        assert raw != honest
        (tmp_path / "data_batch_2").write_bytes(raw)
        with pytest.raises(ValueError, match=r"unsigned bytes|asks for"):
            readers.cifar(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(honest)
    assert readers.cifar(tmp_path)[0].labels[4:8].tolist() == [1] * 4


def pickled(**changed):
    content = {"labels": [0, 1], "data": rows("a", 2)[0], **changed}
    content = {name.encode(): part for name, part in content.items()}
    return pickle.dumps({k: v for k, v in content.items() if v is not None}, protocol=4)


BROKEN = {
    "empty": (b"", "not a pickle of CIFAR"),
    "short": (pickled()[:-700], "not a pickle of CIFAR"),
    "text": (b"<html>gone</html>", "not a pickle of CIFAR"),
    "list": (pickle.dumps([1]), "holds a list"),
    "no data": (pickled(data=None), r"no \['data'\]"),
    "no labels": (pickled(labels=None), r"no \['labels'\]"),
    "fewer labels": (pickled(labels=[1]), "2 images and 1 `labels`"),
    "words": (pickled(labels=["1", "2"]), "list of whole numbers"),
    "tenth": (pickled(labels=[0, 10]), "from 0 to 10; 10 classes"),
    "huge": (pickled(labels=[0, 2**90]), "10 classes"),
    "floats": (pickled(data=np.zeros((2, 3072))), "array `data` of unsigned"),
    "pixels": (pickled(data=np.zeros((2, 300), np.uint8)), "3072 in a row"),
    "state": (
        b"\x80\x02}(U\x04datacnumpy\nndarray\n)RK\x05bU\x06labels]u.",
        "unsigned",
    ),
    "new": (b"\x80\x02}(U\x04datacnumpy\nndarray\n)\x81U\x06labels]u.", "unsigned"),
    "numbers": (pickled(data=[1, 2]), "array `data` of unsigned"),
    "none": (pickled(data=np.zeros((0, 3072), np.uint8), labels=[]), "no images"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pickle_is_refused(tmp_path, case):
    raw, words = BROKEN[case]
    write(tmp_path, "cifar-10-batches-py")
    (tmp_path / "data_batch_4").write_bytes(raw)
    with pytest.raises(ValueError, match=words):
        readers.cifar(tmp_path)


def test_broken_rows_are_refused(tmp_path):
    write(tmp_path, "cifar-10-batches-bin")
    path = tmp_path / "test_batch.bin"
    good = path.read_bytes()
    broken = {
        good[:-1]: "no multiple of 3073",
        b"": "no images",
        b"\x0a" + good[1:]: "10 classes are numbered",
    }
    for raw, words in broken.items():
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=words):
            readers.cifar(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-bin"):
        readers.cifar(tmp_path / "nowhere")
    write(tmp_path, "cifar-100-python")
    (tmp_path / "test").unlink()
    with pytest.raises(FileNotFoundError, match=r"cifar100, but has no \['test'\]"):
        readers.cifar(tmp_path)
