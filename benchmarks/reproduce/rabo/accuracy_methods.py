"""Who takes part in each run, with what part of the model, and by which method."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from accuracy_problems import CLIENTS

import dbojax as dbo

# capacity -> clients that have it
FLEETS = {
    "skewed": {1.0: 5, 0.5: 10, 0.25: 25, 0.125: 60},
    "equal": {1.0: 20, 0.5: 20, 0.25: 20, 0.125: 20, 0.0625: 20},
}
PARTICIPANTS, LOCAL_STEPS, BATCH = 10, 5, 16
RADIUS = 10.0  # of z, for all methods that project
TERMS = 5  # of FedNest's series


class Entry(NamedTuple):
    """One line of the tables."""

    method: str  # a key of METHODS
    fleet: str  # a key of FLEETS, or "" where it makes no difference
    who: str  # "sub-models", "all full", "capable" or "smallest"

    @property
    def personal(self):
        return self.method.startswith("RABO")

    @property
    def label(self):
        words = {
            "sub-models": f"sub-models, {self.fleet}",
            "all full": "all full-size",
            "capable": f"only the capable, {self.fleet}",
            "smallest": f"all smallest, {self.fleet}",
        }
        return f"{self.method}, {words[self.who]}"

    @property
    def capacity(self):
        """The part of the model that the server keeps."""
        return min(FLEETS[self.fleet]) if self.who == "smallest" else 1.0

    @property
    def members(self):
        """Numbers of the clients that ever take part."""
        if self.who != "capable":
            return np.arange(CLIENTS)
        return np.flatnonzero(capacities(self.fleet) == 1)

    @property
    def participants(self):
        return min(PARTICIPANTS, len(self.members))

    def fleet_of(self, runs):
        """The clients' sub-models for the variables of these runs."""
        one = [dbo.trees.one_node(v) for v in (runs.x0, runs.y0)]
        layout = dbo.submodels.layout(*one, *runs.kind.labels)
        held = np.ones(len(self.members))
        if self.who == "sub-models":
            held = capacities(self.fleet)
        return dbo.submodels.fleet(layout, held, participants=self.participants)


def capacities(fleet):
    """Of each client; shuffled, so that the windows of a level are spread evenly."""
    sizes = FLEETS[fleet]
    held = np.repeat(list(sizes), list(sizes.values()))
    return np.random.default_rng(0).permutation(held)


def _federated(make, **more):
    def build(problem, fleet, upper_step, lower_step):
        return make(
            problem,
            fleet,
            upper_step=upper_step,
            lower_step=lower_step,
            local_steps=LOCAL_STEPS,
            radius=RADIUS,
            sample=dbo.tasks.samplers.local(BATCH),
            **more,
        )

    return build


def _fednest(problem, fleet, upper_step, lower_step):
    return dbo.algorithms.fednest(
        problem,
        fleet,
        upper_step=upper_step,
        lower_step=lower_step,
        inner_steps=LOCAL_STEPS,
        outer_steps=LOCAL_STEPS,
        terms=TERMS,
        sample=dbo.tasks.samplers.local(BATCH),
    )


METHODS: dict[str, Callable] = {
    "RAFBO": _federated(dbo.algorithms.rafbo),
    "RABO": _federated(dbo.algorithms.rabo),
    "RAFBO, exact": _federated(dbo.algorithms.rafbo, oracle=dbo.oracles.soba),
    "RABO, exact": _federated(dbo.algorithms.rabo, oracle=dbo.oracles.soba),
    "SimFBO": _federated(dbo.algorithms.simfbo),
    "FedNest": _fednest,
}


def entries(task, fleet):
    """All lines of one table; baselines and exact products in the main ones alone."""
    found, main = [], fleet == "skewed" and task != "cnn"
    for method in ("RAFBO", "RABO"):
        found.append(Entry(method, "", "all full"))
        found += [
            Entry(method, fleet, who) for who in ("sub-models", "capable", "smallest")
        ]
        if main:
            found.append(Entry(f"{method}, exact", fleet, "sub-models"))
    if main:
        found += [Entry(name, "", "all full") for name in ("SimFBO", "FedNest")]
    return found
