"""Several processes of one script on this host: started, watched, ended together."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GRACE = 3.0  # seconds from SIGTERM to SIGKILL
PAUSE, LONGEST = 0.5, 10.0  # seconds before the first restart, and before any
# The kernel kills a child whose parent is gone (PR_SET_PDEATHSIG = 1), also if the
# parent had no time to do it; asked for by the child, then it becomes the script.
_TIED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


class Child(NamedTuple):
    """One process, with the threads that wait for its lines and for its end."""

    process: subprocess.Popen
    threads: tuple[threading.Thread, ...]


class End(NamedTuple):
    """How a process ended; a negative status is a signal, as in `subprocess`."""

    rank: int
    status: int


def launch(
    command: Sequence[str],
    processes: int,
    *,
    devices: int | None = None,
    restarts: int = 0,
    timeout: float | None = None,
    logs: str | os.PathLike | None = None,
) -> int:
    """Run a script as several processes that ``dbojax.devices.start`` joins.

    Process 0 has the terminal; of the others, the lines on stderr are passed on with
    their number in front, and stdout is kept in ``logs`` or nowhere. As soon as one
    fails, the others are ended and a sentence says which it was; then all are started
    again, if restarts are left, after half a second, then one, two, and so on up to
    ten. The script itself goes on from its checkpoint, with
    ``dbo.run(..., checkpoint=..., resume="auto")``.

    Whatever ends the launcher ends the processes. Where it has no time for that
    (SIGKILL), the kernel does it, on Linux alone; and it does not reach what the
    processes have started in turn. It sets nothing for GPUs: each process sees those
    that ``CUDA_VISIBLE_DEVICES`` lets it see.

    Args:
        command: what follows ``python``, e.g. ``["script.py", "--steps", "100"]`` or
            ``["-m", "package.module"]``.
        processes: how many.
        devices: virtual CPU devices of each; None leaves it to JAX.
        restarts: how many times all are started again.
        timeout: seconds that a process waits for the others; None for the usual.
        logs: folder for the output of process 1 and on, one file each.

    Returns:
        The exit status: 0, that of the process that failed, or 128 plus its signal.

    Raises:
        ValueError: if a number is out of range, or there is no such script.
    """
    _check(command, processes, devices, restarts, timeout)
    folder = None if logs is None else Path(logs)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while True:
        environment = _environment(processes, devices, timeout)
        with _signals(), _children(command, environment, folder, attempt) as children:
            failed = _first_failure(children)
        if failed is None:
            return 0
        what = f"process {failed.rank} of {processes} {_fate(failed.status)}"
        if attempt == restarts:
            _write(f"dbojax launch: {what}.")
            return failed.status if failed.status > 0 else 128 - failed.status
        attempt += 1
        _write(f"dbojax launch: {what}; restart {attempt} of {restarts}.")
        with _signals():
            time.sleep(min(PAUSE * 2.0 ** min(attempt - 1, 9), LONGEST))


def _check(command, processes, devices, restarts, timeout) -> None:
    for flag, value, least in (
        ("-n", processes, 1),
        ("--devices", devices, 1),
        ("--restarts", restarts, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} must be at least {least}, got {value}.")
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"--timeout is a number of seconds > 0, got {timeout}.")
    if command[0] != "-m" and not Path(command[0]).exists():
        raise ValueError(
            f"there is no script {command[0]!r}. Write its path, or `-m` and the name "
            "of a module."
        )


def _environment(processes, devices, timeout) -> dict[str, str]:
    """What all processes share; the port is a new one each time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    found = dict(
        os.environ,
        JAX_COORDINATOR_ADDRESS=address,
        JAX_COORDINATOR_BIND_ADDRESS=address,  # no other host is expected
        DBOJAX_PROCESSES=str(processes),
    )
    if any(found.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        # gRPC would go to this very host by the proxy. Without a variable of its own
        # it reads the general one. (Where there is no proxy, JAX warns of the name.)
        direct = found.get("no_grpc_proxy") or found.get("no_proxy")
        found["no_grpc_proxy"] = ",".join(filter(None, (direct, "127.0.0.1")))
    # Or what a process has printed would be lost when it is killed.
    found.setdefault("PYTHONUNBUFFERED", "1")
    if devices is not None:
        found["JAX_NUM_CPU_DEVICES"] = str(devices)
        found.setdefault("JAX_PLATFORMS", "cpu")
    if timeout is not None:
        found["DBOJAX_TIMEOUT"] = str(timeout)
    return found


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM leave by the way that ends the children, once."""
    both = (signal.SIGINT, signal.SIGTERM)

    def leave(number, frame):
        del frame
        for other in both:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in both}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _children(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None,
    attempt: int,
) -> Iterator[tuple[list[Child], queue.SimpleQueue]]:
    """All processes and the queue of their ends; none of them outlives the block."""
    children: list[Child] = []
    ends: queue.SimpleQueue[End] = queue.SimpleQueue()
    try:
        for rank in range(int(environment["DBOJAX_PROCESSES"])):
            log = folder / f"process_{rank}.log" if folder and rank else None
            if log and not attempt:
                log.unlink(missing_ok=True)
            own = {**environment, "DBOJAX_PROCESS": str(rank)}
            children.append(_child(rank, command, own, log, ends))
        yield children, ends
    finally:
        _end(children)


def _child(rank, command, environment, log: Path | None, ends) -> Child:
    tied: list[Any] = [sys.executable]
    if sys.platform == "linux":
        tied += ["-I", "-S", "-c", _TIED, str(os.getpid())]
    files = [log.open("ab", buffering=0) if log else None for _ in range(2)]
    process = subprocess.Popen(
        [*tied, *command],
        env=environment,
        stdin=None if rank == 0 else subprocess.DEVNULL,
        # Not the file itself: a full disk would end the process.
        stdout=None if rank == 0 else subprocess.PIPE if log else subprocess.DEVNULL,
        stderr=None if rank == 0 else subprocess.PIPE,
    )
    jobs = [lambda: ends.put(End(rank, process.wait()))]
    if process.stdout:
        jobs.append(lambda: _pass_on(process.stdout, files[0], None))
    if process.stderr:
        jobs.append(lambda: _pass_on(process.stderr, files[1], rank))
    threads = tuple(threading.Thread(target=job, daemon=True) for job in jobs)
    for thread in threads:
        thread.start()
    return Child(process, threads)


def _pass_on(stream: Any, file: Any, rank: int | None) -> None:
    """Lines to the file and, with the number of the process in front, on stderr.

    They are read to the end, come what may: who writes into a closed pipe is killed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream)
        if file:
            stack.enter_context(file)
        for line in stream:
            try:
                if file:
                    file.write(line)
            except OSError as error:
                _write(f"dbojax launch: {file.name} is no longer complete: {error}.")
                file = None
            if rank is not None:
                text = line.decode(errors="replace").rstrip("\n")
                _write(f"[{rank}] {text}")


