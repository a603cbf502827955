"""Joining the other processes of a run, and leaving them without a hang."""

from __future__ import annotations

import atexit
import contextlib
import errno
import math
import os
import socket
import sys
import threading
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.devices.meshes import PROCESSES

# What `dbojax launch` sets, beside JAX's own `JAX_COORDINATOR_ADDRESS`.
_PROCESS, _TIMEOUT = "DBOJAX_PROCESS", "DBOJAX_TIMEOUT"
_ADDRESS, _BIND = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"
# Set by starters of many processes, each with the number of processes it started.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
# The processes leave together. The first to reach its end may wait long for one that
# still evaluates and draws; that all are alive is the heartbeat's affair.
_LEAVE = 3600
# gRPC goes by the first that is set.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


class _Peers(NamedTuple):
    coordinator: str  # host:port of process 0
    processes: int
    process: int


def start(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: float | None = None,
    heartbeat: float = 10,
) -> None:
    """Join the other processes of this run, if there are any.

    Call it first, after ``jax.config.update`` and before anything computes: JAX then
    sees the devices of all processes as one list. A script that is started alone is
    one process, and the call does nothing; a second call does nothing either. Every
    process runs the same script, and finds the others in one of these ways.

    One host:
        ``dbojax launch -n 4 script.py`` starts the processes, tells each its number,
        ends all when one dies, and can start them again (``--restarts``).
    SLURM:
        ``srun --ntasks=4 python script.py``. Inside ``sbatch`` it is still ``srun``
        that starts the processes.
    Open MPI 4:
        ``mpirun -n 4 python script.py``. JAX 0.10 does not recognise Open MPI 5, MPICH
        or Intel MPI: pass the arguments, the last two from the environment
        (``OMPI_COMM_WORLD_SIZE`` and ``OMPI_COMM_WORLD_RANK``, or ``PMI_SIZE`` and
        ``PMI_RANK``).
    Kubernetes:
        an Indexed Job with a headless service, and ``pip install "jax[k8s]"``.
    TPU pods:
        the same command on every host.
    Anything else:
        the three arguments, the same on all hosts but for ``process``. Every host must
        reach the port of ``coordinator``; on CPUs, exchanges go to the address that a
        host's own name resolves to, which must not be a loopback address.

    A process that ends by an uncaught exception, or by ``sys.exit`` with a status other
    than 0, leaves at once. Without that it would wait in JAX for the others to finish,
    and they for its part of an exchange. For that ``start`` puts a function of its own
    in place of ``sys.exit``; ``raise SystemExit``, ``exit()`` and a name imported from
    ``sys`` before go past it, and still wait. A peer that falls silent ends all others
    after ``heartbeat`` seconds, earlier if they are amid an exchange. JAX's preemption
    service is switched off, since it would keep SIGTERM from ending a process.

    What ``dbojax launch`` has told of the others leaves the environment, so that the
    processes which a script starts in turn do not join too. Where it tells them, or
    the arguments do, JAX does not choose a GPU for each process: that is up to
    ``CUDA_VISIBLE_DEVICES`` or ``JAX_LOCAL_DEVICE_IDS``.

    Args:
        coordinator: ``"host:port"`` of process 0, any free port.
        processes: how many there are.
        process: the number of this one, from 0.
        timeout: seconds to wait for all to come; 60, or what ``dbojax launch
            --timeout`` says.
        heartbeat: seconds of silence after which a process counts as dead.

    Raises:
        ValueError: if some of the three arguments are missing or do not fit together,
            or if several processes were started in a way that JAX does not recognise.
        RuntimeError: if JAX has been used before, or has failed to connect, e.g. since
            the port of the coordinator is in use.
        TimeoutError: if some process has not come in time. End the process then: JAX
            goes on to wait, and aborts it half a minute later.

    Examples:
        >>> dbo.devices.start()  # alone: one process
        >>> dbo.devices.is_first(), jax.process_count()
        (True, 1)
    """
    if timeout is None:
        timeout = float(os.environ.get(_TIMEOUT) or 60)
    for name, value in (("timeout", timeout), ("heartbeat", heartbeat)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` is a number of seconds > 0, got {value!r}.")
    given = coordinator, processes, process
    peers = _told() if given == (None, None, None) else _checked(given, "`start`")
    if jax.distributed.is_initialized() or (peers and peers.processes == 1):
        return
    claims = _claims()
    if not (peers or claims or "TPU_ML_PLATFORM" in os.environ):  # set by JAX itself
        return
    if peers and not peers.process:
        _check_port(peers.coordinator)
    jax.config.update("jax_enable_preemption_service", False)
    if _join(peers, timeout, math.ceil(heartbeat), late=bool(peers or claims)):
        for name in (PROCESSES, _ADDRESS, _BIND):
            os.environ.pop(name, None)
        _meet()
        return
    if claims:
        raise ValueError(
            f"{claims[0]} = {os.environ[claims[0]]} says that this process has peers, "
            "but JAX does not recognise how they were started. Write "
            "`start(coordinator='host:port', processes=..., process=...)`."
        )


def is_first() -> bool:
    """Whether this is process 0, the one that logs, draws and writes.

    Examples:
        >>> dbo.devices.is_first()  # alone, it is
        True
    """
    return jax.process_index() == 0


def _checked(peers: Any, where: str) -> _Peers:
    """Peers that may be connected to."""
    coordinator, processes, process = peers
    wanted = "Write coordinator='host:port', processes=4, process=0 (to 3), or nothing."
    if None in peers:
        missing = [n for n, a in zip(_Peers._fields, peers, strict=True) if a is None]
        raise ValueError(f"{where} lacks {' and '.join(missing)}. {wanted}")
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"`coordinator` must be 'host:port', got {coordinator!r}.")
    if not isinstance(processes, int) or processes < 1:
        raise ValueError(f"`processes` must be an int >= 1, got {processes!r}.")
    if not isinstance(process, int) or not 0 <= process < processes:
        raise ValueError(
            f"`process` must be an int from 0 to processes - 1 = {processes - 1}, got "
            f"{process!r}."
        )
    return _Peers(coordinator, processes, process)


def _told() -> _Peers | None:
    """What the launcher has put into the environment."""
    if PROCESSES not in os.environ:
        return None
    address = os.environ.get(_ADDRESS)
    numbers = (os.environ.get(name) for name in (PROCESSES, _PROCESS))
    peers = (address, *(None if n is None else int(n) for n in numbers))
    return _checked(peers, "The environment of `dbojax launch`")


def _claims() -> list[str]:
    """Variables of the environment that tell of peers."""
    sizes = {name: os.environ.get(name, "") for name in _SIZES}
    many = [n for n, size in sizes.items() if size.isdigit() and int(size) > 1]
    # Kubernetes itself tells of none: most of its pods are alone.
    return many + [n for n in ("JOB_COMPLETION_INDEX",) if n in os.environ]


def _check_port(coordinator: str) -> None:
    """Refuse a port that is in use: JAX would crash on it."""
    host = os.environ.get(_BIND, "").rpartition(":")[0]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(coordinator.rpartition(":")[2])))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise RuntimeError(
                    f"The port of {coordinator} is in use on this host. Choose another "
                    "one, the same for all processes."
                ) from error


def _join(peers: _Peers | None, timeout: float, heartbeat: int, late: bool) -> bool:
    """Connect, in a thread: JAX itself would abort the process, without a word."""
    outcome: list[BaseException] = []

    def connect():
        try:
            coordinator, processes, process = peers or (None, None, None)
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                # Or in a SLURM allocation all that one task starts get its one GPU.
                cluster_detection_method="deactivate" if peers else None,
                initialization_timeout=math.ceil(timeout) + 30,
                heartbeat_timeout_seconds=heartbeat,
                shutdown_timeout_seconds=_LEAVE,
            )
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    waiting = thread.is_alive()
    if waiting or not outcome:
        _leave_if_failed()
    if waiting:
        raise TimeoutError(_missing(peers, timeout))
    if not outcome:
        return True
    (error,) = outcome
    if peers is None and "coordinator_address should be defined" in str(error):
        return False
    if "before any JAX calls" in str(error):
        if not late:
            return False
        raise RuntimeError(
            "`dbo.devices.start()` came too late: JAX has already been used, and sees "
            "the devices of this process alone. Call it before anything that computes "
            "or asks for devices."
        ) from error
    raise error


def _meet() -> None:
    """A first exchange between all devices, while all processes are sure to be here.

    gloo gives those that come to it first 30 s, and no limit to later ones.
    """
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("nodes",), axis_types=kinds)
    each = jax.NamedSharding(mesh, jax.P("nodes"))
    ones = np.ones(jax.device_count(), np.float32)
    met = jnp.sum(jax.make_array_from_callback(ones.shape, each, ones.__getitem__))
    met.block_until_ready()  # or a script that ends now leaves amid the exchange


def _missing(peers: _Peers | None, timeout: float) -> str:
    """Who was expected, and what to look at."""
    proxies = [name for name in _PROXIES if os.environ.get(name)]
    hint = f" Should {' and '.join(proxies)} apply? If not, set no_grpc_proxy."
    hint = hint if proxies else ""
    if peers is None:
        return (
            f"The other processes have not come within {timeout:g} s. Were all of them "
            "started, and can they reach each other? Give a longer `timeout` if some "
            f"are slow to start.{hint}"
        )
    coordinator, processes, process = peers
    others = [str(i) for i in range(processes) if i != process]
    listed = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
    told = f"process {process} of {processes} has waited {timeout:g} s at {coordinator}"
    if process and not _answers(coordinator):
        return (
            f"{told.capitalize()}, where process 0 does not answer. Was it started, is "
            f"that its address, and is the port open?{hint}"
        )
    return (
        f"{told.capitalize()}, and not all of the others (process {listed}) have come. "
        f"Were all {processes} started, each with a `process` of its own, and can they "
        "reach that address? Give a longer `timeout` if some are slow to start."
        f"{hint}"
    )


def _answers(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _leave_if_failed() -> None:
    """End a process that has failed, before JAX waits for the others.

    At its end an interpreter has forgotten the status that it was asked for.
    """
    status, plain = [0], sys.exit

    def leave(code: Any = None, /) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            known = code is None or isinstance(code, int)
            status[0] = (code or 0) & 0xFF if known else 1
        plain(code)

    def leave_at_once():
        error = getattr(sys, "last_value", None)
        if error is not None:
            status[0] = 130 if isinstance(error, KeyboardInterrupt) else 1
        if not status[0]:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status[0])

    sys.exit = leave
    atexit.register(leave_at_once)  # after JAX's own, and hence before it
