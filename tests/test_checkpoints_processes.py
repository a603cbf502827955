"""A run over two processes, one of which is killed, goes on in one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from peer_worker import EVERY, STEPS, rows_of
from runner_methods import noisy

import dbojax as dbo
from dbojax.runner import checkpoints


def start_both(folder):
    here, package = Path(__file__).parent, Path(dbo.__file__).parents[1]
    path = os.pathsep.join([str(package), str(here)])
    settings = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [
                sys.executable,
                here / "peer_worker.py",
                *(str(rank), port, folder / "run.npz", folder / "seen.json"),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | settings,
        )
        for rank in range(2)
    ]


def test_a_killed_process_costs_one_chunk_and_the_run_goes_on_in_one(tmp_path):
    both = start_both(tmp_path)
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, -signal.SIGKILL], errors
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert f"run.npz, stands at step {STEPS - EVERY}." in seen["lost"]
    assert 'resume="auto"' in seen["lost"]
    assert "need the same `key`" in seen["disagree"]
    assert "need the same `evaluate`" in seen["evaluate"]
    # Only the first process shows its progress, and it read its own part alone.
    assert ["step/s" in text or "s/step" in text for text in errors] == [True, False]
    assert seen["step"] == STEPS - EVERY
    assert len(seen["opened"]) == 1
    assert ".part-00000-of-00002-" in seen["opened"][0]
    parts = [p.stat().st_size for p in tmp_path.glob(f"*.{seen['step']}.part-*")]
    assert len(parts) == 2

    state, sampler = rows_of(jnp.asarray)
    assert seen["digest"] == checkpoints.digest(state)
    rest = {"every": EVERY, "evaluate": lambda state: {"step_now": int(state.count)}}
    key = jax.random.key(7)
    file = tmp_path / "run.npz"
    found, rows = dbo.run(noisy(), key, state, sampler, STEPS, checkpoint=file, **rest)
    wanted, history = dbo.run(noisy(), key, state, sampler, STEPS, **rest)
    for one, other in zip(found[:3], wanted[:3], strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert rows.evaluated()["step_now"].tolist() == [4, 8, 12]
    np.testing.assert_allclose(rows["upper"], history["upper"], rtol=1e-12)
