"""A run whose process is killed ends as one that nobody disturbed."""

import os
import subprocess
import sys
from pathlib import Path

import fault_worker
import jax
import numpy as np
import pytest

import dbojax as dbo


@pytest.mark.skipif(sys.platform == "win32", reason="gloo needs POSIX")
def test_a_killed_process_costs_one_chunk_and_no_bit(tmp_path):
    command = [sys.executable, "-m", "dbojax", "launch", "-n", "2", "--devices", "2"]
    command += ["--restarts", "1", fault_worker.__file__, str(tmp_path)]
    here = Path(fault_worker.__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    ended = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "process 1 of 2 was killed by SIGKILL" in ended.stderr
    assert "restart 1 of 1" in ended.stderr
    # Of the chunk from step 10 on, it had asked for two batches.
    steps = list(map(int, (tmp_path / "steps").read_text("ascii").split()))
    assert steps == [*range(12), *range(10, 20)]

    mesh = dbo.devices.mesh(fault_worker.NODES, devices=jax.devices()[:1])
    state, history = fault_worker.walk(mesh, fault_worker.batch_at)
    with np.load(tmp_path / "end.npz") as found:
        np.testing.assert_array_equal(found["state"], state)
        for name in sorted(set(history) - {"seconds"}):
            np.testing.assert_allclose(found[name], history[name], rtol=1e-12)
