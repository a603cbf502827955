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
from dbojax.tasks.data import Samples, Shards
from dbojax.tasks.samplers import minibatches, paired
from dbojax.tasks.task import Task, at_mean


def masked_mean(values: jax.Array, mask: jax.Array | np.ndarray) -> jax.Array:
    """Mean of the values that count; zero, with zero gradients, if none does.

    Examples:
        >>> float(masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0]) > 0))
        2.0
    """
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def cross_entropy(logits: jax.Array, samples: Samples) -> jax.Array:
    """Mean cross-entropy over one node's true samples; logits are (m, classes)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, samples.labels)
    return masked_mean(losses, samples.mask)


def accuracy(logits: jax.Array, samples: Samples) -> jax.Array:
    """Fraction of the true samples whose largest logit is that of their class."""
    hits = jnp.argmax(logits, -1) == samples.labels
    return masked_mean(hits.astype(logits.dtype), samples.mask)


def _task(logits: Callable, penalty: Callable, x0, y0, shards: Shards) -> Task:
    def upper(x, y, batch):
        return cross_entropy(logits(x, y, batch.inputs), batch)

    def lower(x, y, batch):
        return cross_entropy(logits(x, y, batch.inputs), batch) + penalty(x, y)

    def measure(x, y):
        validation = jax.vmap(upper, (None, None, 0))(x, y, shards.validation)
        return {
            "validation_loss": jnp.mean(validation),
            "test_loss": upper(x, y, shards.test),
            "test_accuracy": accuracy(logits(x, y, shards.test.inputs), shards.test),
        }

    def sampler(batch_size):
        return paired(
            minibatches(shards.validation, batch_size),
            minibatches(shards.train, batch_size),
        )

    return Task(
        Problem(upper, lower),
        x0,
        y0,
        batch=Batch(upper=shards.validation, lower=shards.train),
        sampler=sampler,
        evaluate=at_mean(measure),
        n=shards.train.mask.shape[0],
    )


def _digits_on_ten_nodes(shards):
    return data.distribute(data.digits(), n=10) if shards is None else shards


def coefficient_tuning(shards: Shards | None = None, ridge: float = 1.0) -> Task:
    r"""Tune one regularisation coefficient per feature of a linear classifier.

    .. math::
        f_i(x, y) = \mathrm{CE}(y; \text{validation}_i), \quad
        g_i(x, y) = \mathrm{CE}(y; \text{training}_i)
        + \frac{c_r}{c d} \sum_{q=1}^{d} \sum_{p=1}^{c} e^{x_q} y_{qp}^2

    with multinomial logistic regression without bias, x in R^d and y in R^{d x c}. CE
    is the mean over a node's samples, and all nodes count alike.

    Args:
        shards: the data; by default scikit-learn's digits, dealt out to ten nodes.
        ridge: :math:`c_r`.

    Returns:
        A task that starts at zero and is judged by ``validation_loss``, ``test_loss``
        and ``test_accuracy``.

    Raises:
        ValueError: if ``ridge`` is not positive: the lower level would have no unique
            solution.

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

    def logits(x, y, inputs):
        del x
        return inputs @ y

    def penalty(x, y):
        return ridge / (c * d) * jnp.sum(jnp.exp(x)[:, None] * y**2)

    return _task(logits, penalty, jnp.zeros(d), jnp.zeros((d, c)), shards)


def mlp(widths: tuple[int, ...] = (64, 32)) -> Any:
    """Layers with rectified outputs, as a flax (linen) module: a backbone.

    Examples:
        >>> backbone = mlp((8, 4))
        >>> variables = backbone.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> backbone.apply(variables, jnp.ones((5, 3))).shape
        (5, 4)
    """
    linen = data.require("flax.linen", "A backbone")
    layers = [part for width in widths for part in (linen.Dense(width), linen.relu)]
    return linen.Sequential(layers)


def _params(backbone, d, seed):
    variables = dict(backbone.init(jax.random.key(seed), jnp.zeros((1, d))))
    params = variables.pop("params", {})
    if variables or not params:
        found = ["params"] * bool(params) + sorted(variables)
        raise ValueError(
            f"A backbone has the collection `params` and nothing else, got {found}. "
            "Replace layers that carry statistics, e.g. batch by layer normalisation."
        )
    return jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)


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
        backbone: a flax (linen) module from (m, d) to (m, features), with parameters
            alone; :func:`mlp` by default.
        ridge: :math:`\mu`, the strong convexity of the lower level.
        seed: of the backbone's start.

    Returns:
        A task with ``x0`` a tree of parameters and ``y0 = {"kernel", "bias"}`` zero,
        judged by ``validation_loss``, ``test_loss`` and ``test_accuracy``.

    Raises:
        ValueError: if ``ridge`` is not positive, or the backbone carries more than
            parameters.

    Examples:
        >>> task = hyper_representation(backbone=mlp((16, 8)))
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
    x0 = _params(backbone, d, seed)

    def features(x, inputs):
        return backbone.apply({"params": x}, inputs)

    def logits(x, y, inputs):
        return features(x, inputs) @ y["kernel"] + y["bias"][None]

    def penalty(x, y):
        del x
        return 0.5 * ridge * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))

    width = jax.eval_shape(features, x0, shards.train.inputs[0]).shape[-1]
    y0 = {"kernel": jnp.zeros((width, c)), "bias": jnp.zeros(c)}
    return _task(logits, penalty, x0, y0, shards)
