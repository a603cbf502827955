"""A supervised run, one process of which may be killed, and what its log tells."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent


class Run(NamedTuple):
    """What became of a run."""

    seconds: float  # from the moment when all processes are there
    killed: float | None  # at which second; None if the process had ended
    first: dict  # rank -> process id, in the first attempt
    out: dict  # arrays by name
    told: str  # what the launcher and the processes wrote to stderr


def start(case, processes, devices=1, restarts=0):
    """Start `dbojax launch`, with what it says in a file."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    options = ["-n", processes, "--devices", devices, "--restarts", restarts]
    script = [HERE / "fault_worker.py", json.dumps(case)]
    command = [sys.executable, "-m", "dbojax", "launch", *options, *script]
    with open(Path(case["folder"]) / "stderr", "w", encoding="utf-8") as file:
        return subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={**os.environ, "PYTHONPATH": paths},
        )


def ranks(launcher):
    """Rank -> process id of the processes that the launcher has started."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent != launcher.pid:
                continue
            environment = stat.with_name("environ").read_bytes().split(b"\0")
        except (OSError, ValueError):  # it has just ended
            continue
        pairs = dict(entry.partition(b"=")[::2] for entry in environment)
        if b"DBOJAX_PROCESS" in pairs:
            found[int(pairs[b"DBOJAX_PROCESS"])] = int(stat.parent.name)
    return found


def after(second):
    """Wait for a moment; tell whether the run lasts until then."""

    def wait(launcher, log):
        del log
        try:
            launcher.wait(second)
        except subprocess.TimeoutExpired:
            return True
        return False

    return wait


def amid_checkpoint(number, delay):
    """Wait until a process is some seconds into its checkpoint of that number."""

    def wait(launcher, log):
        while launcher.poll() is None:
            if log.exists() and log.read_text("ascii").count("checkpoint") >= number:
                time.sleep(delay)
                return True
            time.sleep(0.001)
        return False

    return wait


def supervise(case, processes, rank=0, wait=None):
    """Run to the end; a rank is killed when ``wait`` returns."""
    folder = Path(case["folder"])
    folder.mkdir(parents=True)
    launcher = start(case, processes, restarts=1)
    first = {}
    while len(first) < processes and launcher.poll() is None:
        time.sleep(0.005)
        first = ranks(launcher)
    begin, killed = time.monotonic(), None
    if wait and wait(launcher, folder / f"log_{rank}") and rank in ranks(launcher):
        os.kill(first[rank], signal.SIGKILL)
        killed = time.monotonic() - begin
    status = launcher.wait()
    seconds = time.monotonic() - begin
    told = (folder / "stderr").read_text("utf-8")
    if status:
        raise SystemExit(f"A supervised run ended with status {status}:\n{told}")
    return Run(seconds, killed, first, load(case["out"]), told)


def load(path):
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def same(a, b):
    """Whether two ends have the same bits, the history included."""
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def counted(case, run, rank):
    """Steps before and after the restart, and what the killed process was at."""
    begun, resumed, doing = 0, case["steps"], "start-up"
    for path in Path(case["folder"]).glob("log_*"):
        lines = [line.split() for line in path.read_text("ascii").splitlines()]
        for pid, event, step, _ in lines:
            if int(pid) not in run.first.values():
                if event == "steps":
                    resumed = min(resumed, int(step))
                continue
            if event == "steps":
                begun = max(begun, int(step) + case["every"])
            if int(pid) == run.first[rank]:
                doing = event
    return {
        "while": doing,
        "steps begun": begun,
        "checkpoint at": resumed,
        "steps repeated": begun - resumed,
    }
