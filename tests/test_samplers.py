"""Samplers: an epoch is a set, and a batch is a function of (key, step)."""

from itertools import chain

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax.base import Batch
from dbojax.tasks import data, samplers

SIZES = {
    "equal": (6, 6, 6),
    "unequal": (1, 5, 7, 12),
    "one empty": (4, 0, 9),
    "divisible": (8, 4, 12),
    "single": (1,),
}


def numbered(sizes):
    """Samples whose input is their own number, with the padding in front."""
    width = max(sizes)
    mask = np.arange(width)[None] >= width - np.array(sizes)[:, None]
    numbers = np.arange(len(sizes) * width).reshape(len(sizes), width)
    inputs = np.where(mask, numbers, -1)[..., None].astype(float)
    return data.Samples(jnp.array(inputs), jnp.array(numbers), jnp.array(mask))


def drawn(batch, node):
    found = np.asarray(batch.inputs)[node][np.asarray(batch.mask)[node]][:, 0]
    return found.astype(int).tolist()


def in_graph(samples, batch_size):
    sampler = jax.jit(samplers.minibatches(samples, batch_size))
    return lambda step: sampler(jax.random.key(1), step)


def on_host(samples, batch_size):
    return samplers.host_minibatches(samples, batch_size, seed=1)


DRAW = {"in graph": in_graph, "on host": on_host}


