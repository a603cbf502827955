"""Megabytes to an accuracy: a small convolutional network on five workers."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from cdadam_common import Method, adaptive, cd_adam, sent, short
from flax import linen as nn
from report import table, write_csv

import dbojax as dbo

NODES, BATCH, EVERY = 5, 32, 10
RATES, SGD, SGD_WITH_MOMENTUM = (1e-3, 3e-3, 1e-2), (0.01, 0.03, 0.1), (0.01, 0.03, 0.1)
SPLITS = {"shares alike": 0.0, "80 % of a worker's samples from one class": 0.8}
SHARE = 0.98  # of the dense method's accuracy is the target
TEST_SAMPLES = 2000  # no more of them are looked at


class Convolution(nn.Module):
    """3 x 3 pixels to one, as a product of matrices: fast on CPUs inside a scan."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, images):
        height, width = images.shape[1:3]
        wide = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        near = [
            wide[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(3)
            for j in range(3)
        ]
        return nn.Dense(self.features)(jnp.concatenate(near, -1))


class Network(nn.Module):
    """Two convolutions, pooling, one hidden layer.

    Without dead units: 1-bit Adam leaps where no gradient came before the freeze.
    """

    classes: int

    @nn.compact
    def __call__(self, pixels):
        side = round(pixels.shape[-1] ** 0.5)
        values = pixels.reshape(-1, side, side, 1)
        values = nn.gelu(Convolution(8, stride=2)(values))
        values = nn.gelu(Convolution(16)(values))
        side = values.shape[1] // 2
        values = values.reshape(-1, side, 2, side, 2, 16).max((2, 4))
        values = nn.gelu(nn.Dense(64)(values.reshape(len(pixels), -1)))
        return nn.Dense(self.classes)(values)


class Trial(NamedTuple):
    """What all methods share: the splits, and how to judge parameters."""

    shards: tuple  # of each split
    model: nn.Module
    starts: dict  # (seeds, ...)
    loss: Callable  # (params, samples) -> scalar
    judged: Callable  # (rows, train, test) -> (training losses, test accuracies)


class Curves(NamedTuple):
    """Of one method at the best rate of each split; arrays (splits, seeds, ...)."""

    rates: list  # (splits,)
    loss: np.ndarray  # (splits, seeds), on all training samples, at the end
    accuracy: np.ndarray  # (splits, seeds, evaluations), on test samples
    megabytes: np.ndarray  # (2, evaluations), of one worker, up and down
    steps: np.ndarray  # (evaluations,)


def methods(steps):
    """Label -> method."""
    mix, sign = dbo.mixing.averaging(NODES), dbo.compressors.sign()
    per_leaf = dbo.compressors.per_leaf(sign)

    def ef21(rate):
        decayed = dbo.optim.two_step_decay(rate, steps)
        return dbo.optim.ef21_sgdm(decayed, mix, sign, downlink=sign)

    def powersgd(rate):
        decayed = dbo.optim.two_step_decay(rate, steps)
        return dbo.optim.powersgd(decayed, mix, rank=2, momentum=0.9)

    return {
        **adaptive(mix, RATES, steps),
        "CD-Adam, sign per leaf": cd_adam(mix, per_leaf, RATES, steps),
        "EF21-SGDM, sign": Method(ef21, SGD),
        "PowerSGD, rank 2": Method(powersgd, SGD_WITH_MOMENTUM),
    }


def shards_of(options, h):
    """Nothing is validated here, but each node sets a few samples aside for it."""
    data = dbo.tasks.data
    more = {"n": NODES, "deal": functools.partial(data.split_by_label, h=h)}
    if options.fashion is None:
        return data.distribute(data.digits(), fractions=(0.78, 0.02, 0.2), **more)
    train, test = dbo.tasks.readers.fashion_mnist(options.fashion)
    few = test._replace(
        inputs=test.inputs[:TEST_SAMPLES], labels=test.labels[:TEST_SAMPLES]
    )
    return data.distribute(train, fractions=(0.98, 0.02, 0.0), test=few, **more)


def trial(options):
    """Compile what does not depend on the method."""
    shards = [shards_of(options, h) for h in SPLITS.values()]
    model, judge = Network(shards[0].num_classes), dbo.tasks.classification
    test = shards[0].test

    def loss(params, samples):
        return judge.cross_entropy(model.apply(params, samples.inputs), samples)

    @jax.jit
    @jax.vmap
    def starts(seed):
        return model.init(jax.random.key(seed), test.inputs[:1])

    def judged_one(params, train, test):
        outputs = model.apply(params, test.inputs)
        training = jnp.mean(jax.vmap(loss, (None, 0))(params, train))
        return training, judge.accuracy(outputs, test)

    @jax.jit
    def judged(rows, train, test):
        return jax.lax.map(lambda params: judged_one(params, train, test), rows)

    return Trial(tuple(shards), model, starts(jnp.arange(options.seeds)), loss, judged)


def run(method, trial, steps):
    """Train at all rates on all splits from all seeds in one program."""

    def one(rate, train, start, key):
        tx = method.make(rate)
        sampler = dbo.tasks.samplers.minibatches(train, BATCH)

        def step(carry, count):
            params, state = carry
            samples = sampler(key, count)
            gradients = jax.vmap(jax.grad(trial.loss), (None, 0))(params, samples)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        def chunk(carry, counts):
            carry, _ = jax.lax.scan(step, carry, counts)
            return carry, carry[0]

        counts = jnp.arange(steps).reshape(-1, EVERY)
        return jax.lax.scan(chunk, (start, tx.init(start)), counts)[1]

    seeds = len(jax.tree.leaves(trial.starts)[0])
    over_seeds = jax.vmap(one, (None, None, 0, 0))
    over_splits = jax.vmap(over_seeds, (None, 0, None, None))
    over_rates = jax.jit(jax.vmap(over_splits, (0, None, None, None)))
    train = stacked([shards.train for shards in trial.shards])
    keys = jax.random.split(jax.random.key(7), seeds)
    path = over_rates(jnp.asarray(method.rates), train, trial.starts, keys)
    rates, losses, accuracies = [], [], []
    for i, shards in enumerate(trial.shards):
        ends = jax.tree.map(lambda v, i=i: flat(v[:, i, :, -1], 2), path)
        loss = np.asarray(trial.judged(ends, shards.train, shards.test)[0]).reshape(
            -1, seeds
        )
        means = loss.mean(1)
        best = int(np.argmin(np.where(np.isfinite(means), means, np.inf)))
        way = jax.tree.map(lambda v, i=i, best=best: flat(v[best, i], 2), path)
        accuracy = np.asarray(trial.judged(way, shards.train, shards.test)[1]).reshape(
            seeds, -1
        )
        rates.append(method.rates[best])
        losses.append(loss[best])
        accuracies.append(accuracy)
    at = EVERY * (1 + np.arange(steps // EVERY))
    one_start = jax.tree.map(lambda leaf: leaf[0], trial.starts)
    megabytes = np.array(sent(method, one_start)(at)) / 1e6
    return Curves(rates, np.array(losses), np.array(accuracies), megabytes, at)


def stacked(trees):
    """Stack trees of samples; those that are added to the shorter are masked out."""
    width = max(tree.mask.shape[1] for tree in trees)

    def grown(leaf):
        more = ((0, 0), (0, width - leaf.shape[1]), *[(0, 0)] * (leaf.ndim - 2))
        return jnp.pad(leaf, more)

    return jax.tree.map(
        lambda *leaves: jnp.stack([grown(leaf) for leaf in leaves]), *trees
    )


def flat(leaf, axes):
    return leaf.reshape(-1, *leaf.shape[axes:])


def rows_of(found, split, target):
    for label, one in found.items():
        accuracy = one.accuracy[split]
        under = accuracy >= target
        at = np.where(under.any(-1), under.argmax(-1), accuracy.shape[-1])
        up, down, steps = (
            np.median(np.append(values, np.inf)[at])
            for values in (*one.megabytes, one.steps)
        )
        reached, final = np.isfinite(steps), accuracy[:, -1]
        ends = np.isfinite(one.loss[split]).all()
        spread = f"{final.mean():.4f} ± {final.std():.4f}"
        yield {
            "method": label,
            "rate": f"{one.rates[split]:g}" if ends else "all",
            "test accuracy": spread if ends else "diverged",
            "training loss": f"{one.loss[split].mean():.4f}" if ends else "",
            "MB up": f"{one.megabytes[0, -1]:.3f}",
            "MB down": f"{one.megabytes[1, -1]:.3f}",
            "MB up to target": f"{up:.3f}" if reached else "not reached",
            "MB down to target": f"{down:.3f}" if reached else "",
            "steps to target": short(steps) if reached else "",
        }


def picture(found, path):
    figure, axes = plt.subplots(1, len(SPLITS), figsize=(12, 4.5), layout="constrained")
    for i, (ax, split) in enumerate(zip(axes, SPLITS, strict=True)):
        for label, one in found.items():
            style = "--" if "dense" in label else ":" if "naive" in label else "-"
            sent_so_far = one.megabytes.sum(0)
            ax.plot(sent_so_far, one.accuracy[i].mean(0), style, label=label)
        ax.set(xscale="log", ylim=(0.5, 1.0), title=split)
        ax.set(xlabel="MB of one worker, up and down", ylabel="test accuracy")
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def report(options):
    """Run, write CSV and picture, and return the lines of this part."""
    shared, found = trial(options), {}
    steps = max(EVERY, options.cnn_steps // EVERY * EVERY)
    for label, method in methods(steps).items():
        begin = time.perf_counter()
        found[label] = run(method, shared, steps)
        print(f"    {label}: {time.perf_counter() - begin:.1f} s", flush=True)
    raw = [
        {
            "split": split,
            "method": label,
            "seed": seed,
            "rate": one.rates[i],
            "step": step,
        }
        | {"MB up": one.megabytes[0, j], "MB down": one.megabytes[1, j]}
        | {"test accuracy": one.accuracy[i, seed, j]}
        for i, split in enumerate(SPLITS)
        for label, one in found.items()
        for seed in range(options.seeds)
        for j, step in enumerate(one.steps)
    ]
    write_csv(options.out / "cnn.csv", raw)
    picture(found, options.out / "cnn.png")
    size = sum(leaf[0].size for leaf in jax.tree.leaves(shared.starts))
    adam, sgd, heavy = (
        ", ".join(f"{r:g}" for r in g) for g in (RATES, SGD, SGD_WITH_MOMENTUM)
    )
    lines = [
        f"## Megabytes to an accuracy: a small network on {shared.shards[0].name}",
        "",
        f"Two convolutions and two dense layers, {size} parameters, {NODES} workers, "
        f"batches of {BATCH} per worker, {shared.shards[0].test.inputs.dtype}, "
        f"{steps} steps, decayed as above, {options.seeds} seeds (start and batches). "
        "Each method takes the one of three rates with the least mean training loss: "
        f"{adam} for Adam's relatives, {sgd} for EF21-SGDM (momentum 0.1), {heavy} for "
        "PowerSGD (momentum 0.9). MB (1e6 bytes) are those of one worker, exact; "
        f"target: {SHARE:.0%} of the test accuracy that dense AMSGrad ends with; "
        f"medians over the seeds, looked at every {EVERY} steps.",
    ]
    for i, split in enumerate(SPLITS):
        target = SHARE * found["AMSGrad, dense"].accuracy[i, :, -1].mean()
        lines += ["", f"### {split}: target {target:.4f}", ""]
        lines += table(list(rows_of(found, i, target)))
    return lines