def _first_failure(running: tuple[list[Child], queue.SimpleQueue]) -> End | None:
    children, ends = running
    for _ in children:
        if (end := ends.get()).status:
            return _culprit(end, ends)
    return None


def _culprit(end: End, ends: queue.SimpleQueue) -> End:
    """Of those that fell together, one that was killed by other hands.

    The rest follow within milliseconds: JAX raises, or aborts, where a peer is lost.
    """
    found = [end]
    time.sleep(0.02)
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(ends.get_nowait())
    killed = [end for end in found if end.status < 0 and end.status != -signal.SIGABRT]
    return killed[0] if killed else end


def _end(children: Sequence[Child]) -> None:
    """SIGTERM to those that are left, SIGKILL to those that stay."""
    for child in children:
        child.process.terminate()
    limit = time.monotonic() + GRACE
    for child in children:
        try:
            child.process.wait(max(limit - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.process.kill()
    for child in children:
        child.process.wait()
        for thread in child.threads:
            thread.join(1)  # a grandchild may hold the pipe


def _fate(status: int) -> str:
    if status > 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    why = {"SIGKILL": " (was memory short?)", "SIGABRT": " (JAX lost a peer?)"}
    return f"was killed by {name}{why.get(name, '')}"


def _write(line: str) -> None:
    with contextlib.suppress(OSError):  # a full disk is no reason to end the run
        sys.stderr.write(line + "\n")  # in one piece, or threads would mix their lines
        sys.stderr.flush()
