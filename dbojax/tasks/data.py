"""Data sets, and how they are dealt out to the nodes.

Everything here runs once, on the host, in NumPy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Deal = Callable[..., list[np.ndarray]]  # (labels, n, rng=...) -> indices of each node


class Dataset(NamedTuple):
    """Labelled samples, as they come."""

    inputs: np.ndarray  # (m, d), float
    labels: np.ndarray  # (m,), int, in 0 ... num_classes - 1
    num_classes: int
    name: str


class Samples(NamedTuple):
    """Labelled samples padded to one length; a node axis may come first."""

    inputs: Any  # (m, d), an array or `sparse.SparseRows`, zero where padded
    labels: jax.Array | np.ndarray  # (m,), int32
    mask: jax.Array | np.ndarray  # (m,), True for a true sample


class Numbered(NamedTuple):
    """Samples that know their numbers, for variables with an entry per sample."""

    inputs: Any  # as in `Samples`
    labels: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray
    ids: jax.Array | np.ndarray  # (m,), int32, counted over all nodes; zero if padded


class Shards(NamedTuple):
    """A data set dealt out to the nodes."""

    train: Samples  # (n, m, ...): the lower level's data
    validation: Samples  # (n, m', ...): the upper level's data
    test: Samples  # (m'', ...): nobody's, to judge by
    num_classes: int
    name: str


def require(module: str, purpose: str) -> Any:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs `{module.partition('.')[0]}`, which is not installed. "
            "Install it with `pip install dbojax[tasks]`."
        ) from error


def _from_sklearn(name):
    bunch = require("sklearn.datasets", f"The data set {name!r}")
    bunch = getattr(bunch, f"load_{name}")()
    labels = np.asarray(bunch.target, np.int32)
    inputs = np.asarray(bunch.data, np.float64)
    return Dataset(inputs, labels, len(bunch.target_names), name)


def digits() -> Dataset:
    """1797 handwritten digits of 8 x 8 pixels, which ship with scikit-learn."""
    return _from_sklearn("digits")


def breast_cancer() -> Dataset:
    """569 tumours in 30 measurements, which ship with scikit-learn."""
    return _from_sklearn("breast_cancer")


def standardised(dataset: Dataset) -> Dataset:
    """Shift and scale each feature to mean zero and variance one over all samples.

    A constant feature becomes zero. There is no test set to keep apart: this is for
    plain minimisation, and :func:`distribute` scales by its training samples itself.

    Examples:
        >>> inputs = np.array([[1.0, 5.0], [3.0, 5.0]])
        >>> standardised(Dataset(inputs, np.array([0, 1]), 2, "two")).inputs.tolist()
        [[-1.0, 0.0], [1.0, 0.0]]
    """
    mean = dataset.inputs.mean(0, keepdims=True)
    spread = dataset.inputs.std(0, keepdims=True)
    # A constant feature may have a spread of rounding errors.
    varies = np.ptp(dataset.inputs, axis=0, keepdims=True) > 0
    scaled = np.where(varies, dataset.inputs - mean, 0) / np.where(varies, spread, 1)
    return dataset._replace(inputs=scaled)


def one_hot(
    m: int = 4000, d: int = 123, attributes: int = 14, seed: int = 0
) -> Dataset:
    """Draw people with categorical attributes, encoded in zeros and ones.

    The d features fall into groups, one per attribute, and a sample has a single one
    in each; the first categories of an attribute are the common ones. A planted
    logistic model with noise gives the two classes, about a quarter in class 1.

    Args:
        m: samples; the census data "a9a", which this resembles, have 32561.
        d: features in all.
        attributes: ones in each sample.
        seed: of NumPy's default generator.

    Returns:
        A data set of two classes.

    Raises:
        ValueError: unless ``1 <= attributes <= d`` and ``m`` is at least four.

    Examples:
        >>> dataset = one_hot(m=100)
        >>> dataset.inputs.shape, set(dataset.inputs.sum(1).tolist())
        ((100, 123), {14.0})
    """
    if not 1 <= attributes <= d or m < 4:
        raise ValueError(
            f"`one_hot` draws at least four samples with 1 <= attributes <= d, got "
            f"m={m}, d={d}, attributes={attributes}."
        )
    rng = np.random.default_rng(seed)
    inputs = np.zeros((m, d))
    for group in np.array_split(np.arange(d), attributes):
        odds = 1 / np.arange(1, len(group) + 1)
        inputs[np.arange(m), rng.choice(group, size=m, p=odds / odds.sum())] = 1
    score = inputs @ rng.normal(size=d) + rng.logistic(size=m)
    labels = np.zeros(m, np.int32)
    labels[np.argsort(-score)[: m // 4]] = 1
    return Dataset(inputs, labels, 2, "one_hot")


def split(
    labels: np.ndarray, fractions: Sequence[float], rng: np.random.Generator
) -> list[np.ndarray]:
    """Split samples at random, with every class in (almost) the same proportion.

    Args:
        labels: class of each sample, (m,).
        fractions: share of each part; they add up to one.
        rng: source of the order.

    Returns:
        The indices of each part; together they are every sample once.

    Raises:
        ValueError: if a fraction is negative or they do not add up to one.

    Examples:
        >>> labels = np.array([0] * 10 + [1] * 20)
        >>> parts = split(labels, (0.5, 0.4, 0.1), np.random.default_rng(0))
        >>> [np.bincount(labels[part]).tolist() for part in parts]
        [[5, 10], [4, 8], [1, 2]]
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(
            f"`fractions` are the shares of a whole, got {tuple(fractions)}, which add "
            f"up to {sum(fractions)}. Write e.g. `(0.4, 0.4, 0.2)`."
        )
    pieces = [
        _cut(rng.permutation(np.flatnonzero(labels == k)), fractions)
        for k in np.unique(labels)
    ]
    return [rng.permutation(np.concatenate(part)) for part in zip(*pieces, strict=True)]


