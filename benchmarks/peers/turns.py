"""How every part measures: contenders take turns, each blocked on its device."""

import importlib.metadata
import importlib.util
import os
import platform
import time

import jax
import numpy as np
import optax
from report import quartiles

import dbojax as dbo

PAUSE = 0.01  # s; threads of the contender before may still spin for a while
ENOUGH = 10.0  # s after which there are no more turns than these
FEW = 5


def threads():
    """Cores that this process may use, which is the size of XLA's pool."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def machine():
    """What every row of the files tells of where it was measured."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": threads(),
        "python": platform.python_version(),
        "dbojax": dbo.__version__,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
    }


def taken_in_turns(calls, repeats, prepare=lambda label: None):
    """Seconds of every call, by label; ``prepare`` comes before each, off the clock.

    A call returns once its result is there. The first round warms up; slow calls have
    fewer turns than ``repeats``.
    """
    times = {label: [] for label in calls}
    begin = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > FEW and time.perf_counter() - begin > ENOUGH:
            break
        for label, call in calls.items():
            prepare(label)
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            if repeat:
                times[label].append(time.perf_counter() - start)
    return times


def blocked(program, *args):
    """A call of a compiled program that waits for what it computes."""
    return lambda: jax.block_until_ready(program(*args))


def donated(program, state, *args):
    """A call of a program (state, ...) -> (state, ...) that takes its state over.

    Each call goes on from where the last one stopped, so that nothing is copied. Also
    what tells the state by then.
    """
    kept = [jax.tree.map(lambda leaf: leaf.copy(), state)]

    def call():
        kept[0], _ = jax.block_until_ready(program(kept[0], *args))

    return call, lambda: kept[0]


def times_base(times, label, base):
    """Time as a multiple of the median of ``base``, with quartiles."""
    return quartiles(np.divide(times[label], np.median(times[base])), 2)


def distance(found, exact):
    """Relative distance to what float64 gives."""
    found, exact = (np.asarray(a, np.float64) for a in (found, exact))
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def version(package):
    return importlib.metadata.version(package)


def is_there(package, module=None):
    """Whether a peer can be imported; says so in a line where it cannot."""
    found = importlib.util.find_spec(module or package) is not None
    if not found:
        print(f"{package} is not installed and left out.")
    return found
