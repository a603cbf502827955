"""Two bilevel tasks on 100 clients, dealt out in several ways, several times."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dbojax as dbo
from dbojax.tasks import data, representations

CLIENTS = 100
SPLITS = {"iid": None, "Dirichlet 0.5": 0.5, "Dirichlet 0.1": 0.1}
FASHION = 4000, 2000  # samples of the training and the test set that are used
WIDTHS = {"mlp": (64, 32), "cnn": (8, 16)}
RIDGE = {"mlp": 0.01, "cnn": 0.01, "tuning": 20.0}
CORRUPTION = 0.5  # of the training labels of the tuning task


class Kind(NamedTuple):
    """A task without its data."""

    build: Callable[[data.Shards, int], dbo.tasks.Task]  # (shards, seed)
    features: Callable  # (x, inputs) -> what the head acts on
    logits: Callable  # (y, features) -> logits
    penalty: Callable  # (x, y) -> what the lower level adds to the cross-entropy
    labels: tuple  # groups of units of x, y and the batch
    read: Callable  # a data set as it comes -> as this task wants it


class Runs(NamedTuple):
    """One task on many deals: leaves have an axis of runs in front."""

    problem: dbo.Problem
    kind: Kind
    x0: Any
    y0: Any
    batch: dbo.Batch  # (runs, clients, samples, ...)
    pool: data.Numbered  # all training samples of a run; ids are their owners
    test: data.Samples
    shares: jax.Array  # (runs, clients, classes): each client's own distribution


def representation(name, d, capacity=1.0):
    """Hyper-representation: x is a backbone, y a linear head."""
    widths = tuple(int(np.ceil(capacity * width)) for width in WIDTHS[name])
    make = {"mlp": representations.dense, "cnn": representations.convolutional}[name]
    backbone, ridge = make(d, widths), RIDGE[name]

    def build(shards, seed):
        return dbo.tasks.hyper_representation(shards, backbone, ridge, seed)

    def logits(y, features):
        return features @ y["kernel"] + y["bias"][None]

    def penalty(x, y):
        del x
        return 0.5 * ridge * sum(jnp.sum(leaf**2) for leaf in y.values())

    labels = (backbone.x, backbone.y, None)
    return Kind(build, backbone.features, logits, penalty, labels, lambda part: part)


def tuning(capacity=1.0):
    """One regularisation coefficient per feature, half of them of no use.

    A sample's features are its own pixels and those of another one, shuffled; half of
    the training labels are replaced. A good x silences the pixels of strangers.
    """
    ridge = RIDGE["tuning"]

    def read(part):
        d = 2 * part.inputs.shape[1]
        rng = np.random.default_rng(1)
        strangers = part.inputs[rng.permutation(len(part.inputs))]
        order = np.random.default_rng(2).permutation(d)[: int(np.ceil(capacity * d))]
        inputs = np.concatenate([part.inputs, strangers], 1)[:, order]
        return part._replace(inputs=inputs)

    def build(shards, seed):
        return dbo.tasks.coefficient_tuning(shards, ridge, CORRUPTION, seed)

    def penalty(x, y):
        return ridge / y.size * jnp.sum(jnp.exp(x)[:, None] * y**2)

    samples = data.Samples("_ feature", "_", "_")
    labels = ("feature", "feature _", dbo.Batch(upper=samples, lower=samples))
    return Kind(
        build,
        lambda x, inputs: inputs,
        lambda y, features: features @ y,
        penalty,
        labels,
        read,
    )


def kind_of(name, d, capacity=1.0):
    """A task at full size, or shrunk to what a client of a capacity holds."""
    return tuning(capacity) if name == "tuning" else representation(name, d, capacity)


def dataset(options):
    """Training and test set, the latter None where it is cut off the first."""
    if options.fashion is None:
        return data.digits(), None
    parts = dbo.tasks.readers.fashion_mnist(options.fashion)
    rng = np.random.default_rng(0)
    found = []
    for part, count in zip(parts, FASHION, strict=True):
        keep = np.sort(rng.choice(len(part.labels), count, replace=False))
        found.append(part._replace(inputs=part.inputs[keep], labels=part.labels[keep]))
    return tuple(found)


def alike(alpha, seed, classes=10):
    """A deal that gives a client the same distribution on both levels.

    `data.split_dirichlet` draws anew for each part, so that a client's validation data
    would be of other classes than its training data: harmless where the levels are
    shared, but nothing personal could be learnt.
    """
    if alpha is None:
        return data.split_evenly

    def deal(labels, n, rng):
        shares = np.random.default_rng([seed, 5]).dirichlet([alpha] * n, classes)
        pieces = []
        for label, share in enumerate(shares):
            order = rng.permutation(np.flatnonzero(labels == label))
            ends = np.rint(np.cumsum(share)[:-1] * len(order)).astype(int)
            pieces.append(np.split(order, ends))
        return [np.concatenate(part) for part in zip(*pieces, strict=True)]

    return deal


def shards_of(kind, source, alpha, seed):
    """One deal of the data to all clients."""
    train, test = (None if part is None else kind.read(part) for part in source)
    more = {} if test is None else {"test": test, "fractions": (0.5, 0.5, 0.0)}
    deal = alike(alpha, seed, train.num_classes)
    return data.distribute(train, n=CLIENTS, deal=deal, seed=seed, **more)


def runs_of(kind, source, cases):
    """A task on several deals, each a pair (alpha, seed)."""
    dealt = [(shards_of(kind, source, a, s), s) for a, s in cases]
    tasks = [kind.build(shards, seed) for shards, seed in dealt]
    return Runs(
        tasks[0].problem,
        kind,
        stacked([task.x0 for task in tasks]),
        stacked([task.y0 for task in tasks]),
        padded([task.batch for task in tasks]),
        stacked([pooled(task.batch.lower) for task in tasks]),
        stacked([shards.test for shards, _ in dealt]),
        jnp.stack([shares_of(shards) for shards, _ in dealt]),
    )


def of_clients(runs, members):
    """The same with the data of some clients alone; all are judged as before."""
    batch = jax.tree.map(lambda leaf: leaf[:, members], runs.batch)
    return runs._replace(batch=batch)


def pooled(samples):
    """All true samples of all clients in a row, with the numbers of their owners."""
    held = np.asarray(samples.mask)
    inputs, labels, mask = (np.asarray(leaf)[held] for leaf in samples[:3])
    owners = np.nonzero(held)[0].astype(np.int32)
    return data.Numbered(*map(jnp.asarray, (inputs, labels, mask, owners)))


def shares_of(shards):
    """How often each class is among a client's samples of both levels."""
    found = np.zeros((CLIENTS, shards.num_classes))
    for part in (shards.train, shards.validation):
        clients, _ = np.nonzero(np.asarray(part.mask))
        np.add.at(found, (clients, np.asarray(part.labels)[np.asarray(part.mask)]), 1)
    return jnp.asarray(found, jnp.result_type(float))


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def padded(batches):
    """Stack batches of unlike lengths; what is added is masked out."""

    def one_level(parts):
        width = max(part.mask.shape[1] for part in parts)

        def grown(leaf):
            more = ((0, 0), (0, width - leaf.shape[1]), *[(0, 0)] * (leaf.ndim - 2))
            return jnp.pad(leaf, more)

        return stacked([jax.tree.map(grown, part) for part in parts])

    levels = zip(*batches, strict=True)
    return dbo.Batch(*(one_level(list(parts)) for parts in levels))