def _cut(order, fractions):
    ends = np.rint(np.cumsum(fractions)[:-1] * len(order)).astype(int)
    return np.split(order, ends)


def _check_nodes(n):
    if n < 1:
        raise ValueError(f"Samples are dealt out to at least one node, got n={n}.")


def split_by_label(
    labels: np.ndarray, n: int, h: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal out equal shares, a fraction ``h`` of each from one class.

    Node i takes a fraction ``h`` of its samples from class ``i mod c``, as far as that
    class lasts among the nodes that ask for it, and the rest uniformly from what
    remains; ``h = 0`` is i.i.d., ``h = 1`` is sorted by class.

    Args:
        labels: class of each sample, (m,).
        n: nodes.
        h: heterogeneity, in [0, 1].
        rng: source of the order.

    Returns:
        The indices of each node; every sample goes to exactly one node.

    Raises:
        ValueError: if ``h`` is not in [0, 1] or ``n`` is not positive.

    Examples:
        >>> labels = np.repeat(np.arange(4), 25)
        >>> parts = split_by_label(labels, 4, 1.0, np.random.default_rng(0))
        >>> [np.unique(labels[part]).tolist() for part in parts]
        [[0], [1], [2], [3]]

    References:
        The project's own definition of the heterogeneity h.
    """
    _check_nodes(n)
    if not 0 <= h <= 1:
        raise ValueError(
            f"`h` is the fraction of a node's samples from its own class, in [0, 1]; "
            f"got h={h}."
        )
    classes = np.unique(labels)
    sizes = [len(part) for part in np.array_split(labels, n)]
    own, rest = [np.zeros(0, int)] * n, []
    for k, label in enumerate(classes):
        order = rng.permutation(np.flatnonzero(labels == label))
        owners = range(k, n, len(classes))
        share = len(order) // len(owners) if owners else 0
        for i in owners:
            own[i], order = np.split(order, [min(round(h * sizes[i]), share)])
        rest.append(order)
    missing = [size - len(part) for size, part in zip(sizes, own, strict=True)]
    rest = np.split(rng.permutation(np.concatenate(rest)), np.cumsum(missing)[:-1])
    return [np.concatenate(pair) for pair in zip(own, rest, strict=True)]


def split_dirichlet(
    labels: np.ndarray, n: int, alpha: float, rng: np.random.Generator
) -> list[np.ndarray]:
    r"""Deal out each class in Dirichlet proportions.

    .. math:: p_k \sim \mathrm{Dir}(\alpha \mathbf 1_n) \quad \text{for class } k

    Shares differ in size, and for small ``alpha`` a node may come away with nothing.

    Args:
        labels: class of each sample, (m,).
        n: nodes.
        alpha: concentration; large is i.i.d., small gives each class to few nodes.
        rng: source of proportions and order.

    Returns:
        The indices of each node; every sample goes to exactly one node.

    Raises:
        ValueError: if ``alpha`` or ``n`` is not positive.

    Examples:
        >>> labels = np.repeat(np.arange(3), 30)
        >>> parts = split_dirichlet(labels, 4, 0.3, np.random.default_rng(0))
        >>> sorted(np.concatenate(parts).tolist()) == list(range(90))
        True

    References:
        Hsu, Qi and Brown (2019), arXiv:1909.06335, draw each node's classes; drawing
        each class's nodes, as here, is the common variant that uses every sample.
    """
    _check_nodes(n)
    if not alpha > 0:
        raise ValueError(
            f"`alpha` is the concentration of a Dirichlet law and positive, got "
            f"alpha={alpha}. Write e.g. 0.3 for unlike nodes, 100 for like ones."
        )
    pieces = [
        _cut(rng.permutation(np.flatnonzero(labels == k)), rng.dirichlet([alpha] * n))
        for k in np.unique(labels)
    ]
    return [np.concatenate(part) for part in zip(*pieces, strict=True)]


def split_evenly(
    labels: np.ndarray, n: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal out equal shares at random: the i.i.d. case."""
    return split_by_label(labels, n, h=0.0, rng=rng)


def stack(
    inputs: np.ndarray, labels: np.ndarray, parts: Sequence[np.ndarray]
) -> Samples:
    """Stack the shares of the nodes, padded to the largest one.

    Args:
        inputs: of all samples, (m, d).
        labels: of all samples, (m,).
        parts: the indices of each node.

    Returns:
        Samples with the node axis first; the padding is zero and masked out.

    Examples:
        >>> parts = [np.array([2]), np.array([0, 1])]
        >>> samples = stack(np.eye(3), np.array([5, 6, 7]), parts)
        >>> samples.labels.tolist(), samples.mask.tolist()
        ([[7, 0], [5, 6]], [[True, False], [True, True]])
    """
    width = max(1, *(len(part) for part in parts))

    def padded(part):
        pad = width - len(part)
        return (
            np.pad(inputs[part], ((0, pad), (0, 0))),
            np.pad(labels[part], (0, pad)),
            np.arange(width) < len(part),
        )

    x, y, mask = (np.stack(a) for a in zip(*map(padded, parts), strict=True))
    # Without x64 JAX would warn if it were asked for float64 by name.
    return Samples(
        jnp.asarray(x, jnp.result_type(float)),
        jnp.asarray(y, jnp.int32),
        jnp.array(mask),
    )


def _unit_scale(train):
    low, high = train.min(0, keepdims=True), train.max(0, keepdims=True)
    width = np.where(high > low, high - low, 1.0)
    return lambda inputs: (inputs - low) / width


def check_test(test: Any, dataset: Any) -> None:
    """Refuse a test set with other features or classes; None is none."""
    if test is None:
        return
    found, wanted = ((s.inputs.shape[1], s.num_classes) for s in (test, dataset))
    if found != wanted:
        raise ValueError(
            f"`test` has {found[0]} features and {found[1]} classes, "
            f"{dataset.name!r} {wanted[0]} and {wanted[1]}. Read both in the same "
            "way: LIBSVM files with one `d`, and the same labels in both."
        )


def levels(
    dataset: Any, n: int, fractions: Sequence[float], rng: np.random.Generator
) -> list[np.ndarray]:
    """Indices of training, validation and the rest, enough of them for ``n`` nodes.

    Raises:
        ValueError: if training or validation has fewer samples than there are nodes.
    """
    train, validation, rest = split(dataset.labels, fractions, rng)
    if min(len(train), len(validation)) < n:
        raise ValueError(
            f"{n} nodes need at least {n} samples each for training and validation; "
            f"the fractions {tuple(fractions)} of {dataset.name!r} give {len(train)} "
            f"and {len(validation)}."
        )
    return [train, validation, rest]


def distribute(
    dataset: Dataset,
    n: int = 10,
    deal: Deal = split_evenly,
    fractions: Sequence[float] = (0.4, 0.4, 0.2),
    seed: int = 0,
    test: Dataset | None = None,
) -> Shards:
    """Split into train, validation and test, scale, and deal out to the nodes.

    Features are scaled to [0, 1] by the minimum and maximum of the training samples
    alone (validation and test may leave the interval).

    Args:
        dataset: the samples.
        n: nodes.
        deal: ``deal(labels, n, rng=rng)`` gives the indices of each node, e.g.
            ``functools.partial(split_by_label, h=0.8)``.
        fractions: shares of train, validation and test.
        seed: of NumPy's default generator.
        test: a test set that comes with the data; the third share is then left out.

    Returns:
        Stacked training and validation samples, and one common test set.

    Raises:
        ValueError: if training or validation has fewer samples than there are nodes, or
            ``test`` differs in features or classes.

    Examples:
        >>> from functools import partial
        >>> shards = distribute(digits(), n=5, deal=partial(split_by_label, h=0.5))
        >>> shards.train.inputs.shape, shards.test.mask.shape
        ((5, 144, 64), (359,))
    """
    check_test(test, dataset)
    rng = np.random.default_rng(seed)
    train, validation, rest = levels(dataset, n, fractions, rng)
    scale = _unit_scale(dataset.inputs[train])

    def dealt(part):
        parts = deal(dataset.labels[part], n, rng=rng)
        return stack(scale(dataset.inputs[part]), dataset.labels[part], parts)

    left = (dataset.inputs[rest], dataset.labels[rest])
    inputs, labels = left if test is None else (test.inputs, test.labels)
    common = stack(scale(inputs), labels, [np.arange(len(labels))])
    common = jax.tree.map(lambda leaf: leaf[0], common)
    return Shards(
        dealt(train), dealt(validation), common, dataset.num_classes, dataset.name
    )
