"""What is compared on: tasks that can be dealt out in many ways, stacked into one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Batch, Tree
from dbojax.tasks import (
    coefficient_tuning,
    data,
    hyper_cleaning,
    hyper_representation,
    mlp,
)
from dbojax.tasks.readers import fashion_mnist
from dbojax.tasks.task import Task


class Scales(NamedTuple):
    """The natural sizes of a task, from which every method's grid is laid out."""

    upper: float = 1.0  # a step of x
    lower: float = 0.1  # a step of y
    smoothness: float = 10.0  # of each node's g in y, about, for truncated series


class Study(NamedTuple):
    """A task that can be dealt out anew for every seed and heterogeneity.

    Its objectives may differ from one dealing to the next by their batch alone. Its
    tasks have ``judge`` and ``held``; among the scores are ``validation_loss``, by
    which steps are tuned, and ``test_accuracy``, of which there is a target.
    """

    name: str
    deal: Callable[[int, float], Task]  # (seed, h) -> task
    scales: Scales = Scales()


class Cases(NamedTuple):
    """Many dealings of a study as one tree: cases first, then nodes."""

    x0: Tree  # (cases, ...)
    y0: Tree
    batch: Batch  # (cases, n, ...), padded to one length
    held: Tree  # (cases, ...)


def stacked(tasks: Sequence[Task]) -> Cases:
    """Stack tasks of one study, samples padded to the longest share.

    Args:
        tasks: dealings of one study; samples carry a ``mask`` where shares differ.

    Raises:
        ValueError: if there is no task, one cannot be judged inside a program, or
            variables differ in shape.

    Examples:
        >>> tasks = [digits(dbo.tasks.coefficient_tuning, n=4)(s, 0.8) for s in (0, 1)]
        >>> stacked(tasks).x0.shape, stacked(tasks).batch.lower.inputs.shape
        ((2, 64), (2, 4, 180, 64))
    """
    if not tasks:
        raise ValueError("`stacked` needs a task, got none.")
    if any(task.judge is None for task in tasks):
        raise ValueError(
            "A comparison judges its tasks inside one program: give each "
            "`judge=(x, y, batch, held) -> scores` and `held`, as those of "
            "`dbo.tasks.coefficient_tuning` have."
        )
    starts = [jax.tree.map(jnp.shape, (task.x0, task.y0)) for task in tasks]
    if any(start != starts[0] for start in starts):
        raise ValueError(
            "All dealings of a study need variables of one shape, got "
            f"{starts[0]} and {next(s for s in starts if s != starts[0])}."
        )
    return Cases(
        _stack([task.x0 for task in tasks]),
        _stack([task.y0 for task in tasks]),
        Batch(*(_padded([task.batch[level] for task in tasks]) for level in (0, 1))),
        _padded([task.held for task in tasks], axis=0),
    )


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _padded(parts, axis: int = 1):
    """Stack samples that may be unlike in number; zeros, the mask's too, fill up."""

    def one(*leaves):
        if np.ndim(leaves[0]) <= axis:
            return jnp.stack(leaves)
        width = max(leaf.shape[axis] for leaf in leaves)

        def grown(leaf):
            more = [(0, 0)] * leaf.ndim
            more[axis] = (0, width - leaf.shape[axis])
            return jnp.pad(leaf, more)

        return jnp.stack([grown(leaf) for leaf in leaves])

    return jax.tree.map(one, *parts)


def digits(task: Callable[..., Task], n: int = 10) -> Callable[[int, float], Task]:
    """Deal scikit-learn's digits out to ``n`` nodes, another way for every seed.

    Args:
        task: makes the task from shards, e.g. ``dbo.tasks.coefficient_tuning``.
        n: nodes.

    Returns:
        ``(seed, h) -> task``, where a fraction h of a node's samples come from a single
        class.
    """
    return _dealt(task, lambda: (data.digits(), {}), n)


def _dealt(task, source, n=10):
    def deal(seed, h):
        how = functools.partial(data.split_by_label, h=h)
        samples, more = source()
        return task(data.distribute(samples, n=n, deal=how, seed=seed, **more))

    return deal


def _seeded(task, source=lambda: (data.digits(), {}), **settings):
    """A task whose own draws (start, wrong labels) follow the seed of the dealing."""

    def deal(seed, h):
        own = functools.partial(task, seed=seed, **settings)
        return _dealt(own, source)(seed, h)

    return deal


def _representation(shards, seed):
    # The backbone is flax's, which a command line that only lists names can do without.
    return hyper_representation(shards, mlp((32, 16)), seed=seed)


def _clothes(path: Path):
    """2000 pictures to train and validate on, and 1000 to judge by, always the same."""

    @functools.cache
    def source():
        rng = np.random.default_rng(0)
        train, test = (
            _some(part, count, rng)
            for part, count in zip(fashion_mnist(path), (2000, 1000), strict=True)
        )
        return train, {"test": test, "fractions": (0.5, 0.5, 0.0)}

    return source


def _some(dataset, count, rng):
    kept = np.sort(rng.permutation(len(dataset.labels))[:count])
    return dataset._replace(inputs=dataset.inputs[kept], labels=dataset.labels[kept])


def studies(fashion: str | os.PathLike | None = None) -> dict[str, Study]:
    """The studies of the benchmark by name: scikit-learn's digits on ten nodes.

    Args:
        fashion: folder with the files of Fashion-MNIST, for one study more.

    Returns:
        Studies by name.

    Raises:
        FileNotFoundError: if there is no such folder.

    Examples:
        >>> sorted(studies())
        ['coefficient_tuning', 'hyper_cleaning', 'hyper_representation']
    """
    found = [
        Study(
            "coefficient_tuning",
            digits(coefficient_tuning),
            Scales(upper=100.0, lower=0.5, smoothness=3.0),
        ),
        Study(
            "hyper_representation",
            _seeded(_representation),
            Scales(upper=0.1, lower=1.0, smoothness=1.0),
        ),
        Study(
            "hyper_cleaning",
            # A ridge of 0.2 would hide the labels, whose inputs are in [0, 1].
            _seeded(hyper_cleaning, ridge=0.02),
            Scales(upper=10000.0, lower=1.0, smoothness=1.5),
        ),
    ]
    if fashion is not None:
        source = _clothes(Path(fashion))
        source()  # says at once where files are missing
        how = _seeded(_representation, source)
        scales = Scales(upper=0.003, lower=0.1, smoothness=10.0)
        found.append(Study("fashion_representation", how, scales))
    return {study.name: study for study in found}
