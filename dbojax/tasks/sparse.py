"""Text as sparse rows: 20 Newsgroups, a stand-in of its shape, and how to deal it out.

Rows are never made dense: with 130 107 words, those of one node would fill gigabytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.tasks import data
from dbojax.tasks.data import Deal, Samples, Shards

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseRows:
    """Rows of a matrix by their entries; takes the place of ``Samples.inputs``.

    A shorter row is padded with zeros in column 0. An entry that comes twice counts
    twice. All of JAX and the samplers see are ``columns`` and ``values``, so axes of
    nodes, rounds or seeds may come first.

    Args:
        columns: where, ``(m, width)``, int32, from 0 to d - 1.
        values: what, ``(m, width)``.
        d: columns in all.
    """

    columns: Array
    values: Array
    d: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the dense matrix, ``(m, d)``; leading axes before it."""
        return (*self.columns.shape[:-1], self.d)


class SparseDataset(NamedTuple):
    """Labelled sparse samples, as they come."""

    inputs: SparseRows  # (m, width), in NumPy
    labels: np.ndarray  # (m,), int, in 0 ... num_classes - 1
    num_classes: int
    name: str


def product(inputs: Array | SparseRows, y: jax.Array) -> jax.Array:
    r"""Rows times a matrix, ``inputs @ y``, at the cost of the entries there are.

    .. math:: (A y)_j = \sum_k a_{jk} \, y_{q_{jk}}

    with the columns q of the entries a; the rows of y are gathered. Its transpose, in a
    gradient, scatters into an array like y.

    Args:
        inputs: of one node, ``(m, d)``; dense or sparse.
        y: ``(d, c)``.

    Returns:
        ``(m, c)``.

    Examples:
        >>> columns = jnp.array([[2, 0], [1, 0]])
        >>> rows = SparseRows(columns, jnp.array([[5.0, 1.0], [2.0, 0.0]]), 3)
        >>> product(rows, jnp.eye(3)).tolist()
        [[1.0, 0.0, 5.0], [0.0, 2.0, 0.0]]
    """
    if not isinstance(inputs, SparseRows):
        return inputs @ y
    return jnp.einsum(
        "mk,mkc->mc", inputs.values, y[inputs.columns], precision="highest"
    )


