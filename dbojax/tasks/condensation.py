"""Data condensation: a few synthetic images on which networks learn the real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbojax.base import Batch, Problem, Tree
from dbojax.tasks import data
from dbojax.tasks.classification import accuracy, cross_entropy
from dbojax.tasks.data import Dataset, Samples
from dbojax.tasks.networks import Network, perceptron
from dbojax.tasks.samplers import minibatches
from dbojax.tasks.task import Sampler

_PART = 2000  # samples that are judged at once


class Condensation(NamedTuple):
    """The bilevel problem, where both levels start, and how images are judged."""

    problem: Problem  # x are synthetic images, y the parameters of a network
    noise: Callable[[jax.Array], jax.Array]  # key -> x: uniform in [0, 1]
    images: Callable[[jax.Array], jax.Array]  # key -> x: drawn real images
    init: Callable[[jax.Array], Tree]  # key -> y: a fresh network
    project: Callable[[jax.Array], jax.Array]  # x -> x, clipped to [0, 1]
    labels: jax.Array  # (m,), int32, of the synthetic images
    sampler: Callable[[int], Sampler]  # batch_size -> sampler(key, step) -> Batch
    batch: Batch  # all real images that the upper level may see
    test: Samples
    # (key, x) -> dict: a fresh network is trained on x and judged
    evaluate: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
    name: str


def condensation(
    train: Dataset | None = None,
    test: Dataset | None = None,
    network: Network | None = None,
    per_class: int = 1,
    penalty: float = 1e-4,
    evaluation_steps: int = 1000,
    step_size: float = 0.01,
    seed: int = 0,
) -> Condensation:
    r"""Learn a few images, so that a network trained on them alone knows the real ones.

    .. math::
        f(x, y) = \mathrm{CE}(y; \text{real images}), \quad
        g(x, y) = \frac1m \sum_{j=1}^m \mathrm{CE}(y; x_j, j \bmod c) + c_p \|y\|^2

    x of shape (m, d) holds ``per_class`` images for each of c classes as rows, in turn,
    with labels that stay; y are the parameters of a network, weights and offsets alike.
    Pixels are in [0, 1]: both data sets are divided by the largest one of ``train``.

    Args:
        train: real images for the upper level, not negative; by default four fifths of
            scikit-learn's digits.
        test: real images to judge by; the rest of the digits by default.
        network: a :func:`~dbojax.tasks.networks.perceptron` with 32 hidden units by
            default, or e.g. ``conv_net(64, 10)``.
        per_class: synthetic images of each class.
        penalty: :math:`c_p`; there is no factor of one half.
        evaluation_steps: of full-batch gradient descent with momentum 0.9, before a
            network is judged.
        step_size: of that descent; it falls from here to zero as a cosine.
        seed: of the split of the digits.

    Returns:
        A task. The lower objective needs no batch; the upper one takes ``Samples``.
        ``evaluate`` gives ``test_accuracy``, and ``real_loss`` and ``real_accuracy`` on
        all of ``train``, by which settings may be chosen. ``descent(task.problem, ...,
        start=lambda key, x, y: task.init(key))`` starts each inner run from a fresh
        network.

    Raises:
        ValueError: if only one data set is given or they do not match, a pixel is
            negative, ``per_class`` is not positive or, from ``images``, more than some
            class has, or ``penalty`` is negative.

    Examples:
        >>> task = condensation(per_class=2)
        >>> x = task.noise(jax.random.key(0))
        >>> x.shape, task.labels[:12].tolist()
        ((20, 64), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
        >>> bool((task.project(3 * x - 1) >= 0).all())
        True

    References:
        Wang, Zhu, Torralba and Efros (2018), arXiv:1811.10959; objectives and schedules
        are those of Shen et al. (2024), arXiv:2406.14095, equation (17), appendix E.1.
    """
    if per_class < 1:
        raise ValueError(
            f"Each class has at least one synthetic image, got per_class={per_class}."
        )
    if isinstance(penalty, int | float) and penalty < 0:
        raise ValueError(
            f"`penalty` is not negative, got penalty={penalty}. Write 0.0 for none."
        )
    train, test = _datasets(train, test, seed)
    (_, d), c = train.inputs.shape, train.num_classes
    network = perceptron(d, c) if network is None else network
    largest = train.inputs.max() or 1.0
    real, judges = _samples(train, largest), _samples(test, largest)
    labels = jnp.tile(jnp.arange(c, dtype=jnp.int32), per_class)
    counted = jnp.ones(labels.shape, bool)

    def upper(x, y, batch):
        del x
        return cross_entropy(network.logits(y, batch.inputs), batch)

    def lower(x, y, batch):
        del batch
        fit = cross_entropy(network.logits(y, x), Samples(x, labels, counted))
        return fit + penalty * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))

    def noise(key):
        return jax.random.uniform(key, (len(labels), d), real.inputs.dtype)

    def train_on(key, x):
        rates = optax.cosine_decay_schedule(step_size, evaluation_steps)
        y = network.init(key)
        return _descend(lambda y: lower(x, y, ()), y, rates, evaluation_steps)

    def evaluate(key, x):
        y = train_on(key, x)
        outputs = _in_parts(network, y, real.inputs)
        return {
            "test_accuracy": accuracy(_in_parts(network, y, judges.inputs), judges),
            "real_loss": cross_entropy(outputs, real),
            "real_accuracy": accuracy(outputs, real),
        }

    return Condensation(
        Problem(upper, lower),
        noise,
        _drawing(real.inputs, train, per_class),
        network.init,
        lambda x: jnp.clip(x, 0, 1),
        labels,
        lambda batch_size: _real_batches(real, batch_size),
        Batch(real, ()),
        judges,
        evaluate,
        train.name,
    )


def _in_parts(network, y, inputs):
    """Logits of many samples, in the memory that some of them need."""
    if len(inputs) <= _PART:
        return network.logits(y, inputs)
    return jax.lax.map(
        lambda row: network.logits(y, row[None])[0], inputs, batch_size=_PART
    )


def _descend(loss, y, rates, steps):
    """Gradient descent with momentum."""
    optimizer = optax.sgd(rates, momentum=0.9)

    def step(carry, _):
        y, memory = carry
        updates, memory = optimizer.update(jax.grad(loss)(y), memory)
        return (optax.apply_updates(y, updates), memory), None

    return jax.lax.scan(step, (y, optimizer.init(y)), length=steps)[0][0]


def _drawing(inputs, dataset, per_class):
    """Real images in the order of the labels, as a function of a key."""
    members = [np.flatnonzero(dataset.labels == k) for k in range(dataset.num_classes)]
    fewest = min(map(len, members))

    def images(key):
        if per_class > fewest:
            raise ValueError(
                f"A class of {dataset.name!r} has {fewest} images only; got "
                f"per_class={per_class}. Start from `noise(key)`."
            )
        keys = jax.random.split(key, len(members))
        chosen = [
            jax.random.permutation(each, held)[:per_class]
            for each, held in zip(keys, members, strict=True)
        ]
        return inputs[jnp.stack(chosen, 1).reshape(-1)]

    return images


def _real_batches(real, batch_size):
    """Minibatches of the upper level; it has one node, so there is no node axis."""
    draw = minibatches(jax.tree.map(lambda leaf: leaf[None], real), batch_size)

    def sampler(key, step):
        return Batch(jax.tree.map(lambda leaf: leaf[0], draw(key, step)), ())

    return sampler


def _datasets(train, test, seed):
    """Both data sets, or the digits in two parts."""
    if (train is None) != (test is None):
        raise ValueError(
            "`train` and `test` come together; got one of them. Write e.g. "
            "`condensation(*readers.idx_folder(path))`."
        )
    if train is None or test is None:
        digits = data.digits()
        parts = data.split(digits.labels, (0.8, 0.2), np.random.default_rng(seed))
        train, test = (
            digits._replace(inputs=digits.inputs[part], labels=digits.labels[part])
            for part in parts
        )
    found = [(part.inputs.shape[1], part.num_classes) for part in (train, test)]
    if found[0] != found[1]:
        raise ValueError(
            f"`train` has {found[0][0]} features and {found[0][1]} classes, `test` "
            f"{found[1][0]} and {found[1][1]}: they must match."
        )
    least = min(float(part.inputs.min()) for part in (train, test))
    if least < 0 or not math.isfinite(least):
        raise ValueError(
            f"Pixels are not negative, but the least is {least}. Pass the images as "
            "they were read, without centring."
        )
    return train, test


def _samples(dataset, largest):
    """All of a data set, without padding."""
    return Samples(
        jnp.asarray(dataset.inputs / largest, jnp.result_type(float)),
        jnp.asarray(dataset.labels, jnp.int32),
        jnp.ones(len(dataset.labels), bool),
    )
