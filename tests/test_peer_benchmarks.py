"""What `benchmarks/peers` writes by hand computes what dbojax does."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))


@pytest.mark.parametrize("name", ["SOBA", "SABA"])
def test_solvers_by_hand_are_ours(name, key):
    import bilevel
    import by_hand
    import objectives

    task = objectives.logistic()
    x, y, *data = task.arguments(jnp.float64)
    begin, step = by_hand.SOLVERS[name]
    solver = bilevel.made(name, task, *data)
    starts = begin(task, x, y), solver.method.init(x[None], y[None])
    drawn = jnp.array([[0, 1], [2, 1], [0, 1], [1, 2]])

    def end(step, state):
        def body(state, blocks):
            return step(key, state, *data, blocks)

        return jax.jit(lambda state: jax.lax.scan(body, state, drawn)[0])(state)

    theirs = end(functools.partial(step, task), starts[0])
    ours = end(bilevel.step_of(name, task), starts[1])
    for level in "xyz":
        found, wanted = getattr(theirs, level), getattr(ours, level)[0]
        assert float(jnp.abs(wanted).max()) > 0
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["DSGD", "gradient tracking", "C2DFB"])
def test_loops_over_nodes_are_ours(name):
    import rounds

    (method,) = (label for label in rounds.METHODS if label.startswith(name))
    size = rounds.Size(d=20, samples=30, rounds=5)
    ours, theirs = rounds.exact(method, size)
    assert np.abs(ours).max() > 0
    assert np.ptp(ours, axis=0).max() > 0  # the nodes are not alike
    np.testing.assert_allclose(theirs, ours, rtol=1e-10, atol=1e-14)


def test_series_of_equal_blocks_is_a_neumann_series(key):
    import bilevel
    import objectives

    import dbojax as dbo

    task = objectives.logistic()
    x, y, *data = task.arguments(jnp.float64)
    of = bilevel.problem(task, *data)
    oracle = bilevel.series(of)
    z, memory = oracle.init(x, y)
    several = jnp.full(bilevel.TERMS + 1, 3)
    batch = dbo.Batch(jnp.array(2), several)
    (d_x, d_y, _), _ = jax.jit(oracle.directions)(key, x, y, z, memory, batch)

    other = dbo.oracles.local_neumann(of, bilevel.TERMS + 1, 1 / bilevel.STEP)
    one = dbo.Batch(jnp.array(2), jnp.array(3))
    start = other.init(x, y)
    (w_x, w_y, _), _ = jax.jit(other.directions)(key, x, y, *start, one)
    np.testing.assert_allclose(d_x, w_x, rtol=1e-10, atol=1e-16)
    np.testing.assert_allclose(d_y, w_y, rtol=1e-10)


def test_both_writings_of_the_quadratics_are_one_function(key):
    import objectives

    task, fast = objectives.quadratics(blocks=1)
    *_, above, _ = task.arguments(jnp.float64)
    samples = objectives.block(above, 0)
    keys = jax.random.split(key, 3)
    x, y, z = (
        jax.random.normal(k, (size,))
        for k, size in zip(
            keys, (objectives.P, objectives.D, objectives.D), strict=True
        )
    )

    @jax.jit
    def known(y, z):
        """Both slopes and both products with z."""

        def of(one):
            def slopes(y):
                return jax.grad(one.lower, (0, 1))(x, y, samples)

            return jax.jvp(slopes, (y,), (z,))

        return of(task), of(fast)

    wanted, found = (jax.tree.leaves(of) for of in known(y, z))
    product = jnp.mean(samples.inner, 0) @ z
    np.testing.assert_allclose(found[3], product, rtol=1e-9)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
