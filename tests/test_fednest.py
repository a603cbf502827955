"""FedNest against its NumPy twin, its messages and its fixed points."""

import jax
import pytest
import reference_federated as twin
from test_rabo_reference import (
    ALL,
    DX,
    DY,
    ROUNDS,
    STEPS,
    TWO,
    N,
    a,
    check,
    fleet_of,
    path_of,
    rounds_of,
    starts,
)

import dbojax as dbo


@pytest.fixture(scope="module")
def task():
    return dbo.tasks.federated_toy(n=N, dx=DX, dy=DY)


CASES = {
    "svrg, sub-models": (
        True,
        {"inner_rounds": 2, "inner_steps": 3, "terms": 4, "outer_steps": 2},
    ),
    "sgd, full size": (False, {"inner_steps": 2, "terms": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_fednest(task, case):
    reduced, settings = CASES[case]
    clients = twin.toy_clients(task)
    fleet = fleet_of(task)
    rounds = [twin.full_round(clients, DX, DY)] * ROUNDS
    if reduced:
        fleet, rounds = fleet_of(task, TWO, "random"), rounds_of("random", TWO)
    # The toy's clients keep rows of data for units that they do not hold.
    method = a.fednest(
        task.problem, fleet, **STEPS, reduced=reduced, extracted=False, **settings
    )
    x, y = starts(task)
    states, metrics = path_of(method, task, x, y)
    path = twin.fednest(
        clients, (x, y.mean(0)), rounds, **STEPS, reduced=reduced, **settings
    )
    check(states, path, "xy")
    inner, terms = settings.get("inner_rounds", 1), settings["terms"]
    trips = inner * (2 if reduced else 1) + (terms + 1) + 2
    assert metrics.traffic.rounds == 2 * trips
    # Up: y in each of FedInn's and the series' trips, then twice x.
    assert metrics.traffic.message == 8 * ((trips - 2) * DY + 2 * DX)
    # Down: x and y first, then one y-like message each; z; the mean of h.
    assert metrics.traffic.down == 8 * (DX + (trips - 2) * DY + DY + DX)
    if not reduced:
        assert metrics.traffic.total == N * (
            metrics.traffic.message + metrics.traffic.down
        )


def test_bad_numbers_of_steps(task):
    fleet = fleet_of(task)
    with pytest.raises(ValueError, match="`terms` is a whole number, at least 0"):
        a.fednest(task.problem, fleet, **STEPS, terms=-1)
    with pytest.raises(ValueError, match="`inner_steps` is a whole number"):
        a.fednest(task.problem, fleet, **STEPS, inner_steps=0)


def test_samples_are_drawn_anew_for_each_local_step(task):
    seen = []

    def sample(key, data):
        def note(bits):
            seen.append(tuple(bits.ravel().tolist()))

        jax.debug.callback(note, jax.random.key_data(key))
        return data

    fleet = fleet_of(task, (ALL[0], ((1.0, 1),)))
    settings = {"inner_rounds": 2, "inner_steps": 2, "terms": 1, "outer_steps": 3}
    method = a.fednest(task.problem, fleet, **STEPS, sample=sample, **settings)
    state = method.init(task.x0[None], task.y0[None])
    jax.block_until_ready(jax.jit(method.step)(jax.random.key(0), state, task.batch))
    jax.effects_barrier()
    assert len(set(seen)) == 2 * 2 + 3
