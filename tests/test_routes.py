import itertools

import numpy as np
import pytest

import dbojax as dbo
from dbojax.devices.routes import route

T = dbo.topology
GRAPHS = {
    "ring": T.ring(16),
    "torus": T.torus(4, 4),
    "exponential": T.exponential(16),
    "erdos_renyi": T.erdos_renyi(16, 0.4, seed=3),
    "star": T.star(16),
    "complete": T.complete(16),
}


def table(edges):
    """Whom each node hears: (n, K)."""
    w = edges / edges.sum(axis=1, keepdims=True)
    return dbo.mixing.neighbours(w).heard


def sent(plan, rows, devices):
    """Buffers of all devices, moved by loops over devices and rows."""
    block = len(rows) // devices
    if plan.gathers:
        return [list(rows)] * devices
    local = [list(rows[d * block : (d + 1) * block]) for d in range(devices)]
    buffers = [list(own) for own in local]
    for step in plan.rounds:
        senders, receivers = zip(*step.pairs, strict=True)
        assert len(set(senders)) == len(senders)
        assert len(set(receivers)) == len(receivers)
        arrived = {to: [local[s][i] for i in step.rows[s]] for s, to in step.pairs}
        for device, buffer in enumerate(buffers):
            buffer += arrived.get(device, [None] * step.rows.shape[1])
    return buffers


@pytest.mark.parametrize(
    ("graph", "devices"), [*itertools.product(GRAPHS, (1, 2, 4, 8, 16))]
)
def test_what_is_asked_for_arrives(graph, devices):
    index, rows = table(GRAPHS[graph]), np.arange(16) + 100
    plan = route(index, 16, devices)
    buffers = sent(plan, rows, devices)
    for i, positions in enumerate(plan.positions):
        buffer = buffers[i // (16 // devices)]
        assert [buffer[p] for p in positions] == rows[index[i]].tolist()


@pytest.mark.parametrize(
    ("graph", "devices"), [*itertools.product(GRAPHS, (2, 4, 8, 16))]
)
def test_a_row_crosses_to_each_device_that_asks_for_it_once(graph, devices):
    index, block = table(GRAPHS[graph]), 16 // devices
    asked = {
        (j, i // block)
        for i, row in enumerate(index)
        for j in row
        if j // block != i // block
    }
    plan = route(index, 16, devices)
    assert plan.messages == len(asked)
    moved = sum(len(step.pairs) * step.rows.shape[1] for step in plan.rounds)
    assert moved == (0 if plan.gathers else len(asked))
    if block == 1:
        assert plan.messages == np.count_nonzero(
            GRAPHS[graph] & ~np.eye(16, dtype=bool)
        )


def test_circulant_graphs_take_one_round_for_each_shift():
    for devices, edges, rounds in (
        (16, T.ring(16), 2),
        (4, T.ring(16), 2),
        (5, T.ring(15), 2),
        (16, T.exponential(16), 4),
    ):
        plan = route(table(edges), len(edges), devices)
        assert len(plan.rounds) == rounds


def test_rounds_stay_near_the_least_that_there_can_be():
    for seed in range(20):
        index = table(T.erdos_renyi(16, 0.4, seed=seed))
        rounds = route(index, 16, 16).rounds
        degrees = [len(set(row)) - 1 for row in index]
        assert max(degrees) <= len(rounds) < 2 * max(degrees)


def test_all_is_gathered_only_where_all_ask_for_all():
    complete = table(GRAPHS["complete"])
    assert [route(complete, 16, k).gathers for k in (1, 4, 16)] == [False, True, True]
    # One that nobody hears of on one device.
    fewer = complete.copy()
    fewer[:4][fewer[:4] == 15] = 0
    assert not route(fewer, 16, 4).gathers