def padded(matrix: Any, width: int | None = None) -> SparseRows:
    """Rows of a SciPy matrix in CSR form, padded to one width.

    Args:
        matrix: ``(m, d)``, from ``scipy.sparse``.
        width: the most entries of a row; of a longer one those of largest magnitude
            stay. None is as many as the longest row has.

    Returns:
        The rows in NumPy.

    Raises:
        ValueError: if ``width`` is not positive.
    """
    if width is not None and width < 1:
        raise ValueError(f"`width` counts entries of a row, at least one; got {width}.")
    counts = np.diff(matrix.indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    # Within a row from the largest magnitude down, so that a cut keeps the largest.
    order = np.lexsort((-np.abs(matrix.data), rows))
    position = np.arange(len(rows)) - np.repeat(matrix.indptr[:-1], counts)
    longest = max(1, int(counts.max(initial=0)))
    width = longest if width is None else min(width, longest)
    kept = position < width
    shape, at = (len(counts), width), (rows[kept], position[kept])
    columns, values = np.zeros(shape, np.int32), np.zeros(shape)
    columns[at], values[at] = matrix.indices[order][kept], matrix.data[order][kept]
    return SparseRows(columns, values, matrix.shape[1])


def newsgroups(
    width: int | None = 512, data_home: str | os.PathLike | None = None
) -> tuple[SparseDataset, SparseDataset]:
    """11 314 training and 7 532 test messages of 20 Newsgroups, word by word.

    They come from scikit-learn's own vectorised form, 130 107 features with rows of
    unit length, and from its cache alone: nothing is downloaded.

    Args:
        width: the most entries of a message; of a longer one those of largest magnitude
            stay. All rows are padded to one width and a few messages are very long.
            None keeps every entry.
        data_home: scikit-learn's folder; its default one if None.

    Returns:
        The training and the test set. ``distribute(train, n, test=test)`` halves the
        former, stratified, into training and validation.

    Raises:
        FileNotFoundError: if the cache does not hold it, with the line that fetches it.
        ImportError: if scikit-learn is not installed.
    """
    fetch = data.require(
        "sklearn.datasets", "20 Newsgroups"
    ).fetch_20newsgroups_vectorized

    def read(subset):
        try:
            found = fetch(subset=subset, data_home=data_home, download_if_missing=False)
        except OSError as error:
            raise FileNotFoundError(
                "scikit-learn's cache does not hold 20 Newsgroups. Fetch it once with "
                "`sklearn.datasets.fetch_20newsgroups_vectorized()`, on a machine with "
                "a network, or use the stand-in `dbo.tasks.sparse.sparse_text()`."
            ) from error
        labels = np.asarray(found.target, np.int32)
        classes = len(found.target_names)
        return SparseDataset(padded(found.data, width), labels, classes, "newsgroups")

    return read("train"), read("test")


def sparse_text(
    m: int = 18_846,
    d: int = 130_107,
    classes: int = 20,
    words: int = 320,
    topical: float = 0.07,
    seed: int = 0,
) -> SparseDataset:
    """Draw documents of the shape of 20 Newsgroups, with words that tell the class.

    A document has between a quarter of ``words`` and ``words`` words, some of them
    again and again, since word frequencies follow Zipf's law. A part of the words is
    drawn from those of the document's class: the rarest eighth of the vocabulary is
    shared out between the classes. Entries are counts times one plus the logarithm of
    the inverse document frequency, rows scaled to length one. At the default size a
    document has about 160 entries, as in 20 Newsgroups, and the nearest class mean of
    30 % of the documents names the class of about 0.8 of the others.

    Args:
        m: documents, in equal shares of the classes.
        d: the vocabulary.
        classes: how many.
        words: the most words of a document, and the width of the rows.
        topical: the chance that a word is drawn from those of the class.
        seed: of NumPy's default generator.

    Returns:
        A sparse data set.

    Raises:
        ValueError: if there are fewer documents or words than classes, no word in a
            document, or ``topical`` is no probability.

    Examples:
        >>> dataset = sparse_text(m=60, d=500, classes=3, words=40)
        >>> dataset.inputs.shape, np.bincount(dataset.labels).tolist()
        ((60, 500), [20, 20, 20])
        >>> bool(np.allclose((dataset.inputs.values**2).sum(1), 1))
        True
    """
    if not 1 <= classes <= min(m, d) or words < 1 or not 0 <= topical <= 1:
        raise ValueError(
            "`sparse_text` draws at least one document and one word per class, "
            f"documents of one word or more, and 0 <= topical <= 1; got m={m}, d={d}, "
            f"classes={classes}, words={words}, topical={topical}."
        )
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(m) % classes).astype(np.int32)
    rank_to_word = rng.permutation(d)  # frequent words are anywhere, as in a dictionary
    lengths = rng.integers(-(-words // 4), words + 1, size=m)
    documents = np.repeat(np.arange(m), lengths)
    # Zipf's law by the inverse of its continuous distribution function.
    ranks = ((d + 1.0) ** rng.random(documents.size)).astype(np.int64) - 1
    own = max(1, d // (8 * classes))
    pick = d - 1 - (labels[documents] * own + rng.integers(own, size=documents.size))
    ranks = np.where(
        rng.random(documents.size) < topical, pick, np.minimum(ranks, d - 1)
    )
    at, counts = np.unique(documents * d + rank_to_word[ranks], return_counts=True)
    return SparseDataset(_weighed(at, counts, m, d), labels, classes, "sparse_text")


def _weighed(at, counts, m, d) -> SparseRows:
    """Padded rows of unit length from flat positions and counts, ascending."""
    documents, columns = np.divmod(at, d)
    spread = np.bincount(columns, minlength=d)
    values = counts * (1 + np.log(m / spread[columns]))
    values /= np.sqrt(np.bincount(documents, values**2, m))[documents]
    sizes = np.bincount(documents, minlength=m)
    position = np.arange(len(at)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = np.zeros((m, sizes.max()), np.int32), np.zeros((m, sizes.max()))
    for row, entries in zip(rows, (columns, values), strict=True):
        row[documents, position] = entries
    return SparseRows(*rows, d)


def stack(dataset: SparseDataset, parts: Sequence[np.ndarray]) -> Samples:
    """Stack the shares of the nodes, padded to the largest one.

    Args:
        dataset: all samples.
        parts: the indices of each node.

    Returns:
        Samples with the node axis first, whose ``inputs`` are :class:`SparseRows`; the
        padding is zero and masked out.

    Examples:
        >>> rows = SparseRows(np.array([[1], [2], [0]]), np.array([[3.0], [4], [5]]), 3)
        >>> dataset = SparseDataset(rows, np.array([0, 1, 1]), 2, "tiny")
        >>> samples = stack(dataset, [np.array([2]), np.array([0, 1])])
        >>> samples.inputs.values[..., 0].tolist(), samples.mask.tolist()
        ([[5.0, 0.0], [3.0, 4.0]], [[True, False], [True, True]])
    """
    width = max(1, *(len(part) for part in parts))
    rows = np.stack([np.pad(part, (0, width - len(part))) for part in parts])
    mask = np.arange(width)[None] < np.array([[len(part)] for part in parts])

    def taken(leaf, dtype):
        shape = mask.shape + (1,) * (leaf.ndim - 1)
        return jnp.asarray(np.where(mask.reshape(shape), leaf[rows], 0), dtype)

    inputs = SparseRows(
        taken(dataset.inputs.columns, jnp.int32),
        taken(dataset.inputs.values, jnp.result_type(float)),
        dataset.inputs.d,
    )
    return Samples(inputs, taken(dataset.labels, jnp.int32), jnp.asarray(mask))


def distribute(
    dataset: SparseDataset,
    n: int = 10,
    deal: Deal = data.split_evenly,
    fractions: Sequence[float] | None = None,
    seed: int = 0,
    test: SparseDataset | None = None,
) -> Shards:
    """Split into train, validation and test, and deal out to the nodes.

    As :func:`dbojax.tasks.data.distribute`, but nothing is scaled: the entries of text
    are weighed already.

    Args:
        dataset: the samples.
        n: nodes.
        deal: ``deal(labels, n, rng=rng)`` gives the indices of each node, e.g.
            ``functools.partial(data.split_by_label, h=0.8)``.
        fractions: shares of train, validation and test; by default (0.5, 0.5, 0) next
            to a ``test``, else (0.3, 0.3, 0.4), about those of 20 Newsgroups.
        seed: of NumPy's default generator.
        test: a test set that comes with the data; the third share is then left out.

    Returns:
        Stacked training and validation samples, and one common test set, all with
        :class:`SparseRows` as inputs.

    Raises:
        ValueError: if training or validation has fewer samples than there are nodes, or
            ``test`` differs in features or classes.

    Examples:
        >>> text = sparse_text(m=60, d=500, classes=3, words=40)
        >>> shards = distribute(text, n=2)
        >>> shards.train.inputs.shape, shards.test.inputs.shape
        ((2, 9, 500), (24, 500))
    """
    if fractions is None:
        fractions = (0.3, 0.3, 0.4) if test is None else (0.5, 0.5, 0.0)
    data.check_test(test, dataset)
    rng = np.random.default_rng(seed)
    train, validation, rest = data.levels(dataset, n, fractions, rng)

    def dealt(part):
        parts = deal(dataset.labels[part], n, rng=rng)
        return stack(dataset, [part[own] for own in parts])

    if test is None:
        common = stack(dataset, [rest])
    else:
        common = stack(test, [np.arange(len(test.labels))])
    common = jax.tree.map(lambda leaf: leaf[0], common)
    return Shards(
        dealt(train), dealt(validation), common, dataset.num_classes, dataset.name
    )
