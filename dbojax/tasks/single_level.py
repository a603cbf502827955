"""Minimisation without a lower level: one variable, one objective at each node."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Tree
from dbojax.tasks import data
from dbojax.tasks.classification import masked_mean
from dbojax.tasks.losses import logistic_loss
from dbojax.tasks.samplers import minibatches
from dbojax.tasks.task import Sampler


class SingleLevel(NamedTuple):
    """``min mean_i loss(params, batch_i)``, its data, where to start, how to judge."""

    loss: Callable[[Tree, Tree], jax.Array]  # (params, one node's batch) -> scalar
    params0: Tree  # the start, the same at all nodes
    batch: Tree  # all data, node axis first
    sampler: Callable[[int], Sampler]  # batch_size -> sampler(key, step) -> batch
    evaluate: Callable[[Tree], dict[str, jax.Array]]  # of one value of the parameters
    n: int  # number of nodes


def split_in_order(m: int, n: int) -> list[np.ndarray]:
    """Deal out samples as they come: equal shares, and the remainder to the last node.

    Examples:
        >>> [part.tolist() for part in split_in_order(7, 3)]
        [[0, 1], [2, 3], [4, 5, 6]]
    """
    return np.split(np.arange(m), (m // n) * np.arange(1, n))


def _signs(labels):
    classes = np.unique(labels)
    if len(classes) != 2:
        raise ValueError(
            f"Logistic regression tells two classes apart, but the labels have "
            f"{len(classes)} values. Write e.g. `labels == 3` for one against the rest."
        )
    return np.where(labels == classes[0], -1, 1)


def logistic_regression(
    inputs: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    n: int = 20,
    regulariser: float = 0.1,
    seed: int = 0,
) -> SingleLevel:
    r"""Tell two classes apart, with a regulariser that is not convex.

    .. math::
        f_i(x) = \frac{1}{m_i} \sum_j \log(1 + e^{-b_{ij} a_{ij}^\top x})
        + \lambda \sum_k \frac{x_k^2}{1 + x_k^2}

    The samples are dealt out in their order, the remainder goes to the last node, and
    all nodes count alike. There is no bias and no scaling: features that differ by
    orders of magnitude want :func:`dbojax.tasks.data.standardised` first.

    Args:
        inputs: all samples, (m, d); by default scikit-learn's breast cancer data,
            standardised, since their raw features range from 0.001 to 4000.
        labels: (m,), two values; the smaller one becomes -1 and the other +1.
        n: nodes.
        regulariser: :math:`\lambda`.
        seed: of the start, ``numpy.random.default_rng(seed).normal(size=d)``.

    Returns:
        A problem whose ``batch`` are samples with labels -1 and +1, and whose
        ``evaluate(params)`` gives ``loss`` and ``squared_gradient_norm`` of the mean
        objective on all data.

    Raises:
        ValueError: if only one of ``inputs`` and ``labels`` is given or they do not
            match, if there are not two classes or fewer samples than nodes, or if
            ``regulariser`` is negative.

    Examples:
        >>> dataset = dbo.tasks.data.one_hot(m=60)
        >>> task = logistic_regression(dataset.inputs, dataset.labels, n=7)
        >>> task.batch.mask.sum(1).tolist()
        [8, 8, 8, 8, 8, 8, 12]
        >>> found = task.evaluate(jnp.zeros(123))
        >>> bool(jnp.isclose(found["loss"], jnp.log(2.0)))
        True

    References:
        Richtárik, Sokolov and Fatkhullin (2021), arXiv:2106.05203, whose public code
        deals out and starts in this way.
    """
    if (inputs is None) != (labels is None):
        raise ValueError("`inputs` and `labels` come together; got one of them.")
    if inputs is None or labels is None:
        dataset = data.standardised(data.breast_cancer())
        inputs, labels = dataset.inputs, dataset.labels
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if inputs.ndim != 2 or labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"`inputs` are (m, d) and `labels` (m,), got {inputs.shape} and "
            f"{labels.shape}."
        )
    m, d = inputs.shape
    if not 1 <= n <= m:
        raise ValueError(f"{m} samples go to between 1 and {m} nodes, got n={n}.")
    if isinstance(regulariser, int | float) and regulariser < 0:
        raise ValueError(
            f"`regulariser` is not negative, got regulariser={regulariser}. Write 0.0 "
            "to do without."
        )
    batch = data.stack(inputs, _signs(labels), split_in_order(m, n))
    params0 = jnp.asarray(np.random.default_rng(seed).normal(size=d))

    def loss(params, batch):
        margins = batch.labels * (batch.inputs @ params)
        fit = masked_mean(logistic_loss(margins), batch.mask)
        return fit + regulariser * jnp.sum(params**2 / (1 + params**2))

    def mean_loss(params):
        return jnp.mean(jax.vmap(loss, (None, 0))(params, batch))

    @jax.jit
    def evaluate(params):
        value, slope = jax.value_and_grad(mean_loss)(params)
        return {"loss": value, "squared_gradient_norm": jnp.sum(slope**2)}

    return SingleLevel(
        loss, params0, batch, lambda size: minibatches(batch, size), evaluate, n
    )
