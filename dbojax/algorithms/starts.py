"""What a federated method asks of its settings, its starts and its states."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees


def check_rows(state, rows):
    """Refuse a state with other rows than the method keeps."""
    for name, wanted in (("x", 1), ("y", rows), ("z", rows)):
        found = trees.num_nodes(getattr(state, name), f"state.{name}")
        if found != wanted:
            raise ValueError(
                f"`state.{name}` holds {found} rows, this method keeps {wanted}: the "
                "state is that of another one. Write `method.init(x, y)`."
            )


def one_row(v):
    """The server's copy of a start, which may have a row per client."""
    if trees.num_nodes(v) == 1:
        return v
    return jax.tree.map(lambda leaf: leaf[None], trees.node_mean(v))


def row_each(v, clients):
    """A row per client, of a start that may have one for all."""
    return (
        trees.replicate(jax.tree.map(lambda leaf: leaf[0], v), clients)
        if trees.num_nodes(v) == 1
        else v
    )


def checked_start(name, v, fleet):
    """Refuse a start that does not fit the layout, or has other rows than clients."""
    v = jax.tree.map(jnp.asarray, v)
    trees.check_floating(v, name)
    labels = getattr(fleet.layout, name)
    if jax.tree.structure(labels) != jax.tree.structure(v):
        raise ValueError(
            f"`{name}` must have the structure for which the layout was made, "
            f"{jax.tree.structure(labels)}; got {jax.tree.structure(v)}."
        )
    for label, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(v), strict=True):
        words, sizes = label.split(), leaf.shape[1:]
        units = [fleet.layout.units.get(word, 1) for word in words]
        if len(words) != len(sizes) or any(map(operator.mod, sizes, units)):
            raise ValueError(
                f"A leaf of `{name}` has shape {leaf.shape}, which does not fit its "
                f"label {label!r} with units {fleet.layout.units} after the axis of "
                "rows. Make the layout of the variables that you start from."
            )
    found = trees.num_nodes(v, name)
    if found not in (1, fleet.clients):
        raise ValueError(
            f"`{name}` holds {found} rows; a server with {fleet.clients} clients "
            f"starts from one, `dbo.replicate(value, 1)`, or from one per client."
        )
    return v


def check_settings(inner_steps, keep, extracted):
    """Refuse settings that contradict each other."""
    if not isinstance(inner_steps, numbers.Integral) or inner_steps < 0:
        raise ValueError(
            f"`inner_steps` is a whole number >= 0 of steps of y alone; got "
            f"{inner_steps!r}."
        )
    if keep and extracted:
        raise ValueError(
            "`keep` leaves untrained entries at the server's values, so a client holds "
            "the whole model: write extracted=False."
        )


def steps_per_level(local_steps, fleet) -> list[int]:
    """One number per level."""
    levels = len(fleet.levels)
    many = isinstance(local_steps, Sequence | np.ndarray)
    counts = list(local_steps) if many else [local_steps] * levels
    good = all(isinstance(k, int | np.integer) and k >= 1 for k in counts)
    if len(counts) != levels or not good:
        raise ValueError(
            f"`local_steps` is a whole number >= 1, or one for each of {levels} levels "
            f"of capacity, the largest first; got {local_steps!r}."
        )
    return [int(k) for k in counts]


def mean_steps(counts, fleet) -> float:
    """Local steps of those who take part, in the mean."""
    sizes = [level.participants for level in fleet.levels]
    total = sum(k * size for k, size in zip(counts, sizes, strict=True))
    return total / sum(sizes)
