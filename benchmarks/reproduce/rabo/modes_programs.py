"""The programs that `modes.py` measures: networks, local steps and whole rounds."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dbojax as dbo
from dbojax.tasks.networks import halved, instance_norm, patches

BATCH, RIDGE, STEP = 32, 0.1, 0.01
oracle = functools.partial(dbo.oracles.finite_difference, radius=0.05)


class Network(NamedTuple):
    """Hidden layers and what they are made of; a linear head follows."""

    x: Any
    first: Callable  # (x, images) -> activations of the first hidden layer
    rest: Callable  # (x, activations) -> features, through what lies between


class Program(NamedTuple):
    """A compiled function with its arguments."""

    call: Any
    args: tuple

    def flops(self):
        return products(self.call.as_text())

    def temporary(self):
        return self.call.memory_analysis().temp_size_in_bytes


def products(text):
    """Operations of the products of matrices in a compiled program's text.

    Each branch and loop body counts once, which is how often they run here; XLA's own
    count takes one of the branches in which an oracle has its passes.
    """
    shapes = {
        name: [int(n) for n in sizes.split(",") if n]
        for name, sizes in re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", text)
    }
    dot = r"(%[\w.-]+) = \S+ dot\((%[\w.-]+), .*?lhs_contracting_dims={([\d,]*)}"
    return sum(
        2
        * math.prod(shapes[out] + [shapes[left][int(axis)] for axis in axes.split(",")])
        for out, left, axes in re.findall(dot, text)
    )


def compiled(function, *args):
    return Program(jax.jit(function).lower(*args).compile(), args)


def dense(layer, inputs):
    return jax.nn.relu(inputs @ layer["kernel"] + layer["bias"][None])


def block(layer, images):
    bias = layer["bias"][None, None, None]
    images = jax.nn.relu(patches(images) @ layer["kernel"] + bias)
    return halved(instance_norm(layer, images))


def drawn(key, d, width):
    kernel = jax.random.normal(key, (d, width)) * (2 / d) ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros(width)}


def perceptron(width):
    sizes = [(784, width), (width, width), (width, width)]
    keys = jax.random.split(jax.random.key(0), len(sizes))

    def rest(x, hidden):
        return functools.reduce(lambda h, layer: dense(layer, h), x[1:], hidden)

    def first(x, images):
        return dense(x[0], images.reshape(len(images), -1))

    x = [drawn(key, *size) for key, size in zip(keys, sizes, strict=True)]
    return Network(x, first, rest)


def convolutional(widths=(32, 64, 128), features=256):
    channels = [1, *widths]
    keys = jax.random.split(jax.random.key(1), len(channels))

    def conv(key, before, width):
        shape = (1, 1, 1, width)
        norm = {"scale": jnp.ones(shape), "offset": jnp.zeros(shape)}
        return drawn(key, 9 * before, width) | norm

    def rest(x, images):
        for layer in x[1:-1]:
            images = block(layer, images)
        return dense(x[-1], images.reshape(len(images), -1))

    x = [
        conv(*each) for each in zip(keys[:-1], channels[:-1], channels[1:], strict=True)
    ]
    x.append(drawn(keys[-1], 9 * widths[-1], features))  # 3 x 3 pixels are left
    return Network(x, lambda x, images: block(x[0], images), rest)


def head_of(network):
    # Not at zero, where a first step would not move x.
    return drawn(jax.random.key(4), network.x[-1]["kernel"].shape[1], 10)


def logits_of(network, x, y, images):
    hidden = network.rest(x, network.first(x, images))
    return hidden @ y["kernel"] + y["bias"][None]


def problem_of(network):
    def upper(x, y, samples):
        images, labels = samples
        logits = logits_of(network, x, y, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def lower(x, y, samples):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
        return upper(x, y, samples) + RIDGE / 2 * squares

    return dbo.Problem(upper, lower)


def samples(clients):
    keys = jax.random.split(jax.random.key(2), 2)

    def level(key):
        key_images, key_labels = jax.random.split(key)
        shape = (clients, BATCH, 28, 28, 1)
        images = jax.random.uniform(key_images, shape)
        return images, jax.random.randint(key_labels, shape[:2], 0, 10)

    return dbo.Batch(*map(level, keys))


def layout_of(network):
    apply = functools.partial(logits_of, network)
    images = jnp.zeros((2, 28, 28, 1))
    return dbo.submodels.layers(apply, network.x, head_of(network), images)


def held(layout, capacity):
    """The units that one client of a capacity keeps in the first round."""
    alone = dbo.submodels.fleet(layout, [capacity], minimum=0)
    [part] = dbo.submodels.draw(alone, jax.random.key(0), 0)
    return jax.tree.map(lambda units: units[0], part.kept)


def between(network, layout, capacity):
    """One gradient through what lies between hidden layers, and its kernels' bytes."""
    kept = held(layout, capacity)
    x = dbo.submodels.take(layout.x, layout.units, network.x, kept)
    images = samples(1).upper[0][0]
    hidden = jax.eval_shape(network.first, x, images)

    def gradient(x, hidden):
        return jax.grad(lambda *at: jnp.sum(network.rest(*at)), (0, 1))(x, hidden)

    program = compiled(gradient, x, jnp.ones(hidden.shape))
    return program, dbo.trees.nbytes([layer["kernel"] for layer in x[1:]])


def client_step(network, layout, capacity, mode):
    """One local step of one client, which already has its sub-model."""
    problem, kept = problem_of(network), held(layout, capacity)
    labels = layout.x, layout.y, layout.y
    x, y = network.x, head_of(network)
    cut = {
        "extracted": lambda label, v: dbo.submodels.take(label, layout.units, v, kept),
        "masked": lambda label, v: dbo.submodels.masked(label, layout.units, kept, v),
    }[mode]
    held_now = tuple(map(cut, labels, (x, y, y)))

    def step(held_now, batch, kept):
        directions, _ = oracle(problem).directions(None, *held_now, (), batch)
        if mode == "masked":
            hide = functools.partial(dbo.submodels.masked, units=layout.units)
            directions = tuple(
                hide(label, kept=kept, tree=d)
                for label, d in zip(labels, directions, strict=True)
            )
        return jax.tree.map(lambda a, d: a - STEP * d, held_now, directions)

    batch = jax.tree.map(lambda leaf: leaf[0], samples(1))
    return compiled(step, held_now, batch, kept)


def whole_round(network, fleet, clients, **settings):
    """A round of a fleet: draws, local steps, and the server's average."""
    method = dbo.algorithms.federated(
        problem_of(network),
        oracle,
        fleet,
        upper_step=STEP,
        lower_step=STEP,
        radius=10.0,
        **settings,
    )
    x, y = (dbo.replicate(v, 1) for v in (network.x, head_of(network)))
    return compiled(method.step, jax.random.key(3), method.init(x, y), samples(clients))
