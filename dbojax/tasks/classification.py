"""Bilevel problems on labelled data: the upper level validates what the lower fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbojax.base import Batch, Problem
from dbojax.tasks import data
from dbojax.tasks.data import Numbered, Samples, Shards
from dbojax.tasks.representations import mlp, started
from dbojax.tasks.samplers import minibatches, paired
from dbojax.tasks.sparse import product
from dbojax.tasks.task import Task, at_mean


def masked_mean(values: jax.Array, mask: jax.Array | np.ndarray) -> jax.Array:
    """Mean of the values that count; zero, with zero gradients, if none does.

    Examples:
        >>> float(masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0]) > 0))
        2.0
    """
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def _losses(logits, samples):
    return optax.softmax_cross_entropy_with_integer_labels(logits, samples.labels)


def cross_entropy(logits: jax.Array, samples: Samples | Numbered) -> jax.Array:
    """Mean cross-entropy over one node's true samples; logits are (m, classes)."""
    return masked_mean(_losses(logits, samples), samples.mask)


def accuracy(logits: jax.Array, samples: Samples) -> jax.Array:
    """Fraction of the true samples whose largest logit is that of their class."""
    hits = jnp.argmax(logits, -1) == samples.labels
    return masked_mean(hits.astype(logits.dtype), samples.mask)


def _penalised(logits: Callable, penalty: Callable) -> Callable:
    def lower(x, y, batch):
        return cross_entropy(logits(x, y, batch.inputs), batch) + penalty(x, y)

    return lower


def _task(logits: Callable, lower: Callable, x0, y0, shards, recovery=None) -> Task:
    def upper(x, y, batch):
        return cross_entropy(logits(x, y, batch.inputs), batch)

    batch = Batch(upper=shards.validation, lower=shards.train)

    def judge(x, y, batch, held):
        validation = jax.vmap(upper, (None, None, 0))(x, y, batch.upper)
        return {
            "validation_loss": jnp.mean(validation),
            "test_loss": upper(x, y, held),
            "test_accuracy": accuracy(logits(x, y, held.inputs), held),
        }

    def measure(x, y):
        found = judge(x, y, batch, shards.test)
        return found if recovery is None else {**found, "recovery": recovery(x)}

    def sampler(batch_size):
        return paired(
            minibatches(shards.validation, batch_size),
            minibatches(shards.train, batch_size),
        )

    return Task(
        Problem(upper, lower),
        x0,
        y0,
        batch=batch,
        sampler=sampler,
        evaluate=at_mean(measure),
        n=shards.train.mask.shape[0],
        judge=judge,
        held=shards.test,
    )


def _digits_on_ten_nodes(shards):
    return data.distribute(data.digits(), n=10) if shards is None else shards


def coefficient_tuning(
    shards: Shards | None = None,
    ridge: float = 1.0,
    corruption: float = 0.0,
    seed: int = 0,
) -> Task:
    r"""Tune one regularisation coefficient per feature of a linear classifier.

    .. math::
        f_i(x, y) = \mathrm{CE}(y; \text{validation}_i), \quad
        g_i(x, y) = \mathrm{CE}(y; \text{training}_i)
        + \frac{c_r}{c d} \sum_{q=1}^{d} \sum_{p=1}^{c} e^{x_q} y_{qp}^2

    with multinomial logistic regression without bias, x in R^d and y in R^{d x c}. CE
    is the mean over a node's samples, and all nodes count alike.

    Args:
        shards: the data; by default scikit-learn's digits, dealt out to ten nodes.
            Its inputs may be sparse, from ``dbo.tasks.sparse.distribute``.
        ridge: :math:`c_r`.
        corruption: the probability that a training label is replaced by a uniform one,
            which may be the true one; validation and test labels stay clean.
        seed: of the replaced labels, in NumPy's default generator.

    Returns:
        A task that starts at zero and is judged by ``validation_loss``, ``test_loss``
        and ``test_accuracy``.

    Raises:
        ValueError: if ``ridge`` is not positive: the lower level would have no unique
            solution; or ``corruption`` is not a probability.

    Examples:
        >>> task = coefficient_tuning()
        >>> task.x0.shape, task.y0.shape
        ((64,), (64, 10))
        >>> one = jax.tree.map(lambda leaf: leaf[0], task.batch)
        >>> loss = task.problem.upper(task.x0, task.y0, one.upper)
        >>> bool(jnp.isclose(loss, jnp.log(10.0)))
        True

    References:
        Gao, Gu and Thai (2023), AISTATS, PMLR 206, equation (19).
    """
    if isinstance(ridge, int | float) and ridge <= 0:
        raise ValueError(
            f"`ridge` makes the lower level strongly convex and is positive, got "
            f"ridge={ridge}. Write e.g. 1.0."
        )
    shards = _digits_on_ten_nodes(shards)
    d, c = shards.train.inputs.shape[-1], shards.num_classes
    shards = shards._replace(train=_corrupted(shards.train, c, corruption, seed)[0])

    def logits(x, y, inputs):
        del x
        return product(inputs, y)

    def penalty(x, y):
        return ridge / (c * d) * jnp.sum(jnp.exp(x)[:, None] * y**2)

    lower = _penalised(logits, penalty)
    return _task(logits, lower, jnp.zeros(d), jnp.zeros((d, c)), shards)


