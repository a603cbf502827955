"""Sparse rows in place of dense inputs, and how they are dealt out to the nodes.

They are never made dense: with 130 107 words, those of one node would fill gigabytes.
"""

from __future__ import annotations

import dataclasses
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
        return jnp.matmul(inputs, y)
    return jnp.einsum(
        "mk,mkc->mc", inputs.values, y[inputs.columns], precision="highest"
    )


def padded(matrix: Any, width: int | None = None) -> SparseRows:
    """Rows of a SciPy matrix, padded to one width.

    Args:
        matrix: ``(m, d)``, from ``scipy.sparse`` in any of its forms.
        width: the most entries of a row; of a longer one those of largest magnitude
            stay. None is as many as the longest row has.

    Returns:
        The rows in NumPy.

    Raises:
        ValueError: if ``width`` is not positive.
    """
    if width is not None and width < 1:
        raise ValueError(f"`width` counts entries of a row, at least one; got {width}.")
    matrix = matrix.tocsr()
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
        >>> text = dbo.tasks.sparse_text(m=60, d=500, classes=3, words=40)
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
