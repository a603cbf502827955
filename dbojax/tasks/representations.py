"""Backbones: networks whose outputs are features, with the units that make them up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dbojax.base import Tree
from dbojax.tasks import data
from dbojax.tasks.networks import (
    affine,
    check_sizes,
    conv_blocks,
    convolved,
    dense_layer,
    side_of,
)


class Backbone(NamedTuple):
    """How parameters are drawn, what they make of inputs, and which units they serve.

    ``features`` asks the parameters for their widths, so the same function serves the
    network without some of its units. ``x`` and ``y`` name the group of units of each
    axis of each leaf, "_" for an axis that is always whole, as
    ``dbo.submodels.layout`` takes them; ``y`` is a linear head on the features.
    """

    init: Callable[[jax.Array], Tree]  # key -> parameters
    features: Callable[[Tree, jax.Array], jax.Array]  # (x, (m, d)) -> (m, features)
    x: Tree  # labels, in the structure of the parameters
    y: Tree  # labels of a head {"kernel", "bias"}


def dense(d: int, widths: tuple[int, ...] = (64, 32)) -> Backbone:
    r"""Dense layers with rectified outputs.

    .. math:: a_l = \max\{a_{l-1} W_l + b_l, 0\}

    Args:
        d: features of a sample.
        widths: of the layers; layer l is the group of units ``h<l>``.

    Returns:
        A backbone that draws weights with variance ``1 / inputs of the layer``.

    Raises:
        ValueError: if there is no layer, or a size is not positive.

    Examples:
        Without its second unit, as without that unit's numbers:

        >>> backbone = dense(3, (2,))
        >>> [layer], inputs = backbone.init(jax.random.key(0)), jnp.ones((5, 3))
        >>> smaller = [{"kernel": layer["kernel"][:, :1], "bias": layer["bias"][:1]}]
        >>> whole = backbone.features([layer], inputs)
        >>> bool((backbone.features(smaller, inputs) == whole[:, :1]).all())
        True
        >>> backbone.x, backbone.y
        ([{'kernel': '_ h0', 'bias': 'h0'}], {'kernel': 'h0 _', 'bias': '_'})
    """
    _check_layers(widths)
    sizes = [d, *widths]
    check_sizes(sizes)

    def init(key):
        keys = jax.random.split(key, len(widths))
        layers = zip(keys, sizes, widths, strict=False)
        return [dense_layer(*layer) for layer in layers]

    def features(x, inputs):
        for layer in x:
            inputs = jax.nn.relu(affine(layer, inputs))
        return inputs

    labels = [_labels(*pair) for pair in _groups(len(widths))]
    return Backbone(init, features, labels, _head(len(widths)))


def convolutional(
    d: int, widths: tuple[int, ...] = (8, 16), channels: int = 1
) -> Backbone:
    """Blocks of convolution, rectifier, instance norm and pooling, then flattened.

    A block is that of :func:`~dbojax.tasks.networks.conv_net`. Its norm sees one
    channel of one image, so the other channels make the same of their inputs whether a
    channel is there or not; a norm across channels would not.

    Args:
        d: numbers of a sample, ``side * side * channels``, channels last.
        widths: channels that each block puts out; block l is the group ``h<l>``.
        channels: of a sample.

    Returns:
        A backbone with ``widths[-1]`` features, channels last, for each pixel that is
        left: an axis of the head is a multiple of the last group.

    Raises:
        ValueError: if there is no block, a size is not positive, images are not
            square, or pooling leaves nothing of them.

    Examples:
        >>> backbone = convolutional(8 * 8, (2, 3))
        >>> x = backbone.init(jax.random.key(0))
        >>> backbone.features(x, jnp.ones((5, 64))).shape
        (5, 12)
        >>> backbone.x[1]["conv"], backbone.y["kernel"]
        ({'kernel': 'h0 h1', 'bias': 'h1'}, 'h1 _')
    """
    _check_layers(widths)
    check_sizes([d, *widths, channels])
    side = side_of(d, len(widths), channels, "convolutional")

    def init(key):
        return conv_blocks(jax.random.split(key, len(widths)), [channels, *widths])

    def features(x, inputs):
        images = convolved(x, inputs.reshape(-1, side, side, channels))
        return images.reshape(len(inputs), -1)

    def block(before, own):
        norm = f"_ _ _ {own}"
        return {"conv": _labels(before, own), "scale": norm, "offset": norm}

    labels = [block(*pair) for pair in _groups(len(widths))]
    return Backbone(init, features, labels, _head(len(widths)))


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


def started(backbone: Any, d: int, seed: int) -> tuple[Tree, Callable]:
    """A backbone's start, and what parameters make of inputs."""
    if isinstance(backbone, Backbone):
        return backbone.init(jax.random.key(seed)), backbone.features
    params = _params(backbone, d, seed)
    return params, lambda x, inputs: backbone.apply({"params": x}, inputs)


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


def _check_layers(widths):
    if not widths:
        raise ValueError(
            "A backbone has at least one layer, got widths=(). Write e.g. (32,)."
        )


def _groups(layers):
    """The group before each layer, and its own."""
    names = ["_", *(f"h{layer}" for layer in range(layers))]
    return itertools.pairwise(names)


def _labels(before, own):
    return {"kernel": f"{before} {own}", "bias": own}


def _head(layers):
    return {"kernel": f"h{layers - 1} _", "bias": "_"}
