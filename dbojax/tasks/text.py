"""Text in sparse rows: 20 Newsgroups, a stand-in of its shape, and a task on either."""

from __future__ import annotations

import os

import numpy as np

from dbojax.tasks import data
from dbojax.tasks.classification import coefficient_tuning
from dbojax.tasks.data import Shards
from dbojax.tasks.sparse import SparseDataset, SparseRows, distribute, padded
from dbojax.tasks.task import Task


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
        The training and the test set. ``sparse.distribute(train, n, test=test)`` halves
        the former, stratified, into training and validation.

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
                "a network, or use the stand-in `dbo.tasks.sparse_text()`."
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
    topical: float = 0.045,
    seed: int = 0,
) -> SparseDataset:
    """Draw documents of the shape of 20 Newsgroups, with words that tell the class.

    A document has between a quarter of ``words`` and ``words`` words, some of them
    again and again, since word frequencies follow Zipf's law. A part of the words is
    drawn from those of the document's class: the rarest eighth of the vocabulary is
    shared out between the classes. Entries are counts times one plus the logarithm of
    the inverse document frequency, rows scaled to length one. At the default size a
    document has about 160 entries, as in 20 Newsgroups, and a linear classifier that is
    fitted to 30 % of the documents names the class of about 0.84 of the others.

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


def sparse_coefficient_tuning(
    shards: Shards | None = None,
    ridge: float = 1.0,
    corruption: float = 0.0,
    seed: int = 0,
) -> Task:
    """Tune one regularisation coefficient per word, at the size of 20 Newsgroups.

    This is :func:`~dbojax.tasks.classification.coefficient_tuning` on sparse rows. They
    are gathered and never made dense: x has 130 107 entries, y 2 602 140, and the data
    of all nodes a few million.

    Args:
        shards: the data; by default the stand-in ``dbo.tasks.sparse_text()``,
            dealt out to ten nodes. With scikit-learn's cache at hand, take
            ``train, test = dbo.tasks.newsgroups()`` and
            ``dbo.tasks.sparse.distribute(train, n=10, test=test)``.
        ridge: as there.
        corruption: as there.
        seed: as there.

    Returns:
        As there.

    Raises:
        ValueError: as there.

    Examples:
        >>> text = dbo.tasks.sparse_text(m=60, d=500, classes=3, words=40)
        >>> shards = dbo.tasks.sparse.distribute(text, n=2)
        >>> sparse_coefficient_tuning(shards).y0.shape
        (500, 3)
    """
    shards = distribute(sparse_text()) if shards is None else shards
    return coefficient_tuning(shards, ridge, corruption, seed)
