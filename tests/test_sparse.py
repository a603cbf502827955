"""Sparse rows give the numbers of dense ones, at the cost of their entries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax.tasks import data, sparse
from dbojax.tasks.data import Samples
from dbojax.tasks.sparse import SparseDataset, SparseRows

scipy_sparse = pytest.importorskip("scipy.sparse")

TEXT = functools.partial(dbo.tasks.sparse_text, m=80, d=90, classes=4, words=24)


def dense(rows):
    """The matrix, by loops over the entries; leading axes are kept."""
    columns, values = np.asarray(rows.columns), np.asarray(rows.values)
    found = np.zeros(rows.shape, values.dtype)
    for at in np.ndindex(columns.shape):
        found[(*at[:-1], columns[at])] += values[at]
    return found


def dense_shards(shards):
    def convert(samples):
        return samples._replace(inputs=jnp.asarray(dense(samples.inputs)))

    parts = {p: convert(getattr(shards, p)) for p in ("train", "validation", "test")}
    return shards._replace(**parts)


@pytest.fixture(scope="module")
def shards():
    return sparse.distribute(
        TEXT(), n=3, deal=functools.partial(data.split_by_label, h=0.6)
    )


def numbers(task, x, y):
    """Losses and gradients of both levels at all nodes, and the scores."""

    @jax.jit
    def found(batch):
        levels = [
            jax.vmap(jax.value_and_grad(level, (0, 1)), (None, None, 0))(x, y, part)
            for level, part in zip(task.problem, batch, strict=True)
        ]
        hessian = jax.vmap(
            lambda b: jax.jvp(
                lambda y: jax.grad(task.problem.lower, 1)(x, y, b), (y,), (y,)
            )[1]
        )(batch.lower)
        return levels, hessian

    state = type("State", (), {"x": x[None], "y": y[None]})
    return found(task.batch), task.evaluate(state)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(dbo.tasks.sparse_coefficient_tuning, corruption=0.3),
        dbo.tasks.hyper_cleaning,
    ],
    ids=["coefficient_tuning", "hyper_cleaning"],
)
def test_losses_gradients_and_products_are_those_of_dense_rows(shards, key, make):
    tasks = make(shards), make(dense_shards(shards))
    (x, y), (dense_x, dense_y) = ((task.x0, task.y0) for task in tasks)
    assert (x.shape, y.shape) == (dense_x.shape, dense_y.shape)
    keys = jax.random.split(key)
    x, y = (jax.random.normal(k, v.shape) for k, v in zip(keys, (x, y), strict=True))
    found, wanted = (numbers(task, x, y) for task in tasks)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        found,
        wanted,
    )
    (upper, lower), hessian = found[0]
    slopes = upper[1][1], *lower[1], hessian
    assert all(jnp.linalg.norm(leaf) > 1e-3 for leaf in slopes)


def test_the_tuning_is_the_written_equation(shards, key):
    task = dbo.tasks.sparse_coefficient_tuning(shards, ridge=0.7)
    x, y = jax.random.normal(key, (90,)), jax.random.normal(key, (90, 4))
    part = jax.tree.map(lambda leaf: np.asarray(leaf[1]), task.batch.lower)
    logits = dense(part.inputs) @ np.asarray(y)
    losses = [
        np.log(np.exp(row).sum()) - row[label]
        for row, label, true in zip(logits, part.labels, part.mask, strict=True)
        if true
    ]
    penalty = sum(np.exp(x[q]) * y[q, p] ** 2 for q in range(90) for p in range(4))
    wanted = np.mean(losses) + 0.7 / (4 * 90) * penalty
    found = jax.jit(task.problem.lower)(x, y, part)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_padding_has_no_influence(shards, key):
    """More padded entries and more padded samples, with rubbish in the samples."""

    def widened(leaf, axis, by, value):
        widths = [(0, by if a == axis else 0) for a in range(leaf.ndim)]
        return jnp.pad(leaf, widths, constant_values=value)

    def more(samples):
        rows = samples.inputs
        columns, values = (widened(a, 2, 5, 0) for a in (rows.columns, rows.values))
        columns, values = widened(columns, 1, 2, 7), widened(values, 1, 2, 3.0)
        return Samples(
            SparseRows(columns, values, rows.d),
            widened(samples.labels, 1, 2, 1),
            widened(samples.mask, 1, 2, False),
        )

    padded = shards._replace(
        train=more(shards.train), validation=more(shards.validation)
    )
    x, y = jax.random.normal(key, (90,)), jax.random.normal(key, (90, 4))
    found, wanted = (
        numbers(dbo.tasks.sparse_coefficient_tuning(each), x, y)
        for each in (padded, shards)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15),
        found,
        wanted,
    )


def test_no_array_has_the_size_of_dense_rows():
    """Directions of all nodes at once need far less than the dense rows would."""
    shards = sparse.distribute(
        dbo.tasks.sparse_text(m=300, d=4000, classes=3, words=10), n=2
    )
    task = dbo.tasks.sparse_coefficient_tuning(shards)
    oracle = dbo.oracles.penalty(task.problem, 10.0)
    point = dbo.replicate((task.x0, task.y0, task.y0), 2)
    keys = jax.random.split(jax.random.key(0), 2)

    def directions(keys, point, batch):
        return jax.vmap(oracle.directions)(keys, *point, (), batch)[0]

    args = keys, point, task.batch
    program = jax.jit(directions).lower(*args).compile()
    rows = shards.train.inputs
    dense_bytes = np.prod(rows.shape) * rows.values.itemsize
    used = program.memory_analysis().temp_size_in_bytes
    assert used < dense_bytes / 4
    twin = dbo.tasks.coefficient_tuning(dense_shards(shards))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(twin.batch)) > dense_bytes


def test_samplers_and_a_method_take_sparse_rows(shards, key):
    task = dbo.tasks.sparse_coefficient_tuning(shards)
    batch = task.sampler(4)(key, 0)
    assert batch.lower.inputs.shape == (3, 4, 90)
    for i in range(3):
        drawn = dense(jax.tree.map(lambda leaf, i=i: leaf[i], batch.lower.inputs))
        held = dense(jax.tree.map(lambda leaf, i=i: leaf[i], shards.train.inputs))
        assert all((row == held).all(1).any() for row in drawn)
    wire = dbo.channels.exact(dbo.mixing.averaging(3))
    method = dbo.algorithms.c2dfb(
        task.problem, outer=wire, inner=wire, upper_step=1.0, lower_step=4.0
    )
    state = method.init(dbo.replicate(task.x0, 3), dbo.replicate(task.y0, 3))
    before = task.evaluate(state)["validation_loss"]
    state, _ = dbo.run(method, key, state, task.batch, num_steps=20)
    assert task.evaluate(state)["validation_loss"] < 0.9 * before


# --- the data ------------------------------------------------------------------------


def matrix(rng, lengths=(3, 0, 5, 1), d=9):
    rows = np.zeros((len(lengths), d))
    for row, length in zip(rows, lengths, strict=True):
        row[rng.choice(d, length, replace=False)] = rng.normal(size=length)
    return rows


def test_padded_rows_are_the_matrix():
    rows = matrix(np.random.default_rng(0))
    found = sparse.padded(scipy_sparse.csr_matrix(rows))
    assert found.columns.shape == (4, 5)
    assert found.columns.dtype == np.int32
    np.testing.assert_array_equal(dense(found), rows)
    for form in (scipy_sparse.csc_matrix, scipy_sparse.coo_matrix):
        for one, other in zip(
            jax.tree.leaves(sparse.padded(form(rows))),
            jax.tree.leaves(found),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
    cut = sparse.padded(scipy_sparse.csr_matrix(rows), width=2)
    limits = np.sort(np.abs(rows), 1)[:, -2:-1]
    np.testing.assert_array_equal(
        dense(cut), np.where(np.abs(rows) >= np.maximum(limits, 1e-300), rows, 0)
    )
    empty = sparse.padded(scipy_sparse.csr_matrix((2, 3)))
    assert empty.values.tolist() == [[0.0], [0.0]]
    with pytest.raises(ValueError, match="at least one; got 0"):
        sparse.padded(scipy_sparse.csr_matrix(rows), width=0)


def test_the_stand_in_has_the_shape_of_text():
    text = dbo.tasks.sparse_text(m=1000, d=8000, words=100, topical=0.2, seed=3)
    rows = text.inputs
    np.testing.assert_allclose((rows.values**2).sum(1), 1, rtol=1e-12)
    used = rows.values != 0
    counts = np.sort(np.bincount(rows.columns[used], minlength=8000))[::-1]
    # Zipf: word 200 comes about a tenth as often as word 20 (those are in few enough
    # documents not to come twice in many).
    assert 5 < counts[20:40].mean() / counts[200:400].mean() < 15
    for row, some in zip(rows.columns[:50], used[:50], strict=True):
        assert len(set(row[some])) == some.sum()  # each word once
    assert np.bincount(text.labels).tolist() == [50] * 20
    again = dbo.tasks.sparse_text(m=1000, d=8000, words=100, topical=0.2, seed=3)
    assert np.array_equal(again.inputs.values, rows.values)
    # The class is in the words: the nearest class mean of others finds it.
    train, test = np.arange(1000) < 500, np.arange(1000) >= 500
    features = dense(rows)
    means = np.stack([features[train & (text.labels == k)].mean(0) for k in range(20)])
    right = (features[test] @ means.T).argmax(1) == text.labels[test]
    assert right.mean() > 0.8
    plain = dbo.tasks.sparse_text(m=1000, d=8000, words=100, topical=0.0)
    features = dense(plain.inputs)
    means = np.stack([features[train & (plain.labels == k)].mean(0) for k in range(20)])
    right = (features[test] @ means.T).argmax(1) == plain.labels[test]
    assert right.mean() < 0.12


def test_dealing_uses_each_sample_once_and_h():
    text = TEXT(m=200)
    deal = functools.partial(data.split_by_label, h=1.0)
    shards = sparse.distribute(text, n=4, deal=deal, seed=5)
    for part, size in ((shards.train, 60), (shards.validation, 60)):
        assert part.mask.sum() == size
        for i in range(4):
            assert set(np.asarray(part.labels[i][part.mask[i]]).tolist()) == {i}
    whole = [
        dense(part.inputs)[np.asarray(part.mask)]
        for part in (shards.train, shards.validation, shards.test)
    ]
    found, wanted = np.concatenate(whole), dense(text.inputs)
    order = [np.lexsort(rows.T) for rows in (found, wanted)]
    np.testing.assert_allclose(found[order[0]], wanted[order[1]], rtol=1e-12)


def test_a_given_test_set_is_kept_apart():
    train, test = TEXT(m=40), TEXT(m=12, seed=1)
    shards = sparse.distribute(train, n=2, test=test)
    np.testing.assert_array_equal(dense(shards.test.inputs), dense(test.inputs))
    sizes = [int(part.mask.sum()) for part in shards[:3]]
    assert sizes == [20, 20, 12]
    with pytest.raises(ValueError, match="91 features and 4 classes"):
        sparse.distribute(train, n=2, test=TEXT(d=91))
    with pytest.raises(ValueError, match="give 20 and 20"):
        sparse.distribute(train, n=30, test=test)


@pytest.mark.parametrize(
    "wrong", [{"m": 3}, {"d": 3}, {"words": 0}, {"topical": 1.5}, {"classes": 0}]
)
def test_impossible_text_is_refused(wrong):
    with pytest.raises(ValueError, match="at least one document"):
        TEXT(**wrong)


# --- 20 Newsgroups -------------------------------------------------------------------


def test_newsgroups_come_from_the_cache_of_scikit_learn(monkeypatch):
    datasets = pytest.importorskip("sklearn.datasets")
    asked = []
    rows = {
        part: matrix(np.random.default_rng(k), lengths)
        for k, (part, lengths) in enumerate(
            {"train": (3, 4, 5, 1), "test": (2, 9)}.items()
        )
    }

    def fetch(*, subset, data_home, download_if_missing):
        asked.append((subset, data_home, download_if_missing))
        return datasets._base.Bunch(
            data=scipy_sparse.csr_matrix(rows[subset]),
            target=np.arange(len(rows[subset])) % 2,
            target_names=["a", "b"],
        )

    monkeypatch.setattr(datasets, "fetch_20newsgroups_vectorized", fetch)
    train, test = dbo.tasks.newsgroups(data_home="here")
    assert asked == [("train", "here", False), ("test", "here", False)]
    np.testing.assert_array_equal(dense(train.inputs), rows["train"])
    np.testing.assert_array_equal(dense(test.inputs), rows["test"])
    assert isinstance(test, SparseDataset)
    assert (test.labels.tolist(), test.num_classes) == ([0, 1], 2)
    assert dbo.tasks.newsgroups(width=3)[1].inputs.columns.shape == (2, 3)


def test_newsgroups_that_are_not_there_say_how_to_get_them(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(FileNotFoundError, match="fetch_20newsgroups_vectorized"):
        dbo.tasks.newsgroups(data_home=tmp_path)