@pytest.mark.parametrize("draw", DRAW)
@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
@pytest.mark.parametrize("sizes", SIZES)
def test_an_epoch_is_every_sample_exactly_once(sizes, batch_size, draw):
    samples = numbered(SIZES[sizes])
    batch_at = DRAW[draw](samples, batch_size)
    width = min(batch_size, max(SIZES[sizes]))
    batches = [batch_at(step) for step in range(3 * max(SIZES[sizes]))]
    for node, size in enumerate(SIZES[sizes]):
        everything = set(drawn(samples, node))
        length = max(1, -(-size // width))
        for epoch in range(len(batches) // length):
            parts = [
                drawn(batches[epoch * length + turn], node) for turn in range(length)
            ]
            assert sorted(chain(*parts)) == sorted(everything)
            counts = [len(part) for part in parts]
            assert max(counts) - min(counts) <= 1
            assert max(counts) <= width
            assert min(counts) >= min(size, 1)


@pytest.mark.parametrize("draw", DRAW)
def test_numbers_travel_with_their_samples(draw):
    samples = numbered((3, 8))
    samples = data.Numbered(*samples, ids=samples.labels)
    batch = DRAW[draw](samples, 4)(5)
    assert isinstance(batch, data.Numbered)
    np.testing.assert_array_equal(batch.ids, batch.labels)


@pytest.mark.parametrize("draw", DRAW)
def test_labels_travel_with_their_inputs(draw):
    samples = numbered((3, 8))
    batch = DRAW[draw](samples, 4)(5)
    inputs, labels, mask = map(np.asarray, batch)
    np.testing.assert_array_equal(inputs[..., 0][mask], labels[mask])


@pytest.mark.parametrize("draw", DRAW)
def test_epochs_and_nodes_have_orders_of_their_own(draw):
    samples = numbered((30, 30))
    batch_at = DRAW[draw](samples, 30)
    first, second = batch_at(0), batch_at(1)
    orders = [drawn(first, 0), drawn(second, 0), [a - 30 for a in drawn(first, 1)]]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_batch_is_a_function_of_key_and_step():
    sampler = samplers.minibatches(numbered((9, 14)), 4)
    step, compiled = jnp.array(7), jax.jit(sampler)
    here = sampler(jax.random.key(0), step)
    chex.assert_trees_all_equal(here, compiled(jax.random.key(0), step))
    chex.assert_trees_all_equal(here, compiled(jax.random.key(0), 7))
    other = compiled(jax.random.key(1), step)
    assert not np.array_equal(here.labels, other.labels)


def test_one_trace_serves_all_steps():
    traced = chex.assert_max_traces(samplers.minibatches(numbered((5, 9)), 2), n=1)
    sampler = jax.jit(traced)
    for step in range(4):
        sampler(jax.random.key(0), jnp.array(step))


def test_the_mean_over_an_epoch_of_equal_batches_is_the_full_mean():
    samples = numbered((12, 12))
    batch_at = in_graph(samples, 4)
    means = [np.mean(batch_at(step).inputs, (1, 2)) for step in range(3)]
    full = np.mean(samples.inputs, (1, 2))
    np.testing.assert_allclose(np.mean(means, 0), full, rtol=1e-14)


def test_a_batch_mean_is_unbiased_for_every_node():
    samples = numbered((1, 3, 7))
    sampler = samplers.minibatches(samples, 2)
    keys = jax.random.split(jax.random.key(3), 4000)
    batch = jax.jit(jax.vmap(sampler, (0, None)))(keys, 0)
    inputs, _, mask = map(np.asarray, batch)
    means = np.where(mask, inputs[..., 0], 0).sum(-1) / mask.sum(-1)
    truth = [np.mean(drawn(samples, i)) for i in range(3)]
    error = np.std(means, 0) / np.sqrt(4000) + 1e-12
    assert (np.abs(means.mean(0) - truth) < 5 * error).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(6, 6, 6), (3, 5, 7), (3,)])
def test_indexed_samples_are_distinct_true_and_where_they_say(sizes, batch_size):
    samples = numbered(sizes)
    sampler = jax.jit(samplers.indexed(samples, batch_size))
    samples = jax.tree.map(np.asarray, samples)
    for step in range(20):
        batch = jax.tree.map(np.asarray, sampler(jax.random.key(1), step))
        index, data, size = batch
        assert index.shape == (len(sizes), batch_size)
        assert index.dtype == jnp.int32
        assert size.tolist() == list(sizes)
        assert data.mask.all()
        for node in range(len(sizes)):
            assert len(set(index[node].tolist())) == batch_size
            there = jax.tree.map(lambda a: a[node, index[node]], samples)  # noqa: B023
            here = jax.tree.map(lambda a: a[node], data)  # noqa: B023
            chex.assert_trees_all_equal(there, here)


def test_numbered_samples_that_are_masked_are_never_drawn():
    whole = numbered((3, 7))
    known = data.Numbered(*whole, ids=whole.labels)
    sampler = jax.jit(samplers.indexed(known, 3))
    for step in range(10):
        batch = sampler(jax.random.key(2), step)
        assert batch.data.mask.all()
        assert batch.size.tolist() == [3, 7]
        np.testing.assert_array_equal(batch.data.ids, batch.data.labels)


def test_indexed_draws_are_uniform_and_independent():
    sampler = samplers.indexed(numbered((4, 3)), 2)
    draws = 6000
    many = jax.jit(jax.vmap(sampler, (None, 0)))
    index = np.asarray(many(jax.random.key(3), np.arange(draws)).indices)
    for node, size in enumerate((4, 3)):
        # Every position alike, and every neighbour in time alike.
        held = index[:, node] - (4 - size)
        chance = 2 / size
        error = 5 * np.sqrt(chance * (1 - chance) / draws)
        share = np.bincount(held.ravel(), minlength=size) / draws
        assert np.abs(share - chance).max() < error
        first = held[:-1, 0], held[1:, 0]
        joint = np.histogram2d(*first, bins=size)[0] / (draws - 1)
        assert np.abs(joint - 1 / size**2).max() < 5 / (size * np.sqrt(draws))


def test_indexed_draws_differ_between_nodes_and_are_functions_of_key_and_step():
    sampler, step = samplers.indexed(numbered((30, 30)), 10), jnp.array(7)
    here, compiled = sampler(jax.random.key(0), step), jax.jit(sampler)
    chex.assert_trees_all_equal(here, compiled(jax.random.key(0), 7))
    first, second = np.asarray(here.indices).tolist()
    assert set(first) != set(second)
    for other in (compiled(jax.random.key(1), step), compiled(jax.random.key(0), 8)):
        assert not np.array_equal(here.indices, other.indices)


def test_a_node_draws_the_same_whoever_else_there_is():
    few, many = numbered((5, 8)), numbered((5, 8, 7))
    few, many = (
        jax.jit(samplers.indexed(s, 3))(jax.random.key(0), 2) for s in (few, many)
    )
    np.testing.assert_array_equal(few.indices, np.asarray(many.indices)[:2])


def test_indexed_takes_any_tree():
    tree = {"a": jnp.asarray(np.arange(12.0).reshape(2, 6)), "b": np.zeros((2, 6, 3))}
    index, data, size = jax.jit(samplers.indexed(tree, 4))(jax.random.key(0), 0)
    np.testing.assert_array_equal(data["a"], np.asarray(index) + np.array([[0], [6]]))
    assert data["b"].shape == (2, 4, 3)
    assert size.tolist() == [6, 6]


def test_the_levels_are_drawn_independently():
    one = samplers.minibatches(numbered((20, 20)), 5)
    sampler = samplers.paired(one, one)
    batch = jax.jit(sampler)(jax.random.key(0), 0)
    assert isinstance(batch, Batch)
    assert not np.array_equal(batch.upper.labels, batch.lower.labels)
    samples = numbered((20, 20))
    host = samplers.host_minibatches(Batch(samples, samples), 5, seed=0)(0)
    assert not np.array_equal(host.upper.labels, host.lower.labels)


def test_inner_rounds_are_fresh_and_pass_through_the_data():
    samples = numbered((6, 5))
    one = samplers.minibatches(samples, 2)
    sampler = jax.jit(samplers.fresh_rounds(samplers.paired(one, one), 3))
    for step in range(3):
        rounds = sampler(jax.random.key(0), step)
        assert rounds.inner.lower.inputs.shape == (3, 2, 2, 1)
        assert rounds.outer.lower.inputs.shape == (2, 2, 1)
        inner = jax.tree.map(np.asarray, rounds.inner.lower)
        for node in range(2):
            seen = [
                drawn(jax.tree.map(lambda a: a[k], inner), node)  # noqa: B023
                for k in range(3)
            ]
            assert sorted(chain(*seen)) == sorted(drawn(samples, node))


def test_the_host_twin_is_deterministic_and_leaves_the_global_seed_alone():
    samples = Batch(numbered((5, 9)), numbered((3, 4)))
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = samplers.host_minibatches(samples, 2, seed=4)
    again = samplers.host_minibatches(samples, 2, seed=4)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(first(0)))
    for step in (0, 11, 3):
        chex.assert_trees_all_equal(first(step), again(step))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_the_full_batch_is_all_there_is():
    samples = numbered((2, 3))
    assert samplers.full_batch(samples)(jax.random.key(0), 5) is samples


MESSAGES = {
    "in graph": (lambda: samplers.minibatches(numbered((2,)), 0), "batch_size=0"),
    "on host": (lambda: samplers.host_minibatches(numbered((2,)), -1, 0), "size=-1"),
    "indexed": (lambda: samplers.indexed(numbered((2,)), 0), "batch_size=0"),
    "few": (
        lambda: samplers.indexed(numbered((5, 2)), 3),
        "batch_size=3 distinct .* has 2 only. Write batch_size=2",
    ),
    "none": (
        lambda: samplers.indexed(numbered((5, 0)), 1),
        "has 0 only. Leave out empty nodes",
    ),
    "rounds": (lambda: samplers.fresh_rounds(samplers.full_batch(0), 0), "rounds=0"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    build, words = MESSAGES[case]
    with pytest.raises(ValueError, match=words):
        build()
