import subprocess
import sys
from pathlib import Path

import jax
import pytest

import dbojax
from dbojax import devices

# In a fresh process, since each of these must come before JAX is used.
ALONE = """
import os, socket, sys, time
from dbojax import devices

os.environ["OMPI_COMM_WORLD_SIZE"] = "4"
try:
    devices.start()
except ValueError as error:
    print("ValueError", error)
del os.environ["OMPI_COMM_WORLD_SIZE"]

with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    try:
        devices.start(coordinator=address, processes=2, process=0)
    except RuntimeError as error:
        print("RuntimeError", error)

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{probe.getsockname()[1]}"
os.environ |= {"DBOJAX_PROCESSES": "3", "DBOJAX_PROCESS": sys.argv[1]}
os.environ["DBOJAX_TIMEOUT"] = "0.5"
os.environ["https_proxy"] = "http://127.0.0.1:9"
begin = time.monotonic()
try:
    devices.start()
except TimeoutError as error:
    print("TimeoutError", time.monotonic() - begin < 10, error)
    raise
"""


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (0, "and not all of the others (process 1, 2) have come"),
        (2, "where process 0 does not answer"),
    ],
)
def test_a_missing_peer_is_told_in_time(process, message):
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, str(process)],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=Path(dbojax.__file__).parents[1],
    )
    first, taken, second = ended.stdout.splitlines()
    assert "ValueError OMPI_COMM_WORLD_SIZE = 4 says" in first
    assert "RuntimeError The port of 127.0.0.1:" in taken
    assert "is in use on this host. Choose another one" in taken
    assert "TimeoutError True" in second
    assert f"Process {process} of 3 has waited 0.5 s at 127.0.0.1" in second
    assert message in second
    assert "Should https_proxy apply? If not, set no_grpc_proxy." in second
    assert ended.returncode == 1, "not by an abort of JAX"


def test_a_process_alone_is_the_first_and_joins_nothing():
    jax.devices()
    devices.start()
    devices.start()
    devices.start(coordinator="localhost:1", processes=1, process=0)
    assert devices.is_first()
    assert not jax.distributed.is_initialized()


def test_joining_too_late_is_an_error():
    jax.devices()
    with pytest.raises(RuntimeError, match="came too late: JAX has already been used"):
        devices.start(coordinator="localhost:1", processes=2, process=0)


def test_the_launchers_word_counts(monkeypatch):
    monkeypatch.setenv("DBOJAX_PROCESSES", "2")
    monkeypatch.setenv("DBOJAX_PROCESS", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(ValueError, match="`process` must be an int from 0 to"):
        devices.start()
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    with pytest.raises(
        ValueError, match="The environment of `dbojax launch` lacks coord"
    ):
        devices.start()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processes": 4}, "`start` lacks coordinator and process"),
        ({"coordinator": "host:1", "process": 1}, "`start` lacks processes"),
        ({"coordinator": "host", "processes": 4, "process": 1}, "'host:port'"),
        ({"coordinator": "host:x", "processes": 4, "process": 1}, "'host:port'"),
        ({"coordinator": "host:99999", "processes": 4, "process": 1}, "'host:port'"),
        ({"coordinator": "host:1", "processes": 0, "process": 0}, "int >= 1, got 0"),
        ({"coordinator": "host:1", "processes": 4, "process": 4}, "from 0 to .* = 3"),
        ({"coordinator": "host:1", "processes": 4, "process": -1}, "got -1"),
        ({"timeout": 0}, "`timeout` is a number of seconds > 0, got 0"),
        ({"heartbeat": float("nan")}, "`heartbeat` is a number of seconds > 0"),
    ],
)
def test_what_does_not_fit_together_is_told_before_any_connection(arguments, message):
    with pytest.raises(ValueError, match=message):
        devices.start(**arguments)
