"""RABO and RAFBO on the federated toy: what full and partial models reach."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax import submodels

a = dbo.algorithms
STEPS: dict[str, Any] = {"upper_step": 0.05, "lower_step": 0.1, "perturbation": 1e-4}


@pytest.fixture(scope="module")
def task():
    return dbo.tasks.federated_toy()


def run(method, task, rounds):
    """State after some rounds, and all x on the way."""

    def step(state, key):
        state, _ = method.step(key, state, task.batch)
        return state, state.x[0]

    keys = jax.random.split(jax.random.key(0), rounds)
    start = method.init(task.x0[None], task.y0[None])
    return jax.jit(lambda s: jax.lax.scan(step, s, keys))(start)


def squares(task, personal, points):
    exact = dbo.tasks.solve_federated_toy(task.batch, personal)
    slopes = jax.jit(lambda xs: jax.lax.map(exact.hypergradient, xs))(points)
    return np.sum(np.square(slopes), 1)


CASES = {  # how many local steps, each so much the shorter
    "rafbo": (a.rafbo, 1),
    "rabo": (a.rabo, 1),
    "rafbo, five local steps": (a.rafbo, 5),
}


@pytest.mark.parametrize("case", CASES)
def test_full_models_reach_the_optimum_with_one_local_step_alone(task, case):
    make, count = CASES[case]
    layout = submodels.coordinates(task.x0, task.y0)
    steps = STEPS | {name: STEPS[name] / count for name in STEPS if "step" in name}
    method = make(
        task.problem,
        submodels.fleet(layout, np.ones(12)),
        local_steps=count,
        **steps,
    )
    _, points = run(method, task, 3000)
    first, *_, last = squares(task, make is a.rabo, points[::499])
    assert first > 0.1
    if count == 1:
        assert last < 1e-6
    else:
        assert 1e-4 < last < 1e-2, "clients drift apart"


@pytest.mark.parametrize("make", [a.rafbo, a.rabo], ids=["rafbo", "rabo"])
def test_entries_outside_the_masks_never_move(task, make):
    layout = submodels.coordinates(task.x0, task.y0)
    half = submodels.fleet(layout, np.full(12, 0.5), submodels.static(), minimum=0)
    method = make(task.problem, half, local_steps=2, extracted=False, **STEPS)
    y = jnp.full((12, 18), 0.3)
    start = method.init(task.x0[None], y)
    state, metrics = jax.jit(method.step)(jax.random.key(0), start, task.batch)
    assert (int(metrics.coverage.x), int(metrics.coverage.y)) == (0, 0)
    for name, kept in (("x", 12), ("y", 9), ("z", 9)):
        before, after = getattr(start, name), getattr(state, name)
        np.testing.assert_array_equal(after[:, kept:], before[:, kept:])
        assert jnp.all(after[:, :kept] != before[:, :kept])
