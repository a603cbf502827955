"""Where a run's batches come from, as one small type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Tree


class HostBatches(NamedTuple):
    """Batches that the host makes, one per step; see :func:`from_host`."""

    batch_at: Callable[[int], Tree]


class Feed(NamedTuple):
    """How one chunk of steps gets its batches."""

    # fetch(first, length), on the host -> (what all steps share, one row per step)
    fetch: Callable[[int, int], tuple[Tree, Tree]]
    # read(shared, row, key, step), traced -> batch
    read: Callable[[Tree, Tree, jax.Array, jax.Array], Tree]
    replayable: bool = True
    on_host: bool = False  # whether a chunk's batches must fit into memory


def from_host(batch_at: Callable[[int], Tree]) -> HostBatches:
    """Let the host make the batches: files, databases, NumPy pipelines.

    ``run`` stacks the batches of one chunk on the host, so ``every`` batches must fit
    into memory at a time.

    Args:
        batch_at: the batch of step ``0, 1, ...`` as NumPy arrays, the same ones in
            every process, or as arrays on the mesh of the state, of which each process
            made its own rows; a pure function of the step, since a resumed run asks for
            its steps again.

    Returns:
        A source to pass to ``run`` as ``batches``.

    Examples:
        >>> rows = np.arange(12.0).reshape(4, 3)
        >>> source = from_host(lambda step: rows[step % 4])
        >>> bool((source.batch_at(5) == rows[1]).all())
        True
    """
    return HostBatches(batch_at)


def feed(batches: Tree) -> Feed:
    """Recognise what the caller passed as ``batches``."""
    if isinstance(batches, HostBatches):
        return _host(batches.batch_at)
    if isinstance(batches, Iterator):
        return _host(lambda step: _next(batches, step))._replace(replayable=False)
    if callable(batches):
        return Feed(lambda first, length: (None, None), _sampled(batches))
    _check_arrays(batches)
    shared = jax.tree.map(jnp.asarray, batches)
    return Feed(lambda first, length: (shared, None), lambda s, row, key, step: s)


def _sampled(sampler):
    def read(shared, row, key, step):
        del shared, row
        return sampler(key, step)

    return read


def _host(batch_at) -> Feed:
    def fetch(first, length):
        rows = [batch_at(step) for step in range(first, first + length)]
        return None, _stack(rows, first)

    return Feed(fetch, lambda shared, row, key, step: row, on_host=True)


def _stack(rows, first: int) -> Tree:
    wanted = _form(rows[0])
    for offset, row in enumerate(rows):
        if _form(row) != wanted:
            raise ValueError(
                f"All batches of a run need one structure and one shape, {wanted} as "
                f"at step {first}; got {_form(row)} at step {first + offset}. Pad the "
                "odd batch, or drop it."
            )
    return jax.tree.map(_stacked, *rows)


def _stacked(*leaves) -> jax.Array:
    # What lies on a mesh stays there.
    if isinstance(leaves[0], jax.Array) and leaves[0].committed:
        return jnp.stack(leaves)
    return jnp.asarray(np.stack(leaves))


def _form(row):
    return jax.tree.structure(row), [np.shape(leaf) for leaf in jax.tree.leaves(row)]


def _next(batches, step: int) -> Tree:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"The iterator of batches ended at step {step}. Pass one that lasts for "
            "`num_steps` steps, e.g. `itertools.cycle(...)`."
        ) from None


def _check_arrays(batches: Tree) -> None:
    for leaf in jax.tree.leaves(batches):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            raise ValueError(
                "`batches` must be one stacked batch (a pytree of arrays), a sampler "
                "`(key, step) -> batch`, `from_host(batch_at)` or an iterator; got "
                f"{type(leaf).__name__}. Turn an iterable into `iter(...)`."
            )
