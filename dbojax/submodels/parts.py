"""Cut a sub-model out of a model, and put it back."""
# ruff: noqa: D417 - what means the same in all of them is described once, in `take`.

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Tree

WHOLE = "_"  # the label of an axis that is never cut
# group -> (k,), the units that a client keeps; a group that is missing stays whole
Kept = Mapping[str, jax.Array | np.ndarray]


def take(labels: Tree, units: dict[str, int], tree: Tree, kept: Kept) -> Tree:
    """Cut out what a client holds: a truly smaller tree.

    Args:
        labels: one word per axis of each leaf, as in ``Layout``.
        units: how many units each group has.
        tree: one value of the whole variable.
        kept: the units that stay; a group that is missing stays whole.

    Returns:
        The same structure with shorter axes, in the order of ``kept``.

    Examples:
        >>> kept = {"h": jnp.array([2, 0])}
        >>> take("h _", {"h": 3}, jnp.arange(6.0).reshape(3, 2), kept).tolist()
        [[4.0, 5.0], [0.0, 1.0]]
    """

    def leaf(label, value):
        for axis, group in _cuts(label, kept):
            if value.shape[axis] % units[group]:
                raise ValueError(
                    f"Axis {axis} of a leaf of shape {value.shape} is labelled "
                    f"{group!r} but is no multiple of its {units[group]} units."
                )
            blocks = np.arange(value.shape[axis] // units[group])[:, None]
            index = (blocks * units[group] + kept[group][None]).reshape(-1)
            value = jnp.take(value, index, axis, mode="clip")
        return value

    return jax.tree.map(leaf, labels, tree)


def put(labels: Tree, units: dict[str, int], compact: Tree, kept: Kept) -> Tree:
    """Undo :func:`take`: the whole variable, zero where a client holds nothing.

    Args:
        labels, units, kept: as for :func:`take`.
        compact: what it returned, or something of its shape.

    Returns:
        A tree of the whole variable's shape.

    Examples:
        >>> kept = {"h": jnp.array([2, 0])}
        >>> put("h", {"h": 3}, jnp.array([5.0, 7.0]), kept).tolist()
        [7.0, 0.0, 5.0]
    """

    def leaf(label, value):
        for axis, group in _cuts(label, kept):
            size, k = units[group], kept[group].shape[0]
            blocks = value.shape[axis] // k
            # Where each unit went; a gather, since scattering rows is slow on CPUs.
            where = jnp.full(size, blocks * k).at[kept[group]].set(jnp.arange(k))
            index = (where[None] + k * np.arange(blocks)[:, None]).reshape(-1)
            value = jnp.take(value, index, axis, mode="fill", fill_value=0)
        return value

    return jax.tree.map(leaf, labels, compact)


def mask(labels: Tree, units: dict[str, int], kept: Kept, like: Tree) -> Tree:
    """Whether a client holds each entry.

    Args:
        labels, units, kept: as for :func:`take`.
        like: the whole variable, or its shapes.

    Returns:
        Booleans in its shapes.

    Examples:
        >>> mask("h", {"h": 3}, {"h": jnp.array([2, 0])}, jnp.ones(3)).tolist()
        [True, False, True]
    """

    def leaf(label, value):
        held = jnp.ones(jnp.shape(value), bool)
        for axis, group in _cuts(label, kept):
            one = jnp.zeros(units[group], bool).at[kept[group]].set(True)
            one = jnp.tile(one, held.shape[axis] // units[group])
            held &= one.reshape([-1 if a == axis else 1 for a in range(held.ndim)])
        return held

    return jax.tree.map(leaf, labels, like)


def masked(labels: Tree, units: dict[str, int], kept: Kept, tree: Tree) -> Tree:
    """The whole variable with zeros where a client holds nothing."""
    held = mask(labels, units, kept, tree)
    return jax.tree.map(lambda m, a: jnp.where(m, a, 0), held, tree)


def replaced(
    labels: Tree, units: dict[str, int], compact: Tree, kept: Kept, whole: Tree
) -> Tree:
    """The whole variable with what a client holds overwritten by ``compact``."""
    held = mask(labels, units, kept, whole)
    return jax.tree.map(jnp.where, held, put(labels, units, compact, kept), whole)


def _cuts(label, kept):
    return [(axis, g) for axis, g in enumerate(label.split()) if g in kept]
