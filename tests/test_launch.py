import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dbojax
from dbojax import cli, launch

# Together, several nodes' worth of values on two processes with two devices each;
# then one is killed in the first attempt, fails in the second, leaves in the third.
TOGETHER = """
import os, signal, sys, time
from pathlib import Path
from dbojax import devices

devices.start()
import jax, jax.numpy as jnp, numpy as np

rank, count = jax.process_index(), jax.device_count()
mesh = jax.make_mesh((count,), ("nodes",), axis_types=(jax.sharding.AxisType.Auto,))
each = jax.NamedSharding(mesh, jax.P("nodes"))
ones_to_count = np.arange(1.0, count + 1)
x = jax.make_array_from_callback((count,), each, ones_to_count.__getitem__)
square = jax.jit(lambda x: jnp.vdot(x, x))
found = float(square(x))
devices.start()
devices.mesh(count)
told = {"DBOJAX_PROCESSES", "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"}
assert not told & set(os.environ), "what is started from here would join as well"
assert jax.config.read("jax_cuda_visible_devices") == "all", "one GPU for all processes"
print(f"process {rank} says {found}")
print("and complains", file=sys.stderr)
folder = Path(sys.argv[1])
attempt = len(list(folder.glob(f"{rank}_*.npy")))
facts = [jax.process_count(), jax.local_device_count(), devices.is_first(), found]
np.save(folder / f"{rank}_{attempt}.npy", facts)
while True:
    square(x).block_until_ready()
    if rank == 1:
        (folder / f"failed_{attempt}").touch()
        if attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == 2:
            sys.exit(4)
        raise RuntimeError("one process alone meets this")
"""
# Tells its process id, and stays until it is ended, which it resists.
STAYS = """
import os, signal, sys, time
from pathlib import Path

signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder, rank = Path(sys.argv[1]), os.environ["DBOJAX_PROCESS"]
(folder / f"new_{rank}").write_text(str(os.getpid()))
(folder / f"new_{rank}").rename(folder / f"pid_{rank}")
for _ in range(6000):
    if rank == sys.argv[2] and len(list(folder.glob("pid_*"))) == 3:
        sys.exit(7)
    time.sleep(0.01)
"""