def _numbered(samples):
    """Number the true samples node by node; the padding gets zeros."""
    mask = np.asarray(samples.mask)
    ids = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, 0)
    return Numbered(
        samples.inputs, samples.labels, samples.mask, jnp.asarray(ids, jnp.int32)
    )


def _corrupted(samples, num_classes, corruption, seed):
    """Samples with drawn labels, and whether each true one's label has changed."""
    if not 0 <= corruption <= 1:
        raise ValueError(
            f"`corruption` is the probability that a label is replaced, in [0, 1]; got "
            f"corruption={corruption}."
        )
    rng = np.random.default_rng(seed)
    mask, labels = np.asarray(samples.mask), np.array(samples.labels)
    # Drawn for the true samples alone, so that the padding has no influence.
    truth = labels[mask]
    replaced = rng.random(truth.size) < corruption
    given = np.where(replaced, rng.integers(num_classes, size=truth.size), truth)
    labels[mask] = given
    return samples._replace(labels=jnp.asarray(labels, jnp.int32)), given != truth


def separation(low: jax.Array, high: jax.Array) -> jax.Array:
    """Chance that an entry of ``low`` is below one of ``high``; ties count half.

    This is the area under the ROC curve; one half if either is empty.

    Examples:
        >>> float(separation(jnp.array([0.0, 2.0]), jnp.array([1.0, 2.0])))
        0.625
    """
    if not low.size or not high.size:
        return jnp.asarray(0.5)
    ranked = jnp.sort(high)
    not_above = jnp.searchsorted(ranked, low, side="right")
    below = jnp.searchsorted(ranked, low, side="left")
    # Means of integers would have 32 bits even where floats have 64.
    twice = (not_above + below).astype(jnp.result_type(float))
    return 1 - jnp.mean(twice) / (2 * high.size)


