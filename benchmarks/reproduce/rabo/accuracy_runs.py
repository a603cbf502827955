"""One entry of the comparison on all its deals of the data, in one program."""

from typing import NamedTuple

import accuracy_judge as judge
import jax
import jax.numpy as jnp
import numpy as np
from accuracy_methods import METHODS, PARTICIPANTS
from accuracy_problems import of_clients

import dbojax as dbo

EVALUATIONS = 10


class Outcome(NamedTuple):
    """What one entry came to; rows are runs."""

    steps: np.ndarray  # rounds at which it was judged
    watched: np.ndarray  # (evaluations, runs), accuracy with one head
    own: np.ndarray | None  # (runs,), with own heads, at the end
    trained: np.ndarray | None  # (runs,), with the y that the method has, at the end
    megabytes: float  # per round, up and down, all participants
    up: float  # of them up
    coverage: dict  # name -> (smallest, mean) over rounds and runs
    seconds: float  # of all runs together, device blocked
    compile_seconds: float
    rounds: int


def rounds_of(entry, rounds):
    """As many visits of clients for all: fewer who take part come more often."""
    return rounds * PARTICIPANTS // entry.participants


def outcome(entry, runs, pairs, rounds, seed=0, final=True):
    """Run one entry; each run has its own pair of steps."""
    fleet = entry.fleet_of(runs)
    problem = runs.problem

    def build(pair):
        return METHODS[entry.method](problem, fleet, pair[0], pair[1])

    method = dbo.sweep(build, jnp.asarray(pairs, jnp.float32))
    state = method.init(
        *(jax.tree.map(lambda leaf: leaf[:, None], v) for v in (runs.x0, runs.y0))
    )
    length = rounds_of(entry, rounds)
    watch = judge.along(runs)
    state, history = dbo.run(
        method,
        jax.random.key(seed),
        state,
        of_clients(runs, entry.members).batch,
        length,
        evaluate=lambda state: {"watched": watch(first(state.x))},
        every=length // EVALUATIONS,
        stop_on_nonfinite=False,
    )
    rows = history.evaluated()
    x = first(state.x)
    y = state.y if entry.personal else first(state.y)
    # Heads of clients that never take part do not exist.
    there = runs._replace(shares=runs.shares[:, entry.members])
    return Outcome(
        rows["step"],
        rows["watched"],
        np.asarray(judge.at_end(runs)(x)) if final else None,
        np.asarray(judge.as_trained(there, entry.personal)(x, y)) if final else None,
        history["total_bytes"][0] / 1e6,
        history["message_bytes"][0] / 1e6,
        {
            name: (
                history[f"coverage_{name}"].min(),
                history[f"coverage_{name}"].mean(),
            )
            for name in "xy"
        },
        history["seconds"][-1],
        history.compile_seconds,
        length,
    )


def first(tree):
    """The server's copy in each run."""
    return jax.tree.map(lambda leaf: leaf[:, 0], tree)
