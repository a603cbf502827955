"""The sub-models on which `memory.py` measures, and noise to feed them with."""

import jax
import jax.numpy as jnp

import dbojax as dbo

CLASSES, PIXELS, RIDGE = 10, 784, 0.05


def cross_entropy(logits, labels, weights=1.0):
    terms = jnp.sum(labels * jax.nn.log_softmax(logits), -1)
    return -jnp.mean(terms * weights)


def ridge(y):
    return RIDGE * sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(y))


def samples(size):
    """Two batches of noise."""
    keys = jax.random.split(jax.random.key(1), 4)

    def batch(images, labels):
        drawn = jax.random.randint(labels, (size,), 0, CLASSES)
        return jax.random.normal(images, (size, PIXELS)), jax.nn.one_hot(drawn, CLASSES)

    return dbo.Batch(batch(*keys[:2]), batch(*keys[2:]))


def representation(join, x, y, size):
    """x is all but the last layer and y the last one, on a ridge."""

    def loss(x, y, batch):
        images, labels = batch
        return cross_entropy(join(x, y, images), labels)

    def lower(x, y, batch):
        return loss(x, y, batch) + ridge(y)

    return dbo.Problem(loss, lower), x, y, samples(size)


def head(options):
    network = dbo.tasks.networks.perceptron(PIXELS, CLASSES, (options.width,) * 3)
    *x, y = network.init(jax.random.key(0))
    return representation(
        lambda x, y, a: network.logits([*x, y], a), x, y, options.batch
    )


def convolutions(options):
    network = dbo.tasks.networks.conv_net(PIXELS, CLASSES, options.channels)
    whole = network.init(jax.random.key(0))

    def join(x, y, images):
        return network.logits({"blocks": x, "head": y}, images)

    return representation(join, whole["blocks"], whole["head"], options.images)


def weights(options, bend=jnp.tanh):
    """x is a weight per class in the loss of g, and y the whole network."""
    network = dbo.tasks.networks.perceptron(PIXELS, CLASSES, (options.width,) * 3)

    def logits(y, inputs):
        for layer in y[:-1]:
            inputs = bend(inputs @ layer["kernel"] + layer["bias"][None])
        return inputs @ y[-1]["kernel"] + y[-1]["bias"][None]

    def upper(x, y, batch):
        return cross_entropy(logits(y, batch[0]), batch[1])

    def lower(x, y, batch):
        images, labels = batch
        chosen = jnp.exp(labels @ x)
        return cross_entropy(logits(y, images), labels, chosen) + ridge(y)

    y = network.init(jax.random.key(0))
    return dbo.Problem(upper, lower), jnp.zeros(CLASSES), y, samples(options.batch)


def rectified(options):
    """The same with kinks: g has no second derivative in y everywhere."""
    return weights(options, jax.nn.relu)


PROBLEMS = {
    "head": ("x: three dense layers, rectified; y: the linear head", head),
    "weights": ("x: ten weights of a loss; y: a whole network, tanh", weights),
    "rectified": ("x: ten weights of a loss; y: a whole network, ReLU", rectified),
    "convolutions": ("x: three blocks of convolutions; y: the head", convolutions),
}
