"""Plain minimisation: the objective against loops, the split, and its judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax.tasks import single_level


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return rng.normal(size=(23, 4)), rng.choice([2, 5], size=23)


@pytest.fixture(scope="module")
def task(samples):
    return dbo.tasks.logistic_regression(*samples, n=5, regulariser=0.3)


def at(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def written(x, rows, signs, weight):
    """Value and slope of one node, sample by sample."""
    value = weight * sum(v**2 / (1 + v**2) for v in x)
    slope = 2 * weight * x / (1 + x**2) ** 2
    for row, sign in zip(rows, signs, strict=True):
        margin = sign * (row @ x)
        value += np.log(1 + np.exp(-margin)) / len(rows)
        slope = slope - sign * row / (1 + np.exp(margin)) / len(rows)
    return value, slope


def test_the_objective_is_the_written_one(task, samples):
    inputs, labels = samples
    signs, x = np.where(labels == 2, -1, 1), np.asarray(task.params0)
    bounds = [0, 4, 8, 12, 16, 23]
    nodes = []
    for i in range(5):
        own = slice(bounds[i], bounds[i + 1])
        wanted = written(x, inputs[own], signs[own], 0.3)
        found = jax.value_and_grad(task.loss)(task.params0, at(task.batch, i))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)
        nodes.append(wanted)
    judged = task.evaluate(task.params0)
    value = np.mean([node[0] for node in nodes])
    slope = np.mean([node[1] for node in nodes], 0)
    np.testing.assert_allclose(judged["loss"], value, rtol=1e-12)
    np.testing.assert_allclose(judged["squared_gradient_norm"], slope @ slope)


def test_samples_stay_in_order_and_the_last_node_takes_the_remainder(task, samples):
    inputs, labels = samples
    assert task.batch.mask.sum(1).tolist() == [4, 4, 4, 4, 7]
    held = np.asarray(task.batch.mask)
    np.testing.assert_array_equal(np.asarray(task.batch.inputs)[held], inputs)
    found = np.asarray(task.batch.labels)[held]
    np.testing.assert_array_equal(found, np.where(labels == 2, -1, 1))
    parts = single_level.split_in_order(6, 3)
    assert [len(part) for part in parts] == [2, 2, 2]


def test_padding_has_no_influence(task):
    one = at(task.batch, 0)
    bare = jax.tree.map(lambda leaf: leaf[one.mask], one)
    garbage = one._replace(inputs=jnp.where(one.mask[:, None], one.inputs, 1e3))
    value = jax.value_and_grad(task.loss)
    wanted = value(task.params0, bare)
    for found, right in zip(value(task.params0, garbage), wanted, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-12)


def test_the_start_is_the_draw_of_the_seed(samples):
    for seed in (0, 3):
        task = dbo.tasks.logistic_regression(*samples, n=2, seed=seed)
        wanted = np.random.default_rng(seed).normal(size=4)
        np.testing.assert_array_equal(task.params0, wanted)


def test_large_margins_neither_overflow_nor_lose_their_slope(samples):
    inputs, labels = samples
    task = dbo.tasks.logistic_regression(1e6 * inputs, labels, n=1)
    found = task.evaluate(task.params0)
    assert all(jnp.isfinite(value) for value in found.values())


def test_minibatches_pass_through_all_samples(task):
    sampler, drawn = task.sampler(3), []
    for step in range(3):
        batch = at(sampler(jax.random.key(0), step), 4)
        drawn.append(np.asarray(batch.inputs)[np.asarray(batch.mask)])
    own = np.asarray(task.batch.inputs[4])
    np.testing.assert_array_equal(
        np.sort(np.concatenate(drawn), 0), np.sort(own[:7], 0)
    )


def test_descent_on_the_default_data_learns():
    pytest.importorskip("sklearn")
    task = dbo.tasks.logistic_regression()
    assert (task.n, task.params0.shape) == (20, (30,))

    def mean(params):
        return jnp.mean(jax.vmap(task.loss, (None, 0))(params, task.batch))

    def descend(params, _):
        return params - 0.2 * jax.grad(mean)(params), None

    params, _ = jax.lax.scan(descend, task.params0, length=2000)
    before, after = task.evaluate(task.params0), task.evaluate(params)
    assert after["loss"] < before["loss"] / 2
    assert after["squared_gradient_norm"] < 1e-8


ROWS, TWO = np.ones((6, 2)), np.arange(6) % 2
MESSAGES = {
    "alone": ((ROWS, None), {}, "come together"),
    "shapes": ((ROWS, TWO[:5]), {}, r"\(6, 2\) and \(5,\)"),
    "classes": ((ROWS, np.arange(6)), {}, "6 values"),
    "nodes": ((ROWS, TWO), {"n": 7}, "got n=7"),
    "regulariser": ((ROWS, TWO), {"regulariser": -1.0}, "regulariser=-1.0"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    given, settings, words = MESSAGES[case]
    with pytest.raises(ValueError, match=words):
        dbo.tasks.logistic_regression(*given, **{"n": 2, **settings})
