"""The tasks: closed forms against calculus, losses against loops."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax.tasks import classification, data


class Pair(NamedTuple):
    x: jax.Array
    y: jax.Array


@pytest.fixture(scope="module")
def toy():
    return dbo.tasks.quadratic()


@pytest.fixture(scope="module")
def shards():
    """A small problem with shares of unequal size."""
    rng = np.random.default_rng(3)
    labels = np.arange(90) % 3
    inputs = rng.normal(size=(90, 4)) + labels[:, None]
    dataset = data.Dataset(inputs, labels, 3, "blobs")

    def deal(labels, n, rng):
        return data.split_dirichlet(labels, n, 0.5, rng)

    return data.distribute(dataset, n=4, deal=deal)


def small_tasks(shards):
    return {
        "coefficient_tuning": dbo.tasks.coefficient_tuning(shards),
        "hyper_representation": dbo.tasks.hyper_representation(
            shards, dbo.tasks.mlp((5, 3))
        ),
    }


def at(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def mean_of(objective, x, y, stacked):
    return jnp.mean(jax.vmap(objective, (None, None, 0))(x, y, stacked))


# --- the quadratics ------------------------------------------------------------------


def test_the_default_quadratics_are_the_golden_toy(toy):
    a, b, c = toy.batch.lower
    sums = [jnp.sum(leaf) for leaf in (a, b, c, toy.batch.upper)]
    golden = [955.3973574918, 34.4055987222, 48.9863084080, -143.0756448231]
    np.testing.assert_allclose(sums, golden, atol=5e-10, rtol=0)
    np.testing.assert_allclose(a[0, 0, 0], 1.2575437354, atol=5e-11)
    start = jnp.linalg.norm(toy.exact.hypergradient(toy.x0))
    np.testing.assert_allclose(start, 2.416663993, atol=5e-10)
    np.testing.assert_allclose(jnp.linalg.norm(toy.exact.x_star), 7.100418, atol=5e-7)
    assert (toy.n, toy.x0.shape, toy.y0.shape) == (10, (20,), (60,))


def test_the_golden_toy_has_the_recorded_curvature(toy):
    local = jnp.linalg.eigvalsh(toy.batch.lower.a)
    mean = jnp.linalg.eigvalsh(jnp.mean(toy.batch.lower.a, 0))
    outer = jnp.linalg.eigvalsh(jax.hessian(toy.exact.value)(toy.x0))
    found = [mean[0], local.min(), local.max(), outer[0], outer[-1]]
    golden = [0.745133, 0.5, 8.923183, 0.131066, 0.591392]
    np.testing.assert_allclose(found, golden, atol=5e-7)


def test_gradients_of_the_quadratics_are_the_written_ones(toy, key):
    x, y = (
        jax.random.normal(k, (d,))
        for k, d in zip(jax.random.split(key), (20, 60), strict=True)
    )
    (a, b, c), t = at(toy.batch.lower, 3), toy.batch.upper[3]
    lower = jax.grad(toy.problem.lower, (0, 1))(x, y, at(toy.batch.lower, 3))
    upper = jax.grad(toy.problem.upper, (0, 1))(x, y, t)
    np.testing.assert_allclose(lower[0], -b.T @ y, rtol=1e-12)
    np.testing.assert_allclose(lower[1], a @ y - b @ x - c, rtol=1e-10)
    np.testing.assert_allclose(upper[0], 0.1 * x, rtol=1e-12)
    np.testing.assert_allclose(upper[1], y - t, rtol=1e-12)


def test_the_closed_solution_is_stationary_for_the_mean_lower_level(toy, key):
    x = jax.random.normal(key, (20,))
    gradient = jax.grad(mean_of, 2)(
        toy.problem.lower, x, toy.exact.solution(x), toy.batch.lower
    )
    assert jnp.linalg.norm(gradient) < 1e-12


def test_the_closed_hypergradient_is_the_gradient_of_the_value(toy, key):
    x = jax.random.normal(key, (20,))
    by_calculus = jax.grad(toy.exact.value)(x)
    np.testing.assert_allclose(toy.exact.hypergradient(x), by_calculus, rtol=1e-10)
    np.testing.assert_allclose(
        toy.exact.value(x),
        mean_of(toy.problem.upper, x, toy.exact.solution(x), toy.batch.upper),
        rtol=1e-12,
    )


def test_the_closed_hypergradient_agrees_with_finite_differences(toy, key):
    x = jax.random.normal(key, (20,))
    # Psi is quadratic: central differences are exact up to rounding at any width.
    slopes = [
        (toy.exact.value(x + e) - toy.exact.value(x - e)) / 2 for e in jnp.eye(20)
    ]
    np.testing.assert_allclose(
        toy.exact.hypergradient(x), jnp.array(slopes), rtol=1e-10, atol=1e-10
    )


def test_the_hypergradient_vanishes_at_the_optimum_and_evaluate_says_so(toy):
    stacked = dbo.replicate(toy.exact.x_star, 10)
    found = toy.evaluate(SimpleNamespace(x=stacked, y=dbo.replicate(toy.y0, 10)))
    assert set(found) == {"hypergrad_true"}
    assert found["hypergrad_true"] < 1e-12


def test_equal_curvature_keeps_the_solution(toy):
    equal = dbo.tasks.with_equal_curvature(toy)
    assert jnp.ptp(equal.batch.lower.a, 0).max() == 0
    assert jnp.ptp(equal.batch.lower.b, 0).max() == 0
    np.testing.assert_array_equal(equal.batch.lower.c, toy.batch.lower.c)
    np.testing.assert_allclose(equal.exact.x_star, toy.exact.x_star, rtol=1e-10)


def test_the_quadratics_follow_the_precision_of_jax():
    with jax.enable_x64(False):
        task = dbo.tasks.quadratic(n=2, dx=3, dy=4)
        leaves = jax.tree.leaves((task.batch, task.x0, task.y0, task.exact.x_star))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


# --- classification ------------------------------------------------------------------


def numpy_cross_entropy(logits, labels):
    shifted = logits - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -np.mean(logs[np.arange(len(labels)), labels])


def test_coefficient_tuning_is_the_written_objective(shards, key):
    task = dbo.tasks.coefficient_tuning(shards, ridge=0.7)
    x_key, y_key = jax.random.split(key)
    x, y = jax.random.normal(x_key, (4,)), jax.random.normal(y_key, (4, 3))
    for i in range(2):
        for samples, objective, factor in (
            (shards.validation, task.problem.upper, 0.0),
            (shards.train, task.problem.lower, 0.7 / 12),
        ):
            one = at(samples, i)
            inputs, labels = one.inputs[one.mask], one.labels[one.mask]
            loop = sum(
                float(np.exp(x[q]) * y[q, p] ** 2) for q in range(4) for p in range(3)
            )
            plain = numpy_cross_entropy(np.asarray(inputs @ y), np.asarray(labels))
            found = objective(x, y, one)
            np.testing.assert_allclose(found, plain + factor * loop, rtol=1e-12)


def test_corruption_replaces_training_labels_and_no_others(shards):
    clean = dbo.tasks.coefficient_tuning(shards).batch
    noisy = dbo.tasks.coefficient_tuning(shards, corruption=1.0, seed=4).batch
    again = dbo.tasks.coefficient_tuning(shards, corruption=1.0, seed=4).batch
    changed = np.asarray(noisy.lower.labels != clean.lower.labels)
    held = np.asarray(clean.lower.mask)
    assert 0.3 < changed[held].mean() < 0.95  # of three classes, two are wrong
    assert not changed[~held].any()
    for one, other in ((clean.lower, shards.train), (again.lower, noisy.lower)):
        np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(noisy.upper.labels, clean.upper.labels)


@pytest.mark.parametrize("name", ["coefficient_tuning", "hyper_representation"])
def test_padding_changes_neither_losses_nor_gradients(shards, name):
    task = small_tasks(shards)[name]
    assert not shards.train.mask.all(), "the case needs shares of unequal size"
    y = jax.tree.map(lambda leaf: leaf + 0.3, task.y0)
    value = jax.jit(jax.value_and_grad(task.problem.lower, (0, 1)))
    i = int(jnp.argmin(shards.train.mask.sum(1)))
    one = at(shards.train, i)
    bare = jax.tree.map(lambda leaf: leaf[one.mask], one)
    garbage = one._replace(
        inputs=jnp.where(one.mask[:, None], one.inputs, 1e3),
        labels=jnp.where(one.mask, one.labels, 2),
    )
    wanted = value(task.x0, y, bare)
    for padded in (one, garbage):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14),
            value(task.x0, y, padded),
            wanted,
        )


def test_a_node_without_samples_has_no_loss_and_no_slope(shards):
    task = dbo.tasks.coefficient_tuning(shards)
    none = at(shards.train, 0)
    none = none._replace(mask=jnp.zeros_like(none.mask))
    value, slope = jax.value_and_grad(task.problem.upper, 1)(task.x0, task.y0, none)
    assert value == 0
    assert jnp.all(slope == 0)


def test_the_head_of_the_representation_is_regularised_and_nothing_else(shards):
    task = small_tasks(shards)["hyper_representation"]
    one = at(shards.train, 1)
    y = jax.tree.map(jnp.ones_like, task.y0)
    penalty = task.problem.lower(task.x0, y, one) - task.problem.upper(task.x0, y, one)
    np.testing.assert_allclose(penalty, 0.5 * 0.01 * (3 * 3 + 3), rtol=1e-12)
    hessian = jax.hessian(
        lambda v: task.problem.lower(task.x0, {"kernel": v, "bias": y["bias"]}, one)
    )(y["kernel"])
    assert jnp.linalg.eigvalsh(hessian.reshape(9, 9))[0] > 0.01 - 1e-9


@pytest.mark.parametrize("name", ["coefficient_tuning", "hyper_representation"])
def test_evaluate_judges_at_the_node_means(shards, name, key):
    task = small_tasks(shards)[name]
    x, y = task.x0, jax.tree.map(lambda leaf: leaf + 0.1, task.y0)
    drift = jax.random.normal(key, (task.n,))
    drift = drift - drift.mean()

    def spread(leaf):
        shape = (task.n,) + (1,) * leaf.ndim
        return jnp.broadcast_to(leaf[None], (task.n, *leaf.shape)) + drift.reshape(
            shape
        )

    agreed = task.evaluate(
        SimpleNamespace(x=dbo.replicate(x, task.n), y=dbo.replicate(y, task.n))
    )
    with jax.numpy_rank_promotion("allow"):
        apart = SimpleNamespace(x=jax.tree.map(spread, x), y=jax.tree.map(spread, y))
    found = task.evaluate(apart)
    assert set(found) == {"validation_loss", "test_loss", "test_accuracy"}
    for quantity in found:
        np.testing.assert_allclose(found[quantity], agreed[quantity], rtol=1e-10)
    np.testing.assert_allclose(
        agreed["validation_loss"],
        mean_of(task.problem.upper, x, y, task.batch.upper),
        rtol=1e-12,
    )


@pytest.mark.parametrize("name", ["quadratic", "coefficient_tuning"])
def test_evaluate_takes_a_further_axis_of_seeds(toy, shards, name, key):
    task = toy if name == "quadratic" else small_tasks(shards)[name]

    def noise(leaf, k):
        return leaf[None, None] + jax.random.normal(k, (3, task.n, *leaf.shape))

    with jax.numpy_rank_promotion("allow"):
        states = Pair(noise(task.x0, key), noise(task.y0, key))
    together = jax.vmap(task.evaluate)(states)
    for seed in range(3):
        alone = task.evaluate(at(states, seed))
        for quantity, value in alone.items():
            np.testing.assert_allclose(together[quantity][seed], value, rtol=1e-12)


def test_accuracy_counts_true_samples_only():
    logits = jnp.array([[2.0, 1.0], [0.0, 1.0], [5.0, 0.0]])
    samples = data.Samples(jnp.zeros((3, 1)), jnp.array([0, 0, 0]), jnp.arange(3) < 2)
    assert classification.accuracy(logits, samples) == 0.5


def test_the_tuned_lower_level_learns_the_digits():
    task = dbo.tasks.coefficient_tuning()
    whole = jax.value_and_grad(
        lambda y: mean_of(task.problem.lower, task.x0 - 2, y, task.batch.lower)
    )

    def descend(y, _):
        value, slope = whole(y)
        return y - 0.5 * slope, value

    y, values = jax.jit(lambda y: jax.lax.scan(descend, y, length=150))(task.y0)
    assert jnp.all(jnp.diff(values) < 0)
    x = dbo.replicate(task.x0, task.n)
    found = task.evaluate(SimpleNamespace(x=x, y=dbo.replicate(y, task.n)))
    assert found["test_accuracy"] > 0.9


def test_starts_have_the_precision_of_jax(shards):
    for task in small_tasks(shards).values():
        leaves = jax.tree.leaves((task.x0, task.y0, task.batch.lower.inputs))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float64")}


# --- hyper-cleaning ------------------------------------------------------------------


def labelled(node_samples):
    """The true samples of one node: (inputs, labels, ids)."""
    held = np.asarray(node_samples.mask)
    return (np.asarray(leaf)[held] for leaf in node_samples[:2] + node_samples[3:])


def test_hyper_cleaning_is_the_written_objective(shards, key):
    task = dbo.tasks.hyper_cleaning(shards, corruption=0.4, ridge=0.3)
    x_key, y_key = jax.random.split(key)
    x = jax.random.normal(x_key, task.x0.shape)
    y = jax.random.normal(y_key, task.y0.shape)
    for i in range(4):
        inputs, labels, ids = labelled(at(task.batch.lower, i))
        weighed = 0.0
        for row, label, sample in zip(inputs, labels, ids, strict=True):
            logits = row @ np.asarray(y)
            loss = np.log(np.exp(logits).sum()) - logits[label]
            weighed += loss / (1 + np.exp(-x[sample]))
        wanted = weighed / max(1, len(ids)) + 0.3 * float((y**2).sum())
        found = task.problem.lower(x, y, at(task.batch.lower, i))
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_every_training_sample_has_one_weight_and_keeps_it_in_minibatches(shards):
    task = dbo.tasks.hyper_cleaning(shards)
    whole = task.batch.lower
    ids = np.asarray(whole.ids)[np.asarray(whole.mask)]
    assert ids.tolist() == list(range(task.x0.size))
    sampler = task.sampler(4)
    for step in range(5):
        batch = sampler(jax.random.key(1), step).lower
        for i in range(task.n):
            for row, label, sample in zip(*labelled(at(batch, i)), strict=True):
                j = np.flatnonzero((whole.ids[i] == sample) & whole.mask[i])
                assert len(j) == 1
                np.testing.assert_array_equal(row, whole.inputs[i, j[0]])
                assert label == whole.labels[i, j[0]]


def test_a_node_moves_the_weights_of_its_own_samples_alone(shards):
    task = dbo.tasks.hyper_cleaning(shards)
    y = task.y0 + 0.1
    batch = task.sampler(4)(jax.random.key(1), 2).lower
    for i in range(task.n):
        one = at(batch, i)
        slope = jax.grad(task.problem.lower)(task.x0, y, one)
        _, _, ids = labelled(one)
        assert np.flatnonzero(slope).tolist() == sorted(ids.tolist())


def test_padding_does_not_weigh_sample_zero(shards):
    task = dbo.tasks.hyper_cleaning(shards)
    i = int(jnp.argmin(shards.train.mask.sum(1)))
    one = at(task.batch.lower, i)
    assert not one.mask.all(), "the case needs padding"
    bare = jax.tree.map(lambda leaf: leaf[one.mask], one)
    garbage = one._replace(inputs=jnp.where(one.mask[:, None], one.inputs, 1e3))
    value = jax.value_and_grad(task.problem.lower, (0, 1))
    wanted = value(task.x0, task.y0 + 0.3, bare)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14),
        value(task.x0, task.y0 + 0.3, garbage),
        wanted,
    )


def test_labels_are_replaced_as_often_as_promised():
    clean = data.distribute(data.digits(), n=10)
    held = np.asarray(clean.train.mask)
    for corruption in (0.0, 0.5, 1.0):
        task = dbo.tasks.hyper_cleaning(clean, corruption)
        changed = np.asarray(task.batch.lower.labels != clean.train.labels)
        assert not changed[~held].any()
        # A uniform label is the true one once in ten times.
        rate, m = 0.9 * corruption, held.sum()
        spread = np.sqrt(rate * (1 - rate) / m)
        assert abs(changed[held].mean() - rate) <= 5 * spread
    assert jax.tree.all(
        jax.tree.map(jnp.array_equal, task.batch.upper, clean.validation)
    )
    again, other = (dbo.tasks.hyper_cleaning(clean, 1.0, seed=s) for s in (0, 1))
    np.testing.assert_array_equal(again.batch.lower.labels, task.batch.lower.labels)
    assert jnp.any(other.batch.lower.labels != task.batch.lower.labels)


def test_separation_counts_pairs(key):
    values = jnp.round(3 * jax.random.normal(key, (40,)))
    low, high = values[:13], values[13:]
    pairs = [(a < b) + 0.5 * (a == b) for a in low for b in high]
    found = classification.separation(low, high)
    np.testing.assert_allclose(found, np.mean(pairs), rtol=1e-12)
    assert classification.separation(low[:0], high) == 0.5


def test_the_first_hypergradient_tells_wrong_labels_from_true_ones():
    rng, labels = np.random.default_rng(3), np.arange(600) % 3
    inputs = rng.normal(size=(600, 4)) + 4 * np.eye(3, 4)[labels]
    shards = data.distribute(data.Dataset(inputs, labels, 3, "clusters"), n=4)
    task = dbo.tasks.hyper_cleaning(shards, corruption=0.5, ridge=0.01)

    def lower(x, y):
        return mean_of(task.problem.lower, x, y.reshape(4, 3), task.batch.lower)

    def upper(x, y):
        return mean_of(task.problem.upper, x, y.reshape(4, 3), task.batch.upper)

    y = jnp.zeros(12)
    slope, curvature = jax.jit(jax.grad(lower, 1)), jax.jit(jax.hessian(lower, 1))
    for _ in range(10):
        y = y - jnp.linalg.solve(curvature(task.x0, y), slope(task.x0, y))
    assert jnp.linalg.norm(slope(task.x0, y)) < 1e-10
    z = jnp.linalg.solve(curvature(task.x0, y), jax.grad(upper, 1)(task.x0, y))
    hypergrad = -jax.grad(lambda x: slope(x, y) @ z)(task.x0)
    states = [
        SimpleNamespace(
            x=dbo.replicate(x, task.n), y=dbo.replicate(y.reshape(4, 3), task.n)
        )
        for x in (task.x0, -1e3 * hypergrad)
    ]
    before, after = (task.evaluate(state)["recovery"] for state in states)
    np.testing.assert_allclose(before, 0.5, rtol=1e-12)
    assert after > 0.9


# --- names and messages --------------------------------------------------------------


def test_every_name_leads_to_a_task():
    for name in dbo.tasks.NAMES:
        task = dbo.tasks.named(name)()
        assert dbo.trees.num_nodes(task.batch) == task.n


def backbone_with_statistics():
    linen = pytest.importorskip("flax.linen")
    return linen.Sequential([linen.Dense(3), linen.BatchNorm(use_running_average=True)])


MESSAGES = {
    "unknown name": (lambda _: dbo.tasks.named("quadratics"), "Write one of"),
    "sizes": (lambda _: dbo.tasks.quadratic(dx=0), "dx=0"),
    "no samples": (lambda _: dbo.tasks.quadratic().sampler(8), "pass `task.batch`"),
    "tuning ridge": (
        lambda shards: dbo.tasks.coefficient_tuning(shards, ridge=0.0),
        "ridge=0.0",
    ),
    "representation ridge": (
        lambda shards: dbo.tasks.hyper_representation(shards, ridge=-1.0),
        "ridge=-1.0",
    ),
    "corruption": (
        lambda shards: dbo.tasks.hyper_cleaning(shards, corruption=1.5),
        "corruption=1.5",
    ),
    "cleaning ridge": (
        lambda shards: dbo.tasks.hyper_cleaning(shards, ridge=0.0),
        "ridge=0.0",
    ),
    "no numbers": (
        lambda shards: dbo.tasks.hyper_cleaning(shards).problem.lower(
            jnp.zeros(36), jnp.zeros((4, 3)), at(shards.train, 0)
        ),
        "`Numbered`, got `Samples`",
    ),
    "statistics": (
        lambda shards: dbo.tasks.hyper_representation(
            shards, backbone_with_statistics()
        ),
        "batch_stats",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case, shards):
    build, words = MESSAGES[case]
    with pytest.raises(ValueError, match=words):
        build(shards)