def write(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def alive(pid):
    """Whether a process runs; one that nobody has buried yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def pids(folder, count=2):
    wait_for(lambda: len(list(folder.glob("pid_*"))) == count)
    return [int(path.read_text()) for path in folder.glob("pid_*")]


def test_processes_meet_fail_and_start_again(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(dbojax.__file__).parents[1]))
    # All of these must not matter: a proxy that is not there, and one task of SLURM.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("SLURM_NTASKS", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"):
        monkeypatch.setenv(name, "0")
    logs, begin = tmp_path / "logs", time.time()
    script = write(tmp_path, TOGETHER)
    command = [script, str(tmp_path)]
    assert launch.launch(command, 2, devices=2, restarts=2, logs=logs) == 4

    # 1 + 4 + 9 + 16, over both processes, in each of three attempts.
    for rank in range(2):
        for attempt in range(3):
            facts = np.load(tmp_path / f"{rank}_{attempt}.npy")
            assert facts.tolist() == [2, 2, rank == 0, 30]
    out, err = capfd.readouterr()
    assert out.count("process 0 says 30.0") == 3
    assert "process 1 says" not in out
    assert (logs / "process_1.log").read_text().count("process 1 says 30.0") == 3
    assert "[1] and complains" in err
    lines = err.splitlines()
    assert "and complains" in lines
    assert "dbojax launch: process 1 of 2 was killed by SIGKILL" in err
    assert "restart 1 of 2" in err
    assert "[1] RuntimeError: one process alone meets this" in lines
    assert "dbojax launch: process 1 of 2 ended with exit status 1; restart 2" in err
    assert lines[-1] == "dbojax launch: process 1 of 2 ended with exit status 4."
    # JAX alone would keep the survivor for a heartbeat, and in the other attempts both
    # of them until its shutdown times out.
    marks = [begin, *((tmp_path / f"failed_{i}").stat().st_mtime for i in range(3))]
    assert marks == sorted(marks)
    assert time.time() - marks[1] < 40


def test_restarts_are_bounded_and_the_status_is_that_of_the_script(
    tmp_path, capfd, monkeypatch
):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(launch, "LONGEST", 0.8)
    script = write(
        tmp_path,
        "import os, sys; open(sys.argv[1], 'a').write(os.environ['DBOJAX_PROCESS'])\n"
        "sys.exit(5)",
    )
    assert launch.launch([script, str(tmp_path / "tries")], 1, restarts=2) == 5
    assert (tmp_path / "tries").read_text() == "000"
    assert [pause for pause in slept if pause > 0.1] == [0.5, 0.8]
    told = "dbojax launch: process 0 of 1 ended with exit status 5"
    assert capfd.readouterr().err.splitlines() == [
        f"{told}; restart 1 of 2.",
        f"{told}; restart 2 of 2.",
        f"{told}.",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_process_does_not_die_of_a_full_disk_under_its_log(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(launch, "PAUSE", 0.01)
    script = write(
        tmp_path,
        "import os, sys\n"
        "if os.environ['DBOJAX_PROCESS'] == '1':\n"
        "    log = sys.argv[1] + '/process_1.log'\n"
        "    if not os.path.islink(log):\n"
        "        os.remove(log)\n"
        "        os.symlink('/dev/full', log)\n"
        "        sys.exit(3)\n"
        "    for i in range(3000):\n"
        "        print('as many')\n"
        "        print('line', i, 'of many that no pipe holds', file=sys.stderr)",
    )
    assert launch.launch([script, str(tmp_path)], 2, restarts=1, logs=tmp_path) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "[1] line 2999 of many that no pipe holds"
    assert sum("no longer complete" in line for line in lines) == 2, "of two streams"


def test_each_start_takes_a_port_of_its_own_and_shares_it(tmp_path, monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    script = write(
        tmp_path,
        "import os, sys\n"
        "names = ['JAX_COORDINATOR_ADDRESS', *sys.argv[2:]]\n"
        "path = sys.argv[1] + '_' + os.environ['DBOJAX_PROCESS']\n"
        "print(*(os.environ[name] for name in names), file=open(path, 'a'))\n"
        "sys.exit(os.environ['DBOJAX_PROCESS'] == '0' and len(open(path).read()) < 70)",
    )
    names = ["DBOJAX_PROCESSES", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS"]
    path = tmp_path / "seen"
    command = [script, str(path), *names, "DBOJAX_TIMEOUT", "no_grpc_proxy"]
    monkeypatch.setattr(launch, "PAUSE", 0.01)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert launch.launch(command, 2, devices=3, restarts=1, timeout=9) == 0
    first, second = ((tmp_path / f"seen_{i}").read_text().splitlines() for i in (0, 1))
    assert first[-1] == second[-1]
    assert len({line.split()[0] for line in first}) == len(first) == 2
    assert first[-1].split()[1:] == ["2", "3", "cpu", "9", "example.org,127.0.0.1"]


def test_the_others_are_ended_even_if_they_resist(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.2)
    begin = time.monotonic()
    script = write(tmp_path, STAYS)
    assert launch.launch([script, str(tmp_path), "2"], 3) == 7
    assert time.monotonic() - begin < 10
    assert "process 2 of 3 ended with exit status 7" in capfd.readouterr().err
    assert not any(map(alive, pids(tmp_path, 3)))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel, by /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_launcher(tmp_path, number):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import launch\n"
    code += "launch.GRACE = 0.2; sys.exit(launch.launch(sys.argv[2:], 2))"
    script = write(tmp_path, STAYS)
    package = Path(launch.__file__).parent
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, package, script, tmp_path, "none"],
        stderr=subprocess.DEVNULL,
    )
    found = pids(tmp_path)
    assert all(map(alive, found))
    os.kill(launcher.pid, number)
    status = launcher.wait(10)
    assert status == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not any(map(alive, found)))


def test_the_command_line_runs_modules_and_passes_arguments_on(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "told.py").write_text("import sys; print(__name__, sys.argv[1:])")
    line = ["launch", "-n", "2", "-m", "told", "--devices", "7", "--", "-m"]
    assert cli.main(line) == 0
    assert capfd.readouterr().out == "__main__ ['--devices', '7', '--', '-m']\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n", "0", __file__], "-n must be at least 1, got 0"),
        (["-n", "2", "--devices", "0", __file__], "--devices must be at least 1"),
        (["-n", "2", "--restarts", "-1", __file__], "--restarts must be at least 0"),
        (["-n", "2", "--timeout", "0", __file__], "--timeout is a number of seconds"),
        (["-n", "2", "--timeout", "inf", __file__], "a number of seconds > 0, got inf"),
        (["-n", "2", "no_such_script.py"], "there is no script 'no_such_script.py'"),
        (["-n", "2", "--", "no_such.py", "--"], "there is no script 'no_such.py'"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(options, message, capsys):
    assert cli.main(["launch", *options]) == 2
    assert message in capsys.readouterr().err
