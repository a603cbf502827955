"""Minibatches: pure functions of (key, step) in JAX, or of the step on the host."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Batch, Indexed, Rounds, Tree
from dbojax.tasks.data import Numbered, Samples
from dbojax.tasks.task import Sampler


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch without samples."""
    if batch_size < 1:
        raise ValueError(
            f"A minibatch holds at least one sample, got batch_size={batch_size}."
        )


def _is_samples(part):
    return isinstance(part, Samples | Numbered)


def _take(leaf, chosen):
    return jax.vmap(lambda rows, indices: rows[indices])(leaf, chosen)


def _shuffle(key, mask):
    """True samples first and in random order; masked ones come last."""
    return jnp.argsort(jnp.where(mask, jax.random.uniform(key, mask.shape), 2.0))


def minibatches(samples: Samples | Numbered, batch_size: int) -> Sampler:
    r"""Draw without replacement: each node passes through its data epoch by epoch.

    Node i with :math:`m_i` samples has :math:`B_i = \lceil m_i / b \rceil` batches in
    an epoch of its own. A permutation that depends on (key, epoch, i) orders its
    samples, and batch t of the epoch takes the positions
    :math:`t, t + B_i, t + 2 B_i, \dots < m_i`: every sample exactly once, no batch
    empty, sizes that differ by one at most.

    Args:
        samples: stacked over the nodes; masked ones are never drawn.
        batch_size: b, the most samples of one node in one batch.

    Returns:
        ``sampler(key, step)`` gives stacked samples of length b with a mask. Pass the
        **same key at every step**: another key is another order. A call sorts each
        node's samples once.

    Raises:
        ValueError: if ``batch_size`` is not positive.

    Examples:
        >>> inputs = jnp.arange(10.0).reshape(2, 5, 1)
        >>> samples = Samples(inputs, jnp.zeros((2, 5), int), jnp.ones((2, 5), bool))
        >>> sampler = minibatches(samples, 2)
        >>> epoch = [sampler(jax.random.key(0), step) for step in range(3)]
        >>> drawn = jnp.concatenate([part.inputs[0][part.mask[0]] for part in epoch])
        >>> jnp.sort(drawn[:, 0]).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    check_batch_size(batch_size)
    n, m = samples.mask.shape
    width = min(batch_size, m)

    def choose(key, step, node, mask):
        size = jnp.sum(mask)
        batches = jnp.maximum(1, -(-size // width))
        epoch, turn = step // batches, step % batches
        key = jax.random.fold_in(jax.random.fold_in(key, epoch), node)
        order = _shuffle(key, mask)
        positions = turn + batches * jnp.arange(width)
        # Out of range, an index would be clamped in silence: mask it.
        return order[jnp.minimum(positions, m - 1)], positions < size

    def sampler(key, step):
        nodes = jnp.arange(n)
        chosen, valid = jax.vmap(choose, (None, None, 0, 0))(
            key, step, nodes, samples.mask
        )
        drawn = jax.tree.map(lambda leaf: _take(leaf, chosen), samples)
        return drawn._replace(mask=valid)

    return sampler


def indexed(samples: Tree, batch_size: int) -> Sampler:
    """Draw samples that tell their positions, for oracles that remember each sample.

    Every step, each node draws b distinct samples of its own, all sets of b alike and
    whatever it drew before: samples may come again at once.

    Args:
        samples: stacked over the nodes, leaves (n, m, ...): :class:`Samples`,
            numbered or not, whose masked ones are never drawn, or any tree without
            padding.
        batch_size: b, the samples of each node in each batch.

    Returns:
        ``sampler(key, step)`` gives a stacked ``dbo.Indexed``; positions count from the
        start of the sample axis, padding included. A call sorts each node's samples
        once.

    Raises:
        ValueError: if ``batch_size`` is not positive or more than some node has.

    Examples:
        >>> sampler = indexed(jnp.arange(10.0).reshape(2, 5), 3)
        >>> batch = sampler(jax.random.key(0), 0)
        >>> bool((batch.data == batch.indices + jnp.array([[0], [5]])).all())
        True
        >>> batch.size.tolist()
        [5, 5]
    """
    check_batch_size(batch_size)
    if not isinstance(samples, Samples | Numbered):
        mask = np.ones(np.shape(jax.tree.leaves(samples)[0])[:2], bool)
    elif getattr(samples.mask, "is_fully_addressable", True):
        mask = np.asarray(samples.mask, bool)
    else:
        mask = samples.mask.astype(bool)  # spread over several processes
    sizes = mask.sum(1)
    fewest = int(sizes.min())
    if batch_size > fewest:
        instead = f"Write batch_size={fewest}" if fewest else "Leave out empty nodes"
        raise ValueError(
            f"`indexed` draws batch_size={batch_size} distinct samples of every node, "
            f"but a node has {fewest} only. {instead}."
        )
    mask, sizes = jnp.asarray(mask), jnp.asarray(sizes, jnp.int32)

    def choose(key, node, mask):
        order = _shuffle(jax.random.fold_in(key, node), mask)
        return order[:batch_size].astype(jnp.int32)

    def sampler(key, step):
        key = jax.random.fold_in(key, step)
        indices = jax.vmap(choose, (None, 0, 0))(key, jnp.arange(len(sizes)), mask)
        data = jax.tree.map(lambda leaf: _take(leaf, indices), samples)
        return Indexed(indices, data, sizes)

    return sampler


def local(batch_size: int) -> Callable[[jax.Array, Tree], Tree]:
    r"""Draw minibatches from the data of one node, which it is handed.

    The b samples of a batch are distinct, all sets of b alike and whatever was drawn
    before; a node with fewer samples gives them all, and one without any gives none.
    Padding is never drawn: a mean over those that count is unbiased for the node's own
    mean, and exact where b is not less than what the node has.

    Args:
        batch_size: b, the most samples in one batch.

    Returns:
        ``sample(key, data)`` gives data of the same kind, b long, with a mask; members
        of a ``Batch`` are drawn independently of each other. It draws a number for each
        sample and keeps the b largest, which is cheaper than to sort them. Lift it
        with ``jax.vmap``, one key per node.

    Raises:
        ValueError: if ``batch_size`` is not positive, or the data holds an array that
            is not in :class:`Samples`, numbered or not.

    Examples:
        >>> labels = jnp.arange(5)
        >>> samples = Samples(labels[:, None] / 5, labels, mask=labels < 3)
        >>> batch = local(2)(jax.random.key(0), Batch(upper=samples, lower=samples))
        >>> int(batch.lower.labels.max()) < 3, batch.lower.mask.tolist()
        (True, [True, True])
        >>> local(4)(jax.random.key(0), samples).mask.tolist()
        [True, True, True, False]
    """
    check_batch_size(batch_size)

    def draw(key, samples):
        width = min(batch_size, samples.mask.shape[0])
        # Below every number that is drawn for a true sample.
        rank = jnp.where(samples.mask, jax.random.uniform(key, samples.mask.shape), -1)
        _, chosen = jax.lax.top_k(rank, width)
        drawn = jax.tree.map(lambda leaf: leaf[chosen], samples)
        return drawn._replace(mask=jnp.arange(width) < jnp.sum(samples.mask))

    def sample(key, data):
        parts, structure = jax.tree.flatten(data, is_leaf=_is_samples)
        if not all(map(_is_samples, parts)):
            kinds = sorted({type(part).__name__ for part in parts})
            raise ValueError(
                "`local` draws from `Samples` or `Numbered`, which say what is "
                f"padding; got {kinds}. Write e.g. "
                "`Batch(upper=Samples(...), lower=Samples(...))`."
            )
        keys = jax.random.split(key, len(parts))
        drawn = [draw(*pair) for pair in zip(keys, parts, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    return sample


def full_batch(batch: Tree) -> Sampler:
    """Give all data at every step."""

    def sampler(key, step):
        del key, step
        return batch

    return sampler


def paired(upper: Sampler, lower: Sampler) -> Sampler:
    """Draw the two levels independently of each other.

    Args:
        upper: sampler of the upper level's data.
        lower: sampler of the lower level's data.

    Returns:
        A sampler of ``Batch(upper, lower)``; each level has a key of its own.

    Examples:
        >>> sampler = paired(full_batch("validation"), full_batch("training"))
        >>> sampler(jax.random.key(0), 0)
        Batch(upper='validation', lower='training')
    """

    def sampler(key, step):
        upper_key, lower_key = jax.random.split(key)
        return Batch(upper(upper_key, step), lower(lower_key, step))

    return sampler


def fresh_rounds(sampler: Sampler, rounds: int) -> Sampler:
    """Give each of the K inner rounds of a step a batch of its own.

    Step t takes batch t of one stream for the phases that run once, and the batches
    ``t K, ..., t K + K - 1`` of another stream for the inner rounds, so that the inner
    rounds, too, pass through all data epoch by epoch.

    Args:
        sampler: of one batch.
        rounds: K, the inner rounds of a step.

    Returns:
        A sampler of ``Rounds(outer, inner)``; ``inner`` has the rounds on axis 0.

    Raises:
        ValueError: if ``rounds`` is not positive.

    Examples:
        >>> sampler = fresh_rounds(lambda key, step: jnp.asarray(step), 3)
        >>> batch = sampler(jax.random.key(0), 2)
        >>> batch.outer.tolist(), batch.inner.tolist()
        (2, [6, 7, 8])
    """
    if rounds < 1:
        raise ValueError(f"A step has at least one inner round, got rounds={rounds}.")

    def fresh(key, step):
        outer_key, inner_key = jax.random.split(key)
        inner = jax.vmap(sampler, (None, 0))(
            inner_key, step * rounds + jnp.arange(rounds)
        )
        return Rounds(sampler(outer_key, step), inner)

    return fresh


def _host_choose(mask, step, batch_size, seed):
    """Indices of one node's batch, and which of them count."""
    held = np.flatnonzero(mask)
    batches = max(1, -(-len(held) // batch_size))
    epoch, turn = divmod(step, batches)
    chosen = np.random.default_rng((*seed, epoch)).permutation(held)[turn::batches]
    valid = np.arange(batch_size) < len(chosen)
    return np.pad(chosen, (0, batch_size - len(chosen))), valid


def host_minibatches(samples: Tree, batch_size: int, seed: int) -> Callable:
    """Draw minibatches on the host, for data that do not fit on the device.

    The same rule as :func:`minibatches`, in NumPy and with another order.

    Args:
        samples: stacked :class:`Samples` (numbered or not), or a tree of them such as
            a ``Batch``, whose members are drawn independently.
        batch_size: the most samples of one node in one batch.
        seed: fixes the order.

    Returns:
        ``batch_at(step)``: the same tree with the drawn samples, as NumPy arrays.

    Raises:
        ValueError: if ``batch_size`` is not positive.

    Examples:
        >>> inputs, labels = np.arange(5.0).reshape(1, 5, 1), np.zeros((1, 5), int)
        >>> samples = Samples(inputs, labels, np.ones((1, 5), bool))
        >>> batch_at = host_minibatches(samples, 2, seed=0)
        >>> epoch = [batch_at(step) for step in range(3)]
        >>> drawn = np.concatenate([part.inputs[part.mask] for part in epoch])
        >>> np.sort(drawn[:, 0]).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    check_batch_size(batch_size)
    leaves, structure = jax.tree.flatten(samples, is_leaf=_is_samples)
    leaves = [jax.tree.map(np.asarray, leaf) for leaf in leaves]

    def draw(stream, leaf, step):
        width = min(batch_size, leaf.mask.shape[1])
        picks = [
            _host_choose(mask, step, width, (seed, stream, node))
            for node, mask in enumerate(leaf.mask)
        ]
        chosen, valid = (np.stack(part) for part in zip(*picks, strict=True))
        nodes = np.arange(len(chosen))[:, None]
        drawn = jax.tree.map(lambda rows: rows[nodes, chosen], leaf)
        return drawn._replace(mask=valid)

    def batch_at(step):
        drawn = [draw(stream, leaf, step) for stream, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, drawn)

    return batch_at
