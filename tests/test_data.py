"""Data sets and splits: every sample once, and the promised heterogeneity."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from dbojax.tasks import data

DEALS = {
    "evenly": data.split_evenly,
    "h = 0.5": partial(data.split_by_label, h=0.5),
    "h = 1": partial(data.split_by_label, h=1.0),
    "dirichlet 0.1": partial(data.split_dirichlet, alpha=0.1),
    "dirichlet 100": partial(data.split_dirichlet, alpha=100.0),
}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n", [1, 3, 7, 10])
@pytest.mark.parametrize("deal", DEALS)
def test_every_sample_goes_to_exactly_one_node(deal, n):
    labels = rng(1).integers(0, 5, size=123)
    parts = DEALS[deal](labels, n, rng=rng())
    assert len(parts) == n
    assert sorted(np.concatenate(parts).tolist()) == list(range(123))


@pytest.mark.parametrize("deal", DEALS)
def test_a_seed_fixes_the_split(deal):
    labels = np.arange(60) % 4
    first, again, other = (DEALS[deal](labels, 3, rng=rng(s)) for s in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("h", [0.0, 0.3, 0.8, 1.0])
def test_the_share_of_the_own_class_is_h_and_its_part_of_the_rest(h):
    c, m = 5, 400
    labels = np.tile(np.arange(c), m)
    parts = data.split_by_label(labels, c, h, rng())
    own = [np.mean(labels[part] == i) for i, part in enumerate(parts)]
    np.testing.assert_allclose(own, h + (1 - h) / c, atol=0.07 * (1 - h))
    assert {len(part) for part in parts} == {m}


def test_nodes_of_one_class_share_it_and_equal_sizes_survive_scarcity():
    labels = np.array([0] * 90 + [1] * 10)
    parts = data.split_by_label(labels, 4, 1.0, rng())
    assert [len(part) for part in parts] == [25] * 4
    assert [int(np.sum(labels[part])) for part in parts][1::2] == [5, 5]


def test_a_small_concentration_separates_the_classes():
    labels = np.arange(1000) % 10

    def largest_share(alpha):
        parts = data.split_dirichlet(labels, 10, alpha, rng())
        counts = np.array([np.bincount(labels[p], minlength=10) for p in parts])
        return np.mean(counts.max(0) / 100)

    assert largest_share(0.05) > 0.6
    assert largest_share(1000.0) < 0.15


@pytest.mark.parametrize("fractions", [(0.4, 0.4, 0.2), (0.5, 0.5), (1.0,)])
def test_a_stratified_split_keeps_the_proportions(fractions):
    labels = rng(2).choice(3, size=200, p=[0.6, 0.3, 0.1])
    parts = data.split(labels, fractions, rng())
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    counts = np.bincount(labels)
    for part, fraction in zip(parts, fractions, strict=True):
        found = np.bincount(labels[part], minlength=3)
        np.testing.assert_allclose(found, fraction * counts, atol=1)


def test_stacking_loses_nothing_and_pads_with_zeros():
    inputs, labels = rng().normal(size=(9, 2)), np.arange(9)
    parts = [np.array([4, 1]), np.array([], int), np.array([0, 2, 3, 5, 6, 7, 8])]
    samples = data.stack(inputs, labels, parts)
    assert samples.inputs.shape == (3, 7, 2)
    assert samples.mask.sum(1).tolist() == [2, 0, 7]
    assert jnp.all(jnp.where(samples.mask[..., None], 0, samples.inputs) == 0)
    for i, part in enumerate(parts):
        held = samples.mask[i]
        np.testing.assert_array_equal(samples.inputs[i][held], inputs[part])
        np.testing.assert_array_equal(samples.labels[i][held], labels[part])


def test_no_node_at_all_may_hold_a_sample():
    samples = data.stack(np.ones((2, 3)), np.zeros(2, int), [np.array([], int)])
    assert samples.inputs.shape == (1, 1, 3)
    assert not samples.mask.any()


def test_scaling_learns_from_the_training_samples_alone():
    dataset = data.Dataset(rng().normal(size=(60, 3)), np.arange(60) % 2, 2, "noise")
    shards = data.distribute(dataset, n=3)
    train = shards.train.inputs[shards.train.mask]
    np.testing.assert_allclose(train.min(0), 0, atol=1e-15)
    np.testing.assert_allclose(train.max(0), 1, rtol=1e-15)
    far = dataset.inputs.copy()
    test = np.random.default_rng(0)
    _, _, left_out = data.split(dataset.labels, (0.4, 0.4, 0.2), test)
    far[left_out] *= 100
    again = data.distribute(dataset._replace(inputs=far), n=3)
    np.testing.assert_array_equal(again.train.inputs, shards.train.inputs)
    assert jnp.abs(again.test.inputs).max() > 10


def test_a_constant_feature_is_kept_and_finite():
    inputs = np.stack([np.arange(30.0), np.full(30, 7.0)], 1)
    dataset = data.Dataset(inputs, np.arange(30) % 2, 2, "constant")
    shards = data.distribute(dataset, n=2)
    assert jnp.all(shards.train.inputs[..., 1] == 0)


def test_a_given_test_set_takes_the_place_of_the_third_share():
    dataset = data.Dataset(rng().normal(size=(60, 3)), np.arange(60) % 2, 2, "noise")
    given = data.Dataset(rng(1).normal(size=(7, 3)), np.arange(7) % 2, 2, "test")
    alone = data.distribute(dataset, n=3)
    shards = data.distribute(dataset, n=3, test=given)
    np.testing.assert_array_equal(shards.train.inputs, alone.train.inputs)
    np.testing.assert_array_equal(shards.validation.labels, alone.validation.labels)
    np.testing.assert_array_equal(shards.test.labels, given.labels)
    width = jnp.ptp(shards.test.inputs, 0) / np.ptp(given.inputs, 0)
    np.testing.assert_allclose(
        width, jnp.ptp(alone.test.inputs, 0) / np.ptp(left_out(dataset), 0)
    )


def left_out(dataset):
    """What the default split of `distribute` leaves for the test."""
    return dataset.inputs[data.split(dataset.labels, (0.4, 0.4, 0.2), rng())[2]]


def test_standardised_features_have_mean_zero_and_variance_one():
    inputs = np.stack([rng().normal(3, 50, size=40), np.full(40, 0.1)], 1)
    scaled = data.standardised(data.Dataset(inputs, np.arange(40) % 2, 2, "two"))
    np.testing.assert_allclose(scaled.inputs.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.inputs.std(0), [1, 0], rtol=1e-12)


def test_one_hot_has_a_one_in_each_group_and_a_quarter_in_class_one():
    dataset = data.one_hot(m=200, d=11, attributes=3)
    for group in np.array_split(np.arange(11), 3):
        assert set(dataset.inputs[:, group].sum(1)) == {1.0}
    assert np.bincount(dataset.labels).tolist() == [150, 50]
    again, other = (data.one_hot(m=200, d=11, attributes=3, seed=s) for s in (0, 1))
    np.testing.assert_array_equal(again.inputs, dataset.inputs)
    assert np.any(other.inputs != dataset.inputs)


@pytest.mark.parametrize(
    ("load", "shape", "classes"),
    [(data.digits, (1797, 64), 10), (data.breast_cancer, (569, 30), 2)],
)
def test_the_loaders(load, shape, classes):
    pytest.importorskip("sklearn")
    dataset = load()
    assert dataset.inputs.shape == shape
    assert set(dataset.labels.tolist()) == set(range(classes))
    assert dataset.num_classes == classes


def test_a_missing_extra_is_named():
    with pytest.raises(ImportError, match=r"pip install dbojax\[tasks\]"):
        data.require("no_such_library.part", "This test")


LABELS = np.arange(12) % 3
MESSAGES = {
    "h": (lambda: data.split_by_label(LABELS, 2, 1.5, rng()), "h=1.5"),
    "alpha": (lambda: data.split_dirichlet(LABELS, 2, 0.0, rng()), "alpha=0.0"),
    "nodes": (lambda: data.split_evenly(LABELS, 0, rng()), "n=0"),
    "no nodes": (lambda: data.split_dirichlet(LABELS, 0, 1.0, rng()), "n=0"),
    "fractions": (lambda: data.split(LABELS, (0.5, 0.4), rng()), "add up to 0.9"),
    "one hot": (lambda: data.one_hot(d=3, attributes=4), "attributes=4"),
    "too many nodes": (
        lambda: data.distribute(data.Dataset(np.ones((12, 1)), LABELS, 3, "tiny"), n=9),
        "9 nodes need at least 9",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    build, words = MESSAGES[case]
    with pytest.raises(ValueError, match=words):
        build()
