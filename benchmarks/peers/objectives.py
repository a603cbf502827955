"""The problems of the solvers: logistic regression, and quadratics written two ways.

Both have d = 100 lower and p = 10 upper variables; batches are blocks of 64 samples,
which every solver slices alike.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dbojax as dbo

D, P, BLOCK = 100, 10, 64


class Task(NamedTuple):
    """A problem and the way its objectives are written."""

    problem: str
    writing: str
    upper: Callable  # (x, y, samples of a block) -> value
    lower: Callable
    arguments: Callable  # dtype -> x, y, data of the upper and of the lower level
    blocks: int
    epochs: int  # of one scan
    theirs: str | None = None  # the data set of benchopt's that has this writing
    metrics: bool = False  # whether to time ours with its metrics too
    heavy: bool = False  # whether reading a batch takes longer than what is done to it


# Logistic regression with one weight for each group of features.


class Data(NamedTuple):
    """Blocks of samples."""

    inputs: jax.Array  # (blocks, BLOCK, D)
    targets: jax.Array  # (blocks, BLOCK), -1 or 1


def logistic_arguments(blocks, dtype):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, blocks, BLOCK, D))
    answers = inputs @ rng.standard_normal(D) + rng.standard_normal(inputs.shape[:-1])
    targets = np.where(answers > 0, 1.0, -1.0)
    levels = (
        Data(jnp.asarray(a, dtype), jnp.asarray(t, dtype))
        for a, t in zip(inputs, targets, strict=True)
    )
    return jnp.full(P, -5.0, dtype), jnp.zeros(D, dtype), *levels


def fit(y, samples):
    return jnp.mean(dbo.tasks.logistic_loss(samples.targets * (samples.inputs @ y)))


def logistic_upper(x, y, samples):
    del x
    return fit(y, samples)


def logistic_lower(x, y, samples):
    weights = jnp.exp(x)[:, None]
    return fit(y, samples) + jnp.sum(weights * y.reshape(P, -1) ** 2) / 2


def logistic(blocks=32):
    return Task(
        "logistic regression",
        "over the batch",
        logistic_upper,
        logistic_lower,
        functools.partial(logistic_arguments, blocks),
        blocks,
        epochs=32,
        metrics=True,
    )


# Quadratics, each sample with matrices of its own: what benchopt's benchmark generates.


class Quadratics(NamedTuple):
    """Blocks of quadratic forms in y and x, in the order that benchopt's have."""

    inner: jax.Array  # (blocks, BLOCK, D, D), symmetric
    outer: jax.Array  # (blocks, BLOCK, P, P), symmetric
    cross: jax.Array  # (blocks, BLOCK, P, D)
    linear_inner: jax.Array  # (blocks, BLOCK, D)
    linear_outer: jax.Array  # (blocks, BLOCK, P)


@functools.cache
def matrices(blocks):
    """Both levels in NumPy, in float32; eigenvalues are about 0.1 to 1.1."""
    rng = np.random.default_rng(0)
    n = blocks * BLOCK

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    def positive(size):
        root = normal(n, size, size) / np.float32(2 * size**0.5)
        return root @ root.transpose(0, 2, 1) + np.eye(size, dtype=np.float32) / 10

    def level():
        return Quadratics(
            positive(D),
            positive(P),
            normal(n, P, D) / D,
            normal(n, D),
            normal(n, P),
        )

    return level(), level()


@functools.lru_cache(maxsize=1)  # large, and shared by who takes part
def quadratic_arguments(blocks, dtype):
    levels = (
        Quadratics(
            *(jnp.asarray(a.reshape(-1, BLOCK, *a.shape[1:]), dtype) for a in level)
        )
        for level in matrices(blocks)
    )
    return jnp.zeros(P, dtype), jnp.zeros(D, dtype), *levels


def one_quadratic(x, y, one):
    return (
        y @ (one.inner @ y) / 2
        + x @ (one.outer @ x) / 2
        + x @ one.cross @ y
        + one.linear_inner @ y
        + one.linear_outer @ x
    )


def mapped(x, y, samples):
    """The mean of the samples' values, as benchopt's benchmark writes it."""
    return jnp.mean(jax.vmap(one_quadratic, (None, None, 0))(x, y, samples))


def mean_of(leaf):
    """The mean over 8 k samples: eight runs of them are added up, then their sums.

    On CPU additions read the block where it lies; a reduction is slow, and a product of
    all samples would copy the block first.
    """
    runs = leaf.reshape(8, -1, *leaf.shape[1:])
    sums = functools.reduce(jnp.add, jnp.unstack(runs, axis=1))
    return jnp.tensordot(jnp.full(8, 1 / len(leaf), leaf.dtype), sums, 1)


def averaged(x, y, samples):
    """The same mean: a quadratic form is linear in its matrices, so average those."""
    return one_quadratic(x, y, jax.tree.map(mean_of, samples))


def quadratics(blocks=16):
    """How benchopt writes them, then how they are fast."""
    arguments = functools.partial(quadratic_arguments, blocks)
    mean = Task(
        "quadratics",
        "a map",
        mapped,
        mapped,
        arguments,
        blocks,
        epochs=1,
        theirs="quadratic",
        heavy=True,
    )
    fast = mean._replace(
        writing="mean matrices", upper=averaged, lower=averaged, theirs=None
    )
    return mean, fast


def block(data, index):
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), data
    )
