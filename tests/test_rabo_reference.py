"""The federated methods against their NumPy twins, over five rounds."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
import reference_federated as twin

import dbojax as dbo
from dbojax import submodels

a = dbo.algorithms
N, DX, DY, ROUNDS, WIDTH = 6, 8, 6, 5, 1e-3
# Levels of 2, 3 and 1 clients, and of 2 and 4; how many of them take part.
THREE = (1.0, 0.5, 1.0, 0.5, 0.3, 0.5), ((1.0, 1), (0.5, 2), (0.3, 1))
TWO = (0.5, 1.0, 0.5, 0.5, 1.0, 0.5), ((1.0, 1), (0.5, 3))
ALL = (1.0,) * N, ((1.0, N),)
STEPS: dict[str, Any] = {"upper_step": 0.05, "lower_step": 0.1, "linear_step": 0.08}
OWN = tuple(STEPS.values())
FAST = {"xla_backend_optimization_level": 0}  # for compiling, of which there is more
RULES = {
    "static": submodels.static(),
    "staggered": submodels.staggered(),
    "random": submodels.random_units(3),
}


@pytest.fixture(scope="module")
def task():
    return dbo.tasks.federated_toy(n=N, dx=DX, dy=DY)


@pytest.fixture(scope="module")
def clients(task):
    return twin.toy_clients(task)


def fleet_of(task, clients=ALL, rule="static"):
    layout = submodels.coordinates(task.x0, task.y0)
    capacities, participants = clients
    return submodels.fleet(layout, capacities, RULES[rule], dict(participants))


def starts(task):
    """A y per client, so that personal ones differ."""
    y = np.random.default_rng(5).normal(size=(N, DY))
    return np.asarray(task.x0), y


def keys():
    return jax.random.split(jax.random.key(7), ROUNDS)


def path_of(method, task, x, y):
    """States after each round."""

    def step(state, key):
        state, metrics = method.step(key, state, task.batch)
        return state, (state, metrics)

    run = jax.jit(lambda s, keys: jax.lax.scan(step, s, keys)[1], compiler_options=FAST)
    return run(method.init(x[None], y), keys())


@functools.cache
def drawn(rule, clients):
    """Who takes part with which masks, read off the draws: one list per round."""
    task = dbo.tasks.federated_toy(n=N, dx=DX, dy=DY)
    fleet, found = fleet_of(task, clients, rule), []

    @jax.jit
    def masks(key, turn):
        def of(labels, like, part):
            held = functools.partial(submodels.mask, labels, fleet.layout.units)
            return jax.vmap(lambda kept, _: held(kept, like))(part.kept, part.clients)

        key_draw = jax.random.split(key, 3)[0]
        return [
            (
                part.clients,
                of(fleet.layout.x, task.x0, part),
                of(fleet.layout.y, task.y0, part),
            )
            for part in submodels.draw(fleet, key_draw, turn)
        ]

    for turn, key in enumerate(keys()):
        found.append([jax.tree.map(np.asarray, level) for level in masks(key, turn)])
    return found


def rounds_of(rule, clients, local_steps=1):
    counts = local_steps
    if isinstance(local_steps, int):
        counts = [local_steps] * len(clients[1])
    return [
        [
            twin.Part(int(i), m_x.astype(float), m_y.astype(float), count)
            for (who, x, y), count in zip(levels, counts, strict=True)
            for i, m_x, m_y in zip(who, x, y, strict=True)
        ]
        for levels in drawn(rule, clients)
    ]


def check(states, path, names="xyz"):
    """Equal to rounding in each of the rounds."""
    for turn, wanted in enumerate(path[1:]):
        for name, value in zip(names, wanted, strict=False):
            found = np.asarray(getattr(states, name)[turn])
            found = found.reshape(np.shape(value))
            scale = np.abs(value).max()
            # Differences of gradients lose digits: rounding over WIDTH.
            np.testing.assert_allclose(
                found,
                value,
                rtol=0,
                atol=scale * 1e-12,
                err_msg=f"{name}, round {turn}",
            )


RAFBO = {
    "three levels, unlike steps": (
        THREE,
        "staggered",
        (1, 2, 3),
        {"normalise": True, "radius": 0.7, "server_steps": (0.9, 1.1, 0.8)},
        {"normalise": True, "radius": 0.7, "server_steps": (0.9, 1.1, 0.8)},
    ),
    "keep, divided by all": (
        TWO,
        "random",
        1,
        {"keep": True, "divide_by": a.everyone, "inner_steps": 2},
        {"keep": True, "divide_by": 4, "inner": 2},
    ),
}


@pytest.mark.parametrize("case", RAFBO)
def test_rafbo(task, clients, case):
    who, rule, local_steps, settings, twins = RAFBO[case]
    method = a.rafbo(
        task.problem,
        fleet_of(task, who, rule),
        **STEPS,
        perturbation=WIDTH,
        local_steps=local_steps,
        extracted=False,
        **settings,
    )
    x, y = starts(task)
    states, metrics = path_of(method, task, x, y)
    rounds = rounds_of(rule, who, local_steps)
    path = twin.rafbo(
        clients,
        (x, y.mean(0), np.zeros(DY)),
        rounds,
        directions=twin.difference(WIDTH),
        steps=OWN,
        **twins,
    )
    check(states, path)
    for level in ("x", "y"):
        least = [int(sum(getattr(p, level) for p in parts).min()) for parts in rounds]
        assert getattr(metrics.coverage, level).tolist() == least


RABO = {
    "inner steps": (
        TWO,
        "random",
        1,
        {"inner_steps": 2, "radius": 0.5},
        {"inner": 2, "radius": 0.5},
    ),
    "keep": (
        TWO,
        "static",
        3,
        {"keep": True, "inner_steps": 0, "radius": 0.4},
        {"keep": True, "radius": 0.4},
    ),
}


@pytest.mark.parametrize("case", RABO)
def test_rabo(task, clients, case):
    who, rule, local_steps, settings, twins = RABO[case]
    method = a.rabo(
        task.problem,
        fleet_of(task, who, rule),
        **STEPS,
        perturbation=WIDTH,
        local_steps=local_steps,
        extracted=False,
        **settings,
    )
    x, y = starts(task)
    states, _ = path_of(method, task, x, y)
    rounds = rounds_of(rule, who, local_steps)
    path = twin.rabo(
        clients,
        (x, y, np.zeros((N, DY))),
        rounds,
        directions=twin.difference(WIDTH),
        steps=OWN,
        **twins,
    )
    check(states, path)
    absent = sorted(set(range(N)) - {part.client for part in rounds[0]})
    assert absent
    np.testing.assert_array_equal(states.y[0, absent], y[absent])


def test_full_masks_are_simfbo_with_differences(task, clients):
    rafbo = a.rafbo(
        task.problem,
        fleet_of(task),
        **STEPS,
        perturbation=WIDTH,
        local_steps=2,
        server_steps=(0.9, 1.0, 0.8),
        radius=0.6,
    )
    x, y = starts(task)
    states, _ = path_of(rafbo, task, x, y)
    path = twin.simfbo(
        clients,
        (x, y.mean(0), np.zeros(DY)),
        [twin.full_round(clients, DX, DY, 2)] * ROUNDS,
        directions=twin.difference(WIDTH),
        steps=OWN,
        gammas=(0.9 * 0.05, 0.1, 0.8 * 0.08),
        radius=0.6,
    )
    check(states, path)
