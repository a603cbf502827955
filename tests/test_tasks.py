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
    """In NumPy, where no cut of a new shape is compiled."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)


def normal(*shape, seed=7):
    return np.random.default_rng(seed).normal(size=shape)


def mean_of(objective, x, y, stacked):
    return jnp.mean(jax.vmap(objective, (None, None, 0))(x, y, stacked))


# --- the quadratics ------------------------------------------------------------------


def test_the_default_quadratics_are_the_golden_toy(toy):
    a, b, c = map(np.asarray, toy.batch.lower)
    sums = [leaf.sum() for leaf in (a, b, c, np.asarray(toy.batch.upper))]
    golden = [955.3973574918, 34.4055987222, 48.9863084080, -143.0756448231]
    np.testing.assert_allclose(sums, golden, atol=5e-10, rtol=0)
    np.testing.assert_allclose(a[0, 0, 0], 1.2575437354, atol=5e-11)
    start = np.linalg.norm(jax.jit(toy.exact.hypergradient)(toy.x0))
    np.testing.assert_allclose(start, 2.416663993, atol=5e-10)
    np.testing.assert_allclose(np.linalg.norm(toy.exact.x_star), 7.100418, atol=5e-7)
    assert (toy.n, toy.x0.shape, toy.y0.shape) == (10, (20,), (60,))


def test_the_golden_toy_has_the_recorded_curvature(toy):
    local = np.linalg.eigvalsh(toy.batch.lower.a)
    mean = np.linalg.eigvalsh(np.mean(toy.batch.lower.a, 0))
    outer = np.linalg.eigvalsh(jax.jit(jax.hessian(toy.exact.value))(toy.x0))
    found = [mean[0], local.min(), local.max(), outer[0], outer[-1]]
    golden = [0.745133, 0.5, 8.923183, 0.131066, 0.591392]
    np.testing.assert_allclose(found, golden, atol=5e-7)


def test_gradients_of_the_quadratics_are_the_written_ones(toy):
    x, y = normal(20), normal(60)
    (a, b, c), t = at(toy.batch.lower, 3), at(toy.batch.upper, 3)
    lower = jax.jit(jax.grad(toy.problem.lower, (0, 1)))(x, y, at(toy.batch.lower, 3))
    upper = jax.jit(jax.grad(toy.problem.upper, (0, 1)))(x, y, t)
    np.testing.assert_allclose(lower[0], -b.T @ y, rtol=1e-12)
    np.testing.assert_allclose(lower[1], a @ y - b @ x - c, rtol=1e-10)
    np.testing.assert_allclose(upper[0], 0.1 * x, rtol=1e-12)
    np.testing.assert_allclose(upper[1], y - t, rtol=1e-12)


def test_the_closed_solution_is_stationary_for_the_mean_lower_level(toy):
    @jax.jit
    def gradient(x):
        y = toy.exact.solution(x)
        return jax.grad(mean_of, 2)(toy.problem.lower, x, y, toy.batch.lower)

    assert np.linalg.norm(gradient(normal(20))) < 1e-12


def test_the_closed_hypergradient_is_the_gradient_of_the_value(toy):
    @jax.jit
    def all_four(x):
        found, by_calculus = toy.exact.hypergradient(x), jax.grad(toy.exact.value)(x)
        mean = mean_of(toy.problem.upper, x, toy.exact.solution(x), toy.batch.upper)
        return found, by_calculus, toy.exact.value(x), mean

    found, by_calculus, value, mean = all_four(normal(20))
    np.testing.assert_allclose(found, by_calculus, rtol=1e-10)
    np.testing.assert_allclose(value, mean, rtol=1e-12)


def test_the_closed_hypergradient_agrees_with_finite_differences(toy):
    x, steps = normal(20), np.eye(20)
    value = jax.jit(jax.vmap(toy.exact.value))
    # Psi is quadratic: central differences are exact up to rounding at any width.
    slopes = (np.asarray(value(x + steps)) - value(x - steps)) / 2
    found = jax.jit(toy.exact.hypergradient)(x)
    np.testing.assert_allclose(found, slopes, rtol=1e-10, atol=1e-10)


def test_the_hypergradient_vanishes_at_the_optimum_and_evaluate_says_so(toy):
    stacked = dbo.replicate(toy.exact.x_star, 10)
    found = toy.evaluate(SimpleNamespace(x=stacked, y=dbo.replicate(toy.y0, 10)))
    assert set(found) == {"hypergrad_true"}
    assert found["hypergrad_true"] < 1e-12


def test_equal_curvature_keeps_the_solution(toy):
    equal = dbo.tasks.with_equal_curvature(toy)
    assert np.ptp(equal.batch.lower.a, 0).max() == 0
    assert np.ptp(equal.batch.lower.b, 0).max() == 0
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


def test_coefficient_tuning_is_the_written_objective(shards):
    task = dbo.tasks.coefficient_tuning(shards, ridge=0.7)
    x, y = normal(4), normal(4, 3)
    upper, lower = map(jax.jit, task.problem)
    for i in range(2):
        for samples, objective, factor in (
            (shards.validation, upper, 0.0),
            (shards.train, lower, 0.7 / 12),
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
    masks = np.asarray(shards.train.mask)
    assert not masks.all(), "the case needs shares of unequal size"
    y = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.3, task.y0)
    value = jax.jit(jax.value_and_grad(task.problem.lower, (0, 1)))
    i = int(np.argmin(masks.sum(1)))
    one = at(shards.train, i)
    bare = jax.tree.map(lambda leaf: leaf[one.mask], one)
    garbage = one._replace(
        inputs=np.where(one.mask[:, None], one.inputs, 1e3),
        labels=np.where(one.mask, one.labels, 2),
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
    none = none._replace(mask=np.zeros_like(none.mask))
    both = jax.jit(jax.value_and_grad(task.problem.upper, 1))
    value, slope = both(task.x0, task.y0, none)
    assert value == 0
    assert not np.asarray(slope).any()


def test_the_head_of_the_representation_is_regularised_and_nothing_else(shards):
    task = small_tasks(shards)["hyper_representation"]
    one = at(shards.train, 1)
    y = jax.tree.map(np.ones_like, task.y0)
    upper, lower = task.problem

    @jax.jit
    def penalty_and_hessian(x):
        of_kernel = jax.hessian(lambda v: lower(x, {**y, "kernel": v}, one))
        return lower(x, y, one) - upper(x, y, one), of_kernel(jnp.asarray(y["kernel"]))

    penalty, hessian = penalty_and_hessian(task.x0)
    np.testing.assert_allclose(penalty, 0.5 * 0.01 * (3 * 3 + 3), rtol=1e-12)
    assert np.linalg.eigvalsh(hessian.reshape(9, 9))[0] > 0.01 - 1e-9


@pytest.mark.parametrize("name", ["coefficient_tuning", "hyper_representation"])
def test_evaluate_judges_at_the_node_means(shards, name):
    task = small_tasks(shards)[name]
    x = jax.tree.map(np.asarray, task.x0)
    y = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, task.y0)
    drift = normal(task.n)
    drift = drift - drift.mean()
    evaluate = jax.jit(lambda x, y: task.evaluate(SimpleNamespace(x=x, y=y)))

    def replicated(leaf, by=0 * drift):
        return leaf[None] + by.reshape((-1,) + (1,) * leaf.ndim)

    def spread(leaf):
        return replicated(leaf, drift)

    agreed = evaluate(*jax.tree.map(replicated, (x, y)))
    found = evaluate(*jax.tree.map(spread, (x, y)))
    assert set(found) == {"validation_loss", "test_loss", "test_accuracy"}
    for quantity in found:
        np.testing.assert_allclose(found[quantity], agreed[quantity], rtol=1e-10)
    np.testing.assert_allclose(
        agreed["validation_loss"],
        jax.jit(mean_of, static_argnums=0)(task.problem.upper, x, y, task.batch.upper),
        rtol=1e-12,
    )


@pytest.mark.parametrize("name", ["quadratic", "coefficient_tuning"])
def test_evaluate_takes_a_further_axis_of_seeds(toy, shards, name):
    task = toy if name == "quadratic" else small_tasks(shards)[name]

    def noise(leaf):
        return np.asarray(leaf)[None, None] + normal(3, task.n, *leaf.shape)

    states = Pair(noise(task.x0), noise(task.y0))
    together, evaluate = (
        jax.jit(jax.vmap(task.evaluate))(states),
        jax.jit(task.evaluate),
    )
    for seed in range(3):
        alone = evaluate(at(states, seed))
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

    @jax.jit
    def learn(y):
        y, values = jax.lax.scan(descend, y, length=150)
        x, y = dbo.replicate((task.x0, y), task.n)
        return values, task.evaluate(SimpleNamespace(x=x, y=y))

    values, found = learn(task.y0)
    assert (np.diff(values) < 0).all()
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


def test_hyper_cleaning_is_the_written_objective(shards):
    task = dbo.tasks.hyper_cleaning(shards, corruption=0.4, ridge=0.3)
    x, y = normal(*task.x0.shape), normal(*task.y0.shape)
    lower = jax.jit(task.problem.lower)
    for i in range(4):
        inputs, labels, ids = labelled(at(task.batch.lower, i))
        weighed = 0.0
        for row, label, sample in zip(inputs, labels, ids, strict=True):
            logits = row @ y
            loss = np.log(np.exp(logits).sum()) - logits[label]
            weighed += loss / (1 + np.exp(-x[sample]))
        wanted = weighed / max(1, len(ids)) + 0.3 * float((y**2).sum())
        found = lower(x, y, at(task.batch.lower, i))
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_every_training_sample_has_one_weight_and_keeps_it_in_minibatches(shards):
    task = dbo.tasks.hyper_cleaning(shards)
    whole = jax.tree.map(np.asarray, task.batch.lower)
    assert whole.ids[whole.mask].tolist() == list(range(task.x0.size))
    sampler = jax.jit(task.sampler(4))
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
    y = np.asarray(task.y0) + 0.1
    batch = jax.jit(task.sampler(4))(jax.random.key(1), 2).lower
    slope_of = jax.jit(jax.grad(task.problem.lower))
    for i in range(task.n):
        one = at(batch, i)
        slope = slope_of(task.x0, y, one)
        _, _, ids = labelled(one)
        assert np.flatnonzero(slope).tolist() == sorted(ids.tolist())


def test_padding_does_not_weigh_sample_zero(shards):
    task = dbo.tasks.hyper_cleaning(shards)
    i = int(np.argmin(np.asarray(shards.train.mask).sum(1)))
    one = at(task.batch.lower, i)
    assert not one.mask.all(), "the case needs padding"
    bare = jax.tree.map(lambda leaf: leaf[one.mask], one)
    garbage = one._replace(inputs=np.where(one.mask[:, None], one.inputs, 1e3))
    value = jax.jit(jax.value_and_grad(task.problem.lower, (0, 1)))
    y = np.asarray(task.y0) + 0.3
    wanted = value(task.x0, y, bare)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14),
        value(task.x0, y, garbage),
        wanted,
    )


def test_labels_are_replaced_as_often_as_promised():
    clean = data.distribute(data.digits(), n=10)
    held = np.asarray(clean.train.mask)
    for corruption in (0.0, 0.5, 1.0):
        task = dbo.tasks.hyper_cleaning(clean, corruption)
        labels = np.asarray(task.batch.lower.labels)
        changed = labels != np.asarray(clean.train.labels)
        assert not changed[~held].any()
        # A uniform label is the true one once in ten times.
        rate, m = 0.9 * corruption, held.sum()
        spread = np.sqrt(rate * (1 - rate) / m)
        assert abs(changed[held].mean() - rate) <= 5 * spread
    assert jax.tree.all(
        jax.tree.map(np.array_equal, task.batch.upper, clean.validation)
    )
    again, other = (dbo.tasks.hyper_cleaning(clean, 1.0, seed=s) for s in (0, 1))
    np.testing.assert_array_equal(again.batch.lower.labels, task.batch.lower.labels)
    assert (np.asarray(other.batch.lower.labels) != labels).any()


def test_separation_counts_pairs():
    values = np.round(3 * normal(40))
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

    y = np.zeros(12)
    slope, curvature = jax.jit(jax.grad(lower, 1)), jax.jit(jax.hessian(lower, 1))
    for _ in range(10):
        y = y - np.linalg.solve(curvature(task.x0, y), slope(task.x0, y))
    assert np.linalg.norm(slope(task.x0, y)) < 1e-10
    z = np.linalg.solve(curvature(task.x0, y), jax.jit(jax.grad(upper, 1))(task.x0, y))

    @jax.jit
    def recoveries(x):
        hypergrad = -jax.grad(lambda x: slope(x, y) @ z)(x)
        both = jnp.stack([x, -1e3 * hypergrad])
        states = dbo.replicate((both, jnp.stack([y.reshape(4, 3)] * 2)), task.n)
        swapped = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), Pair(*states))
        return jax.vmap(task.evaluate)(swapped)["recovery"]

    before, after = recoveries(task.x0)
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