def hyper_cleaning(
    shards: Shards | None = None,
    corruption: float = 0.5,
    ridge: float = 0.2,
    seed: int = 0,
) -> Task:
    r"""Find out which training labels are wrong, by a weight for each sample.

    .. math::
        f_i(x, y) = \mathrm{CE}(y; \text{validation}_i), \quad
        g_i(x, y) = \frac{1}{m_i} \sum_{j \in \text{training}_i}
        \sigma(x_j) \, \mathrm{CE}_j(y) + c_r \|y\|^2

    with multinomial logistic regression without bias, y in R^{d x c}, and the logistic
    function :math:`\sigma`. Each training label is replaced with a given probability by
    a uniform one, which may be the true one; validation and test labels stay clean. The
    samples of all nodes are numbered through, x has one entry for each, and node i has
    a slope in the entries of its own samples alone.

    Args:
        shards: the data; by default scikit-learn's digits, dealt out to ten nodes.
        corruption: the probability of replacement.
        ridge: :math:`c_r`; there is no factor of one half.
        seed: of the replaced labels, in NumPy's default generator.

    Returns:
        A task that starts at zero, every weight at one half, and whose lower batches
        carry the numbers of their samples as ``ids``. It is judged by
        ``validation_loss``, ``test_loss``, ``test_accuracy`` and ``recovery``, the
        chance that a sample with a wrong label weighs less than one with the true
        label: one half at the start.

    Raises:
        ValueError: if ``corruption`` is not a probability, ``ridge`` is not positive,
            or a lower batch comes without numbers.

    Examples:
        >>> task = hyper_cleaning()
        >>> task.x0.shape, task.y0.shape
        ((719,), (64, 10))
        >>> one = jax.tree.map(lambda leaf: leaf[3], task.batch.lower)
        >>> slope = jax.grad(task.problem.lower)(task.x0, task.y0, one)
        >>> int(jnp.sum(slope != 0)) == int(jnp.sum(one.mask))
        True

    References:
        Franceschi, Donini, Frasconi and Pontil (2017), arXiv:1703.01785, section 5.1;
        the objectives and the corruption are those of Dagréou, Ablin, Vaiter and Moreau
        (2022), arXiv:2201.13409, whose mean over all samples is here the mean of the
        nodes' means.
    """
    if isinstance(ridge, int | float) and ridge <= 0:
        raise ValueError(
            f"`ridge` makes the lower level strongly convex and is positive, got "
            f"ridge={ridge}. Write e.g. 0.2."
        )
    shards = _digits_on_ten_nodes(shards)
    d, c = shards.train.inputs.shape[-1], shards.num_classes
    train, wrong = _corrupted(shards.train, c, corruption, seed)
    shards = shards._replace(train=_numbered(train))
    wrong_ids, true_ids = np.flatnonzero(wrong), np.flatnonzero(~wrong)

    def logits(x, y, inputs):
        del x
        return product(inputs, y)

    def lower(x, y, batch):
        if not isinstance(batch, Numbered):
            raise ValueError(
                "`hyper_cleaning` weighs samples by their numbers, so a lower batch is "
                f"`Numbered`, got `{type(batch).__name__}`. Take it from `task.batch` "
                "or `task.sampler`."
            )
        losses = _losses(product(batch.inputs, y), batch)
        weighed = masked_mean(jax.nn.sigmoid(x[batch.ids]) * losses, batch.mask)
        return weighed + ridge * jnp.sum(y**2)

    def recovery(x):
        return separation(x[wrong_ids], x[true_ids])

    return _task(
        logits, lower, jnp.zeros(wrong.size), jnp.zeros((d, c)), shards, recovery
    )


def hyper_representation(
    shards: Shards | None = None,
    backbone: Any = None,
    ridge: float = 0.01,
    seed: int = 0,
) -> Task:
    r"""Learn a representation on which a regularised linear head does well.

    .. math::
        f_i(x, y) = \mathrm{CE}(y \circ \phi_x; \text{validation}_i), \quad
        g_i(x, y) = \mathrm{CE}(y \circ \phi_x; \text{training}_i)
        + \frac\mu2 \|y\|^2

    where x holds the parameters of the backbone :math:`\phi` and y the head.

    Args:
        shards: the data; by default scikit-learn's digits, dealt out to ten nodes.
        backbone: from (m, d) to (m, features): a
            :class:`~dbojax.tasks.representations.Backbone` or a flax (linen) module
            with parameters alone; :func:`~dbojax.tasks.representations.mlp` by default.
        ridge: :math:`\mu`, the strong convexity of the lower level.
        seed: of the backbone's start.

    Returns:
        A task with ``x0`` a tree of parameters and ``y0 = {"kernel", "bias"}`` zero,
        judged by ``validation_loss``, ``test_loss`` and ``test_accuracy``.

    Raises:
        ValueError: if ``ridge`` is not positive, or the backbone carries more than
            parameters.

    Examples:
        >>> task = hyper_representation(backbone=dbo.tasks.mlp((16, 8)))
        >>> jax.tree.map(jnp.shape, task.y0)
        {'bias': (10,), 'kernel': (8, 10)}

    References:
        Franceschi, Frasconi, Salzo, Grazzi and Pontil (2018), arXiv:1806.04910.
    """
    if isinstance(ridge, int | float) and ridge <= 0:
        raise ValueError(
            f"`ridge` makes the lower level strongly convex and is positive, got "
            f"ridge={ridge}. Write e.g. 0.01."
        )
    shards = _digits_on_ten_nodes(shards)
    backbone = mlp() if backbone is None else backbone
    d, c = shards.train.inputs.shape[-1], shards.num_classes
    x0, features = started(backbone, d, seed)

    def logits(x, y, inputs):
        return features(x, inputs) @ y["kernel"] + y["bias"][None]

    def penalty(x, y):
        del x
        return 0.5 * ridge * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))

    width = jax.eval_shape(features, x0, shards.train.inputs[0]).shape[-1]
    y0 = {"kernel": jnp.zeros((width, c)), "bias": jnp.zeros(c)}
    return _task(logits, _penalised(logits, penalty), x0, y0, shards)
