"""Checkpoints that several processes write, here simulated by threads."""

import errno
import os
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runner_methods import noisy, sampler, start

import dbojax as dbo
from dbojax.runner import checkpoints, files, peers, resume
from dbojax.runner.checkpoints import DamagedError, DamagedWarning

AUTO = (jax.sharding.AxisType.Auto,)


def grid(rows, columns):
    return jax.make_mesh((rows, columns), ("nodes", "model"), axis_types=AUTO * 2)


def simulated(count):
    """What each of `count` processes knows, in as many threads."""
    told = np.zeros((count, peers.WORDS), np.uint32)
    barrier = threading.Barrier(count)

    def gather(rank, words):
        told[rank] = peers.padded(words)
        barrier.wait(20)
        heard = told.copy()
        barrier.wait(20)
        return heard

    return [
        peers.Peers(
            rank,
            count,
            lambda device: device.id * count // 8,
            lambda words, rank=rank: gather(rank, words),
        )
        for rank in range(count)
    ]


def everywhere(count, work):
    """work(peers) in every simulated process."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, simulated(count)))


def save(count, path, tree, step=0):
    meta, columns = {"step": step}, {"step": np.arange(step)}
    everywhere(count, lambda one: checkpoints.save(path, tree, meta, columns, one))


def bits(tree):
    def raw(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


LEAVES = {
    "both": (np.arange(32.0).reshape(8, 4), jax.P("nodes", "model")),
    "rows": (np.arange(24, dtype=np.int64).reshape(8, 3), jax.P("nodes")),
    "columns": (np.arange(12, dtype=jnp.bfloat16).reshape(3, 4), jax.P(None, "model")),
    "crossed": (np.arange(32) % 3 == 0, jax.P(("model", "nodes"))),
    "copies": (np.arange(5, dtype=np.float32), jax.P()),
    "empty": (np.zeros((8, 0)), jax.P("nodes")),
    "single": (np.float64(3), None),
    "complex": (np.arange(4) * (1 - 2j), jax.P("nodes")),
}


def placed(mesh):
    """Leaves of all kinds on a mesh; on one device if it is None."""

    def place(leaf, spec):
        if mesh is None or spec is None:
            return jnp.asarray(leaf)
        return jax.device_put(leaf, jax.NamedSharding(mesh, spec))

    tree = {name: place(*pair) for name, pair in LEAVES.items()}
    keys = jax.random.split(jax.random.key(1), 4)
    if mesh is not None:
        keys = jax.device_put(keys, jax.NamedSharding(mesh, jax.P("nodes")))
    return {**tree, "keys": keys}


@pytest.fixture(scope="module")
def tree():
    return placed(grid(4, 2))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_parts_are_read_onto_any_devices(tree, tmp_path, count):
    save(count, tmp_path / "a", tree)
    assert len(os.listdir(tmp_path)) == 1 + (count > 1) * count
    for mesh in (None, grid(2, 2), grid(4, 2)) if count == 3 else (None,):
        like = placed(mesh)
        found = checkpoints.load(tmp_path / "a", like).tree
        assert bits(found) == bits(tree)
        for name, leaf in found.items():
            assert leaf.sharding.is_equivalent_to(like[name].sharding, leaf.ndim)


def test_each_process_writes_its_own_and_copies_are_written_once(tree, tmp_path):
    save(4, tmp_path / "a", tree)
    parts = sorted(tmp_path.glob("*.part-*"))
    held = [dict(np.load(part)) for part in parts]
    sizes = [sum(array.nbytes for array in part.values()) for part in held]
    total = sum(map(len, bits(tree)))
    assert sum(sizes) == total
    # Everything but copies and columns is spread evenly over the four.
    assert max(sizes[1:]) <= total / 4


def test_the_next_checkpoint_keeps_one_generation_and_removes_the_rest(tmp_path):
    tree = placed(grid(4, 2))["rows"]
    for step in range(3):
        save(2, tmp_path / "a", tree + step, step)
    assert len(os.listdir(tmp_path)) == 2 * (1 + 2)
    assert checkpoints.load(tmp_path / "a", tree).meta["step"] == 2
    older = checkpoints.load(tmp_path / "a.previous", tree)
    assert older.meta["step"] == 1
    assert bits(older.tree) == bits(tree + 1)
    # One process takes over: the parts go with the generation that lists them.
    for step in (3, 4):
        save(1, tmp_path / "a", tree, step)
    assert sorted(os.listdir(tmp_path)) == ["a", "a.previous"]


def test_a_process_that_cannot_write_stops_all(tree, tmp_path, monkeypatch):
    save(2, tmp_path / "a", tree)
    before = sorted(os.listdir(tmp_path))
    write = checkpoints._write_part

    def failing(path, step, values, one):
        if one.rank == 1:
            raise OSError("disk full")
        return write(path, step, values, one)

    monkeypatch.setattr(checkpoints, "_write_part", failing)
    errors = []

    def work(one):
        with pytest.raises(OSError, match=r"disk full|Process 1 of 2") as caught:
            checkpoints.save(tmp_path / "a", tree, {"step": 1}, peers=one)
        errors.append(str(caught.value))

    everywhere(2, work)
    assert len(set(errors)) == 2
    assert set(os.listdir(tmp_path)) >= set(before)
    assert bits(checkpoints.load(tmp_path / "a", tree).tree) == bits(tree)


def test_a_folder_that_is_not_shared_is_noticed(tree, tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()

    def work(one):
        with pytest.raises(
            OSError, match=r"folder that all of them share|Process 0 of"
        ):
            checkpoints.save(folders[one.rank] / "a", tree, peers=one)

    everywhere(2, work)


@pytest.mark.parametrize("count", [1, 2])
def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path, monkeypatch, count):
    tree = placed(grid(4, 2))["rows"]
    path = tmp_path / "run" / "a"
    path.parent.mkdir()
    for step in (1, 2):
        save(count, path, tree + step, step)
    seen, lock = [], threading.Lock()

    def watched(function):
        def before(*arguments, **settings):
            with lock:
                seen.append(tmp_path / str(len(seen)))
                shutil.copytree(path.parent, seen[-1])
                return function(*arguments, **settings)

        return before

    for name in ("replace", "link", "fsync", "unlink"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    for step in (3, 4):
        save(count, path, tree + step, step)
    monkeypatch.undo()
    steps = []
    for folder in seen:
        found = checkpoints.load(folder / "a", tree)
        steps.append(found.meta["step"])
        assert bits(found.tree) == bits(tree + steps[-1])
        older = checkpoints.load(folder / "a.previous", tree).meta["step"]
        assert steps[-1] - older in (0, 1)
    assert steps == sorted(steps)
    assert set(steps) == {2, 3, 4}
    # Whatever was left half done is gone after the next save, an hour later.
    monkeypatch.setattr(files, "_YOUNG", -1)
    save(count, seen[5] / "a", tree, 9)
    left = os.listdir(seen[5])
    assert not [name for name in left if name.endswith(".tmp")]
    assert len(left) == 2 * (1 + (count > 1) * count)


def test_without_hard_links_a_kill_leaves_the_older_one(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError("operation not permitted")

    tree, path = jnp.arange(3.0), tmp_path / "a"
    monkeypatch.setattr(os, "link", unsupported)
    for step in (1, 2, 3):
        save(1, path, tree + step, step)
    assert checkpoints.load(tmp_path / "a.previous", tree).meta["step"] == 2
    path.unlink()
    begin = resume.File(path, {"key": 0, "start": 0, "every": 1}, peers.ALONE)
    with pytest.raises(ValueError, match="belongs to another run"):
        resume.begin(begin, tree, 9, True)


def written(folder, count):
    """Two generations of one run, and the file that `run` would look for."""
    rows = jax.NamedSharding(grid(8, 1), jax.P("nodes"))
    state = jax.device_put(jnp.arange(8.0), rows)
    same = {"key": "k", "start": "s", "every": 5}
    for step in (5, 10):
        columns = {"step": np.arange(step)}
        everywhere(
            count,
            lambda one, step=step, columns=columns: checkpoints.save(
                folder / "a", state + step, {**same, "step": step}, columns, one
            ),
        )
    return state, resume.File(folder / "a", same, peers.ALONE)


def damage(path, rng):
    content = bytearray(path.read_bytes())
    if rng.integers(2):
        content = content[: rng.integers(len(content))]
    else:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    # A new file: the older generation may be another name of the old one.
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("count", [1, 2])
def test_a_hundred_damages_are_refused_and_the_older_one_is_used(tmp_path, count):
    rng = np.random.default_rng(3)
    whole = tmp_path / "whole"
    whole.mkdir()
    state, file = written(whole, count)
    path = tmp_path / "trial" / "a"
    file = file._replace(path=path)
    newer = [name for name in os.listdir(whole) if name == "a" or ".10.part" in name]
    assert len(newer) == 1 + (count > 1) * count
    for trial in range(100):
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(whole, path.parent)
        damage(path.with_name(newer[trial % len(newer)]), rng)
        with pytest.raises(
            DamagedError, match=r"is damaged.*a\.previous, at step 5, is"
        ):
            resume.begin(file, state, 20, True)
        with pytest.warns(
            DamagedWarning, match="goes on from the older one, at step 5"
        ):
            step, found, columns = resume.begin(file, state, 20, "auto")
        assert (step, bits(found), len(columns["step"])) == (5, bits(state + 5), 5)
        # The older one took its place: from now on it is simply the newest.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resume.begin(file, state, 20, "auto")[0] == 5


def test_damage_to_the_older_one_is_no_matter_until_it_is_needed(tmp_path):
    state, file = written(tmp_path, 2)
    rng = np.random.default_rng(0)
    damage(tmp_path / "a.previous", rng)
    assert resume.begin(file, state, 20, "auto")[0] == 10
    damage(next(tmp_path.glob("*.10.part-00001*")), rng)
    with pytest.raises(
        DamagedError, match=r"No checkpoint .* intact: .*a is damaged, and"
    ):
        resume.begin(file, state, 20, "auto")
    with pytest.raises(
        DamagedError, match=r"its part a\.10\.part-00001.* do not match"
    ):
        resume.begin(file, state, 20, True)
    (tmp_path / "a.previous").unlink()
    with pytest.raises(DamagedError, match=r"intact: .*a is damaged\. .*do not match"):
        resume.begin(file, state, 20, "auto")
    next(tmp_path.glob("*.10.part-00000*")).unlink()
    with pytest.raises(DamagedError, match=r"its part a\.10\.part-00000.* is missing"):
        resume.begin(file, state, 20, True)


BOTH = r"delete \S+a and \S+a\.previous to start afresh"


def test_who_removes_the_newer_one_is_told_of_the_older(tmp_path):
    state, file = written(tmp_path, 2)
    with pytest.raises(ValueError, match=f"exists and would .*{BOTH}"):
        resume.begin(file, state, 20, False)
    (tmp_path / "a").unlink()
    sentence = r"a is gone: .*a\.previous, at step 5; to start afresh, delete that too"
    for how in (True, "auto"):
        with pytest.warns(DamagedWarning, match=sentence):
            assert resume.begin(file, state, 20, how)[0] == 5
    next(tmp_path.glob("*.5.part-00001*")).unlink()
    with pytest.raises(DamagedError, match=f"part-00001.* is missing.*{BOTH}"):
        resume.begin(file, state, 20, True)
    (tmp_path / "a.previous").unlink()
    assert resume.begin(file, state, 20, True)[0] == 0


@pytest.mark.parametrize("name", ["a", "a.previous", "a.10.part-00001"])
def test_what_cannot_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch, name):
    state, file = written(tmp_path, 2)
    if name == "a.previous":
        damage(tmp_path / "a", np.random.default_rng(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stale, opened = threading.local(), Path.open

    def open_(path, *args, **kwargs):
        if stale.here and (path.name == name or path.name.startswith(f"{name}-")):
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(path, *args, **kwargs)

    def work(one):
        stale.here = one.rank == 1
        with pytest.raises(OSError, match="could not be read") as caught:
            resume.begin(file._replace(peers=one), state, 20, "auto")
        return str(caught.value)

    monkeypatch.setattr(Path, "open", open_)
    texts = everywhere(2, work)
    assert "another process" in texts[0]
    assert "Stale file handle" in texts[1]
    monkeypatch.undo()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_another_run_is_refused_whatever_is_damaged(tmp_path):
    state, file = written(tmp_path, 1)
    other = file._replace(meta={**file.meta, "key": "another"})
    for how in (True, "auto"):
        with pytest.raises(ValueError, match="another `key`"):
            resume.begin(other, state, 20, how)
    damage(tmp_path / "a", np.random.default_rng(1))
    with pytest.raises(ValueError, match=r"a\.previous belongs to .* another `key`"):
        resume.begin(other, state, 20, "auto")


def test_all_processes_take_the_same_generation(tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    folders[0].mkdir()
    state, file = written(folders[0], 2)
    shutil.copytree(folders[0], folders[1])
    damage(next(folders[1].glob("*.10.part-00001*")), np.random.default_rng(2))

    def work(how):
        def one(each):
            mine = file._replace(path=folders[each.rank] / "a", peers=each)
            try:
                return resume.begin(mine, state, 20, how)[0]
            except ValueError as error:
                return str(error)

        return everywhere(2, one)

    texts = work(True)
    assert all(
        "is damaged" in text and "at step 5, is intact" in text for text in texts
    )
    with pytest.warns(DamagedWarning):
        assert work("auto") == [5, 5]
    # The folders differ by now, as folders do that are not shared.
    assert all("folder that all of them share" in text for text in work("auto"))


def test_auto_starts_afresh_where_there_is_nothing(key, tmp_path):
    x = jnp.arange(12.0).reshape(4, 3)
    with pytest.raises(ValueError, match='must be True, False or "auto"'):
        dbo.run(noisy(), key, start(x), sampler, 3, resume="yes")
    path = tmp_path / "a"
    _, history = dbo.run(
        noisy(), key, start(x), sampler, 2, every=1, checkpoint=path, resume="auto"
    )
    assert len(history["step"]) == 2
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.previous exists and would be over"):
        dbo.run(noisy(), key, start(x), sampler, 2, checkpoint=path, resume=False)


def test_the_digest_does_not_depend_on_placement_or_processes(tree):
    wanted = checkpoints.digest(tree)
    assert wanted == checkpoints.digest(placed(None))
    assert wanted == checkpoints.digest({**tree, "rows": LEAVES["rows"][0]})
    for count in (2, 3):
        found = everywhere(count, lambda one: checkpoints.digest(tree, one))
        assert set(found) == {wanted}


def test_the_digest_tells_every_bit_and_every_place():
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        array = rng.integers(0, 200, (5, 7)).astype(dtype)
        seen = {checkpoints.digest(array)}
        for flat in range(0, array.size, 5):
            for bit in range(0, 8 * array.dtype.itemsize, 3):
                other = array.copy()
                other.reshape(-1)[flat] ^= dtype(1 << bit)
                seen.add(checkpoints.digest(other))
        swapped = array.copy()
        swapped[[0, 1]] = swapped[[1, 0]]
        seen |= {checkpoints.digest(swapped), checkpoints.digest(array[::-1])}
        changes = 7 * len(range(0, 8 * array.dtype.itemsize, 3))
        assert len(seen) == 1 + changes + 2


def test_a_run_resumes_on_fewer_and_fewer_devices(key, tmp_path):
    x = np.arange(24.0).reshape(8, 3) / 10
    data = np.arange(24.0).reshape(8, 3)

    def go(devices, steps, path):
        state, table = start(jnp.asarray(x)), jnp.asarray(data)
        if devices > 1:
            mesh = jax.make_mesh((devices,), ("nodes",), axis_types=AUTO)
            rows = jax.NamedSharding(mesh, jax.P("nodes"))
            moved = jax.device_put((state.x, state.y, table), rows)
            state, table = state._replace(x=moved[0], y=moved[1]), moved[2]

        def batches(key, step):
            return table + step

        run = dbo.run(noisy(), key, state, batches, steps, every=4, checkpoint=path)
        if devices > 1:
            assert len(run[0].x.sharding.device_set) == devices
            assert run[0].count.sharding.is_fully_replicated
        return run

    # Not to the bit: XLA computes blocks of other sizes with other instructions (e.g.
    # its tanh, by one unit in the last place), and sums over the nodes in other orders.
    wanted, history = go(8, 12, None)
    for devices, steps in ((8, 4), (4, 8), (1, 12)):
        found, rows = go(devices, steps, tmp_path / "a")
        # What was written is read to the bit, whatever the devices are.
        assert bits(go(max(1, devices // 2), steps, tmp_path / "a")[0]) == bits(found)
    assert bits(found[3:]) == bits(wanted[3:])
    for name, rtol in (("x", 1e-12), ("y", 1e-12), ("half", 2**-7)):
        one, other = (np.asarray(getattr(run, name), float) for run in (found, wanted))
        np.testing.assert_allclose(one, other, rtol=rtol)
    np.testing.assert_allclose(rows["upper"], history["upper"], rtol=1e-12)
