import functools
import itertools
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from runner_methods import noisy, sampler, start

import dbojax as dbo

X = np.arange(12.0).reshape(4, 3) / 10


def evaluate(state):
    return {"loss": jnp.sum(state.x), "row": state.x[0]}


def go(key, steps, path, **changes):
    settings = {"every": 5, "evaluate": evaluate, "checkpoint": path, **changes}
    begin = settings.pop("begin", X)
    batches = settings.pop("batches", sampler)
    return dbo.run(noisy(), key, start(jnp.asarray(begin)), batches, steps, **settings)


def bits(tree):
    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b):
    columns = [
        {
            name: column.tobytes()
            for name, column in history.items()
            if name != "seconds"
        }
        for _, history in (a, b)
    ]
    return bits(a[0]) == bits(b[0]) and columns[0] == columns[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint at step 10, its bytes, and its run's key."""
    key = jax.random.key(7)
    path = tmp_path_factory.mktemp("written") / "run.npz"
    go(key, 10, path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, written):
    path = tmp_path / "run.npz"
    path.write_bytes(written)
    return path


def test_a_resumed_run_ends_with_the_same_bits(key, path):
    assert same(go(key, 18, path), go(key, 18, None))


def test_writing_checkpoints_changes_nothing(key, tmp_path):
    assert same(go(key, 10, tmp_path / "run"), go(key, 10, None))


def test_an_extended_run_keeps_to_the_grid_of_chunks(key, tmp_path):
    go(key, 8, tmp_path / "run")
    state, history = go(key, 15, tmp_path / "run")
    expected, _ = go(key, 15, None)
    assert bits(state) == bits(expected)
    assert history.evaluated()["step"].tolist() == [5, 8, 10, 15]
    assert history["seconds"].shape == (15,)
    assert (np.diff(history["seconds"]) > 0).all()


def test_a_finished_run_is_read_without_compiling(key, path):
    expected = go(key, 10, None)
    found = go(key, 10, path)
    assert same(found, expected)
    assert found[1].compile_seconds == 0


def test_a_start_without_a_file_makes_one(key, tmp_path):
    go(key, 5, tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"]


def test_it_resumes_without_the_evaluate_of_before(key, path):
    _, history = go(key, 15, path, evaluate=None)
    assert history.evaluated()["step"].tolist() == [5, 10]
    assert np.isnan(history["row"][10:]).all()


def test_placed_leaves_return_to_their_devices(key, tmp_path):
    mesh = jax.make_mesh((4,), ("nodes",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("nodes"))
    begin = jax.device_put(jnp.asarray(X), rows)
    expected = go(key, 10, None, begin=begin)
    go(key, 5, tmp_path / "run", begin=begin)
    found = go(key, 10, tmp_path / "run", begin=begin)
    assert same(found, expected)
    assert found[0].x.sharding.is_equivalent_to(rows, 2)


REFUSED = {
    "key": (dict(key=jax.random.key(8)), "another `key`.*Pass the same `key`"),
    "start": (dict(begin=X + 1e-12), "another start .*not.*Pass the same `state`"),
    "every": (dict(every=10), "every=5, this one has every=10.*Pass the same `every`"),
    "steps": (dict(steps=9), "at step 10, beyond num_steps=9"),
    "shape": (dict(begin=X[:, :2]), r"`state.x` as float64 \(4, 3\), expected.*\(4, 2"),
    "dtype": (dict(begin=X.astype("f")), r"as float64 \(4, 3\), expected float32 \(4,"),
    "resume": (dict(resume=False), "exists and would be overwritten"),
    "iterator": (
        dict(batches=itertools.repeat(X)),
        "cannot take its batches from an iterator.*from_host",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_the_file_kept(
    key, path, written, change, message, monkeypatch
):
    def step(*_):
        raise AssertionError("must be refused before a step is traced")

    monkeypatch.setitem(globals(), "noisy", lambda: dbo.Algorithm(start, step))
    arguments = {"key": key, "steps": 20, "path": path, **change}
    with pytest.raises(ValueError, match=message):
        go(**arguments)
    assert path.read_bytes() == written


STRUCTURES = {
    "more": (
        lambda s: s[:-1],
        r"holds `state\[4\]`, which the state of this run lacks",
    ),
    "fewer": (lambda s: (*s, s[0]), r"lacks `state\[5\]`"),
    "names": (lambda s: s[0], r"holds `state\[0\]` where this run has `state`"),
}


@pytest.mark.parametrize(("change", "message"), STRUCTURES.values(), ids=STRUCTURES)
def test_another_structure_is_refused(tmp_path, change, message):
    state = tuple(start(jnp.asarray(X)))
    dbo.checkpoints.save(tmp_path / "a", state)
    with pytest.raises(ValueError, match=message):
        dbo.checkpoints.load(tmp_path / "a", like=change(state))


def test_counts_may_be_integers_of_numpy(key, path):
    five = np.int64(5)
    found = go(key, np.int64(18), path, every=five, measure=five)
    assert found[1]["step"][-1] == 18
    assert json.loads(np.load(path)["head"].tobytes())["meta"]["step"] == 18
    assert go(key, 18, path)[1]["step"][-1] == 18


def test_several_processes_never_write_to_one_file(key, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 12)
    for index, refused in ((0, "run.npz"), (1, "run-0.npz"), (1, "run-11.npz")):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        with pytest.raises(
            ValueError, match=rf"of 12, .*devices\.place.*-{index}\.npz"
        ):
            go(key, 5, tmp_path / refused)
    go(key, 5, tmp_path / "run7-1.npz")
    assert os.listdir(tmp_path) == ["run7-1.npz"]


@pytest.mark.parametrize("folder", ["missing/run.npz", "."])
def test_an_impossible_path_is_refused(key, tmp_path, folder):
    with pytest.raises(ValueError, match="a file in an existing folder"):
        go(key, 5, tmp_path / folder)


def damaged(content):
    rng = np.random.default_rng(0)
    for place in rng.integers(len(content), size=20):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        yield bytes(flipped)
    for length in rng.integers(len(content), size=20):
        yield content[:length]
    yield from (b"", content[:-1], content + b"\0", content * 2, b"not a checkpoint")


def test_a_damaged_file_is_refused_never_half_loaded(key, path, written):
    for content in damaged(written):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged or no checkpoint"):
            go(key, 20, path)
        assert path.read_bytes() == content


LEAVES = {
    "bfloat16": jnp.arange(3, dtype=jnp.bfloat16),
    "float8": jnp.arange(3, dtype=jnp.float8_e4m3fn),
    "int4": np.arange(-2, 2).astype(ml_dtypes.int4),
    "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
    "bool": jnp.array([True, False]),
    "complex": jnp.array(1 + 2j),
    "empty": jnp.zeros((0, 3)),
    "scalar": jnp.array(3, jnp.uint8),
    "fortran": np.asfortranarray(X),
    "big_endian": X.astype(">f8").astype("<f8"),
    "key": jax.random.key(4),
    "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
}


@pytest.mark.parametrize("name", LEAVES)
def test_every_kind_of_leaf_returns_to_the_bit(tmp_path, name):
    leaf = LEAVES[name]
    dbo.checkpoints.save(tmp_path / "a", {"leaf": leaf})
    found = dbo.checkpoints.load(tmp_path / "a", like={"leaf": leaf}).tree["leaf"]
    assert (found.dtype, found.shape) == (leaf.dtype, leaf.shape)
    assert bits(found) == bits(jnp.asarray(leaf))


def test_a_file_is_an_ordinary_npz_without_pickles(path):
    with np.load(path, allow_pickle=False) as archive:
        assert archive["column_step"].tolist() == list(range(1, 11))
        assert not any(archive[name].dtype.hasobject for name in archive)


def test_what_is_not_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds arrays of numbers, got"):
        dbo.checkpoints.save(tmp_path / "a", {"f": np.array([print], object)})
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    dbo.checkpoints.save(path, jnp.ones(3))
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="no space left"):
                dbo.checkpoints.save(path, jnp.zeros(3))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_left_over_files_of_killed_writers_are_removed_and_no_others(tmp_path):
    token = "0123456789abcdef"
    others = [f".a.b.{token}.tmp", ".a.tmp", f".ab.{token}.tmp", f".a.{token}.tmp~"]
    for name in [f".a.{token}.tmp", *others]:
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (0, 0))
    # Somebody else may be writing this one at the moment.
    others.append(f".a.{token[::-1]}.tmp")
    (tmp_path / others[-1]).touch()
    dbo.checkpoints.save(tmp_path / "a", jnp.ones(3))
    assert sorted(os.listdir(tmp_path)) == sorted(["a", *others])


def test_the_digest_tells_names_shapes_dtypes_and_bits():
    trees = [
        {"a": jnp.zeros(4)},
        {"b": jnp.zeros(4)},
        {"a": jnp.zeros((2, 2))},
        {"a": jnp.zeros(4, jnp.int64)},
        {"a": -jnp.zeros(4)},
        {"a": jnp.zeros(4), "b": jnp.zeros(0)},
    ]
    assert len({dbo.checkpoints.digest(tree) for tree in trees}) == len(trees)
    digest = functools.partial(dbo.checkpoints.digest, trees[0])
    assert digest() == digest()
