"""The sampler of one node's own data: distinct, uniform, never padding."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax.tasks import classification, data, samplers

WIDTH = 6


def samples_of(size, first=0):
    """Samples whose label is their number, with padding on both sides."""
    front = (WIDTH - size) // 2
    mask = (np.arange(WIDTH) >= front) & (np.arange(WIDTH) < front + size)
    labels = np.where(mask, first + np.arange(WIDTH) - front, -1)
    inputs = np.where(mask, labels, 1e3).astype(float)[:, None]
    return data.Samples(*map(jnp.asarray, (inputs, labels, mask)))


SAMPLE = {size: jax.jit(samplers.local(size)) for size in (2, 4, 50)}


@pytest.mark.parametrize("batch_size", SAMPLE)
def test_a_batch_is_distinct_true_samples_and_as_many_as_there_are(batch_size):
    for size, seed in itertools.product(range(WIDTH + 1), range(5)):
        drawn = SAMPLE[batch_size](jax.random.key(seed), samples_of(size))
        batch = jax.device_get(drawn)
        held = batch.labels[batch.mask].tolist()
        assert batch.mask.shape == (min(batch_size, WIDTH),)
        assert len(held) == min(batch_size, size)
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(size))
        np.testing.assert_array_equal(batch.inputs[batch.mask][:, 0], held)


def test_every_set_of_samples_is_drawn_alike():
    draws, size = 12_000, 4
    keys = jax.random.split(jax.random.key(0), draws)
    batch = jax.jit(jax.vmap(samplers.local(2), (0, None)))(keys, samples_of(size))
    pairs = np.sort(np.asarray(batch.labels), 1) @ np.array([size, 1])
    found = np.unique(pairs, return_counts=True)[1] / draws
    assert len(found) == 6
    assert np.abs(found - 1 / 6).max() < 5 * np.sqrt(1 / 6 * 5 / 6 / draws)


def test_the_levels_are_independent_and_keep_their_kinds():
    upper, lower = samples_of(6), samples_of(6, first=6)
    lower = data.Numbered(*lower, ids=lower.labels)
    both = dbo.Batch(upper=upper, lower=lower)
    keys = jax.random.split(jax.random.key(1), 8000)
    batch = jax.jit(jax.vmap(samplers.local(1), (0, None)))(keys, both)
    assert isinstance(batch.upper, data.Samples)
    assert isinstance(batch.lower, data.Numbered)
    np.testing.assert_array_equal(batch.lower.ids, batch.lower.labels)
    pair = np.stack([batch.upper.labels[:, 0], batch.lower.labels[:, 0] - 6])
    joint = np.histogram2d(*pair, bins=6)[0] / 8000
    assert np.abs(joint - 1 / 36).max() < 5 * np.sqrt(1 / 36 / 8000)


def test_a_slope_is_unbiased_for_the_nodes_own_and_exact_where_all_fit():
    task = dbo.tasks.coefficient_tuning(
        data.Shards(samples_of(5), samples_of(5), samples_of(5), 5, "few")
    )
    own, y = samples_of(5), jnp.linspace(-1.0, 1.0, 5)[None]

    def slope(y, samples):
        return jax.grad(task.problem.upper, 1)(task.x0, y, samples)

    @jax.jit
    def slopes(keys):
        return jax.vmap(lambda key: slope(y, samplers.local(3)(key, own)))(keys)

    found = slopes(jax.random.split(jax.random.key(2), 6000))
    error = jnp.std(found, 0) / np.sqrt(6000)
    assert jnp.all(error > 0)
    assert jnp.all(jnp.abs(found.mean(0) - slope(y, own)) < 5 * error)
    whole = SAMPLE[50](jax.random.key(0), own)
    np.testing.assert_allclose(slope(y, whole), slope(y, own), rtol=1e-12)


def test_an_empty_node_has_no_loss_no_slope_and_no_accuracy():
    batch = SAMPLE[4](jax.random.key(0), samples_of(0))
    assert not batch.mask.any()

    def loss(y):
        return classification.cross_entropy(batch.inputs @ y, batch)

    value, slope = jax.value_and_grad(loss)(jnp.ones((1, 3)))
    assert value == 0
    assert jnp.all(slope == 0)
    assert classification.accuracy(batch.inputs @ jnp.ones((1, 3)), batch) == 0


def test_a_batch_is_a_function_of_the_key():
    own = samples_of(6)
    here = SAMPLE[4](jax.random.key(0), own)
    chex.assert_trees_all_equal(here, samplers.local(4)(jax.random.key(0), own))
    others = [SAMPLE[4](jax.random.key(seed), own).labels for seed in range(1, 6)]
    assert any(not jnp.array_equal(here.labels, other) for other in others)


def test_messages():
    with pytest.raises(ValueError, match="batch_size=0"):
        samplers.local(0)
    with pytest.raises(ValueError, match=r"got \['ArrayImpl'\].*Write e\.g\. `Batch"):
        samplers.local(2)(jax.random.key(0), jnp.ones((4, 2)))
