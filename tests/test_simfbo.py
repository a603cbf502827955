"""SimFBO, ShroFBO and FedBiO against their NumPy twins."""

import numpy as np
import pytest
import reference_federated as twin
from test_rabo_reference import (
    DX,
    DY,
    OWN,
    ROUNDS,
    STEPS,
    N,
    a,
    check,
    fleet_of,
    path_of,
    starts,
)

import dbojax as dbo


@pytest.fixture(scope="module")
def task():
    return dbo.tasks.federated_toy(n=N, dx=DX, dy=DY)


def at_start(task):
    x, y = starts(task)
    return x, y.mean(0), np.zeros(DY)


def test_simfbo(task):
    method = a.simfbo(
        task.problem,
        fleet_of(task),
        **STEPS,
        local_steps=3,
        server_steps=(0.9, 1.1, 0.8),
        radius=0.6,
    )
    states, metrics = path_of(method, task, *starts(task))
    clients = twin.toy_clients(task)
    path = twin.simfbo(
        clients,
        at_start(task),
        [twin.full_round(clients, DX, DY, 3)] * ROUNDS,
        steps=OWN,
        gammas=(0.9 * 0.05, 1.1 * 0.1, 0.8 * 0.08),
        radius=0.6,
    )
    check(states, path)
    assert np.linalg.norm(path[-1][2]) > 0.6 - 1e-12, "the case must project"
    assert metrics.traffic.message == metrics.traffic.down == 8 * (DX + 2 * DY)
    assert metrics.calls.products > 0


def unlike(task):
    """Clients of full size in two levels: just below 1 nothing is cut either."""
    fleet = fleet_of(task, ((1.0, 0.99, 1.0, 0.99, 0.99, 0.99), ((1.0, 2), (0.99, 4))))
    assert not any(level.kept for level in fleet.levels)
    return fleet


def unlike_round(clients, counts):
    of = [0, 1, 0, 1, 1, 1]
    return [
        part._replace(steps=counts[of[part.client]])
        for part in twin.full_round(clients, DX, DY)
    ]


def test_shrofbo_with_unlike_numbers_of_steps(task):
    method = a.shrofbo(task.problem, unlike(task), **STEPS, local_steps=(4, 1))
    states, _ = path_of(method, task, *starts(task))
    clients = twin.toy_clients(task)
    path = twin.simfbo(
        clients,
        at_start(task),
        [unlike_round(clients, (4, 1))] * ROUNDS,
        steps=OWN,
        gammas=OWN,
        normalise=True,
    )
    check(states, path)


def test_fedbio_averages_what_comes_out(task):
    method = a.fedbio(task.problem, unlike(task), **STEPS, local_steps=(2, 3))
    states, _ = path_of(method, task, *starts(task))
    clients = twin.toy_clients(task)
    path = twin.fedbio(
        clients,
        at_start(task),
        [unlike_round(clients, (2, 3))] * ROUNDS,
        steps=OWN,
    )
    check(states, path)
