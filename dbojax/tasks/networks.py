"""Small networks in plain JAX: parameters are dictionaries, samples are flat rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax.base import Tree

_EPSILON = 1e-5  # added to a variance, as is usual


class Network(NamedTuple):
    """How parameters are drawn, and what they make of inputs."""

    init: Callable[[jax.Array], Tree]  # key -> parameters
    logits: Callable[[Tree, jax.Array], jax.Array]  # (y, (m, d)) -> (m, classes)


def perceptron(d: int, classes: int, widths: tuple[int, ...] = (32,)) -> Network:
    """Dense layers with rectified outputs, and a linear one on top.

    Args:
        d: features of a sample.
        classes: outputs.
        widths: of the hidden layers.

    Returns:
        A network whose weights are drawn with variance ``1 / inputs of the layer``.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> network = perceptron(6, 3, widths=(4,))
        >>> y = network.init(jax.random.key(0))
        >>> [layer["kernel"].shape for layer in y]
        [(6, 4), (4, 3)]
    """
    sizes = [d, *widths, classes]
    check_sizes(sizes)

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            dense_layer(*layer) for layer in zip(keys, sizes, sizes[1:], strict=False)
        ]

    def logits(y, inputs):
        for layer in y[:-1]:
            inputs = jax.nn.relu(affine(layer, inputs))
        return affine(y[-1], inputs)

    return Network(init, logits)


def conv_net(
    d: int, classes: int, width: int = 16, blocks: int = 3, channels: int = 1
) -> Network:
    """Blocks of convolution, rectifier, instance norm and pooling; one linear layer.

    A block is: convolution 3 x 3 that keeps the size, ReLU, instance norm (per image
    and channel) with scale and offset, means of 2 x 2 pixels; an odd last row or
    column is left out.

    Args:
        d: numbers of a sample, ``side * side * channels``, channels last.
        classes: outputs.
        width: channels that a block puts out.
        blocks: how many.
        channels: of a sample.

    Returns:
        A network whose weights are drawn with variance ``1 / inputs of the layer``;
        for CIFAR-10 it has as many as the published one.

    Raises:
        ValueError: if a size is not positive, images are not square, or pooling leaves
            nothing of them.

    Examples:
        >>> network = conv_net(32 * 32 * 3, 10, width=128, channels=3)
        >>> y = network.init(jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(y))
        320010

    References:
        The network of Shen et al. (2024), arXiv:2406.14095, appendix E.1, in the order
        of the authors' public code.
    """
    check_sizes([d, classes, width, blocks, channels])
    side = side_of(d, blocks, channels, "conv_net")

    def init(key):
        key_head, *keys = jax.random.split(key, blocks + 1)
        layers = conv_blocks(keys, [channels] + [width] * blocks)
        last = (side >> blocks) ** 2 * width
        return {"blocks": layers, "head": dense_layer(key_head, last, classes)}

    def logits(y, inputs):
        images = convolved(y["blocks"], inputs.reshape(-1, side, side, channels))
        return affine(y["head"], images.reshape(len(inputs), -1))

    return Network(init, logits)


def side_of(d: int, blocks: int, channels: int, name: str) -> int:
    """Side of square images of d numbers, which so many blocks can halve."""
    side = math.isqrt(d // channels)
    if side * side * channels != d:
        raise ValueError(
            f"`{name}` takes square images, d = side * side * channels; got d={d} "
            f"with channels={channels}."
        )
    if not side >> blocks:
        raise ValueError(
            f"{blocks} blocks halve images of side {side} to nothing. Write "
            f"blocks={side.bit_length() - 1} or fewer."
        )
    return side


def convolved(layers: Sequence[Tree], images: jax.Array) -> jax.Array:
    """Blocks of convolution, rectifier, instance norm and pooling, of any width."""
    for layer in layers:
        images = jax.nn.relu(affine(layer["conv"], patches(images)))
        images = halved(instance_norm(layer, images))
    return images


def patches(images: jax.Array) -> jax.Array:
    """The 3 x 3 pixels around each one, zero outside: (m, h, w, c) to (m, h, w, 9 c).

    A convolution is then a product of matrices, which is fast on CPUs inside of loops,
    with one kernel for each of several networks too.
    """
    height, width = images.shape[1:3]
    wide = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = [wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(near, -1)


def instance_norm(layer: Tree, images: jax.Array) -> jax.Array:
    """Mean zero and variance one in each channel of each image; then scale, offset."""
    mean = jnp.mean(images, (1, 2), keepdims=True)
    centred = images - mean
    variance = jnp.mean(centred**2, (1, 2), keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + _EPSILON)
    return normed * layer["scale"] + layer["offset"]


def halved(images: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels, without an odd last row or column."""
    m, height, width, channels = images.shape
    height, width = height // 2, width // 2
    even = images[:, : 2 * height, : 2 * width]
    return even.reshape(m, height, 2, width, 2, channels).mean((2, 4))


def check_sizes(sizes: Sequence[int]) -> None:
    """Refuse a network with a layer of nothing."""
    if min(sizes) < 1:
        raise ValueError(f"Sizes of a network are positive, got {list(sizes)}.")


def dense_layer(key: jax.Array, d: int, width: int) -> Tree:
    """A kernel with variance ``1 / d``, and a bias of zero."""
    kernel = jax.nn.initializers.lecun_normal()(key, (d, width), jnp.result_type(float))
    return {"kernel": kernel, "bias": jnp.zeros(width)}


def conv_blocks(
    keys: jax.Array | Sequence[jax.Array], channels: Sequence[int]
) -> list[Tree]:
    """Parameters of :func:`convolved`, from what comes in and each block puts out."""

    def block(key, before, width):
        conv = dense_layer(key, 9 * before, width)
        shape = (1, 1, 1, width)
        return {"conv": conv, "scale": jnp.ones(shape), "offset": jnp.zeros(shape)}

    return [block(*e) for e in zip(keys, channels, channels[1:], strict=False)]


def affine(layer: Tree, inputs: jax.Array) -> jax.Array:
    """``inputs @ kernel + bias`` along the last axis."""
    bias = layer["bias"].reshape((1,) * (inputs.ndim - 1) + (-1,))
    return inputs @ layer["kernel"] + bias
