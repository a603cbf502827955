import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kill_worker import BEGIN, COMPUTE, STEPS, WRITE

import dbojax as dbo

KILLS = 20


class Child:
    """A run in a process of its own."""

    def __init__(self, server, checkpoint, result, phase):
        phase.write_bytes(bytes(8))
        self.server, self.phase = server, phase
        server.stdin.write(f"{checkpoint} {result} {phase}\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def told(self):
        """The phase and the step that the child last told."""
        return np.frombuffer(self.phase.read_bytes(), np.int32).tolist()

    def wait_for(self, phase, step, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            what, at = self.told()
            if what == phase and at >= step:
                return
            time.sleep(0.0002)
        pytest.fail(f"the run did not reach phase {phase} of step {step}")

    def wait(self):
        return int(self.server.stdout.readline())

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


@pytest.fixture
def server(tmp_path):
    here, package = Path(__file__).parent, Path(dbo.__file__).parents[1]
    path = os.pathsep.join([str(package), str(here)])
    # The first child compiles for all, in the way of the other tests.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    process = subprocess.Popen(
        [sys.executable, here / "kill_worker.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | cache | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
    with process:
        yield process
        process.stdin.close()


def read(path):
    """Leaves and columns, as bits, without the clock."""
    with np.load(path) as archive:
        names = [n for n in archive.files if n not in ("column_seconds", "head")]
        return {name: archive[name].tobytes() for name in names}


def saved_step(path):
    with contextlib.suppress(FileNotFoundError), np.load(path) as archive:
        return int(archive["column_step"][-1])
    return 0


def test_twenty_kills_do_not_change_a_bit(server, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint, phase = folder / "run.npz", tmp_path / "phase"
    assert Child(server, "-", tmp_path / "expected.npz", phase).wait() == 0

    rng = np.random.default_rng(5)
    phases, steps, torn = [], [], 0
    for number in range(KILLS):
        before = saved_step(checkpoint)
        child = Child(server, checkpoint, tmp_path / "found.npz", phase)
        if number % 5:
            # Some way on, in one phase or the other, and a random moment later.
            wanted = WRITE if number % 2 else COMPUTE
            child.wait_for(wanted, before + int(rng.integers(1, 5)))
            time.sleep(rng.uniform(0, 0.006))
        else:
            time.sleep(rng.uniform(0, 0.2))
        assert child.kill() == signal.SIGKILL, "the kill must hit a living run"
        phases.append(child.told()[0])
        steps.append(saved_step(checkpoint))
        torn += any(name.endswith(".tmp") for name in os.listdir(folder))

    # The kills fell into all phases, some left half a file, and the run moved on.
    assert not (tmp_path / "found.npz").exists()
    assert steps == sorted(steps)
    assert len(set(steps)) >= KILLS // 3
    assert 0 < steps[-1] < STEPS
    assert phases.count(COMPUTE) >= 2
    assert phases.count(WRITE) >= 2
    assert phases.count(BEGIN) >= 1
    assert torn >= 1

    for left in folder.glob(".*.tmp"):
        # Half a file may be somebody's who still writes, until it is an hour old.
        os.utime(left, (0, 0))
    assert Child(server, checkpoint, tmp_path / "found.npz", phase).wait() == 0
    assert sorted(os.listdir(folder)) == ["run.npz", "run.npz.previous"]
    assert read(tmp_path / "found.npz") == read(tmp_path / "expected.npz")
    assert read(tmp_path / "found.npz").keys() >= {"leaf_0", "column_loss"}
