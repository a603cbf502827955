"""How many of the drawn clients hold each entry of a variable."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Coverage, Tree
from dbojax.submodels.fleet import Drawn, Fleet, draw


class Window(NamedTuple):
    """Minimum coverage of x and y, round by round and summed over a window."""

    rounds: Coverage  # (rounds,) each: C* of each round
    total: Coverage  # how often the least held entry was held over all rounds


def counts(
    labels: Tree, units: dict[str, int], drawn: Sequence[Drawn], like: Tree
) -> Tree:
    r"""Count the clients that hold each entry, :math:`|\mathcal N_j|`.

    An entry is held by the clients that keep the units of all its axes,

    .. math::
        |\mathcal N_{ab}| = \sum_i 1[a \in \mathcal K_i]\, 1[b \in \mathcal K_i'],

    a product of one 0/1 matrix (clients x units) per axis: no client's mask is ever
    built.

    Args:
        labels: for each leaf the groups of its axes, ``"_"`` for one that is whole.
        units: size of each group.
        drawn: for each level of capacity, ``clients`` (s,) and ``kept``, group to
            (s, k) units; a group that is left out is whole.
        like: gives the shapes; an axis may be a multiple of its group, units fastest.

    Returns:
        A tree of int32 counts in the shapes of ``like``.

    Examples:
        >>> from dbojax.submodels import Drawn, counts, smallest
        >>> drawn = Drawn(jnp.arange(2), {"h": jnp.array([[0, 1], [1, 2]])})
        >>> held = counts({"bias": "h"}, {"h": 3}, [drawn], {"bias": jnp.zeros(3)})
        >>> held["bias"], smallest(held)
        (Array([1, 2, 1], dtype=int32), Array(1, dtype=int32))
    """
    marks = [_marks(units, level) for level in drawn]
    clients = sum(level.clients.shape[0] for level in drawn)

    def count(label, leaf):
        groups = label.split()
        named = [group for group in groups if group != "_"]
        if not named:
            return jnp.full(leaf.shape, clients, jnp.int32)
        found = sum(_together([held[group] for group in named]) for held in marks)
        spread = [1 if group == "_" else units[group] for group in groups]
        times = [long // short for long, short in zip(leaf.shape, spread, strict=True)]
        # 0/1 products in float32 are exact, and far quicker than whole numbers.
        return jnp.tile(jnp.reshape(found, spread), times).astype(jnp.int32)

    return jax.tree.map(count, labels, like)


def smallest(held: Tree) -> jax.Array:
    r"""Minimum coverage :math:`C^* = \min_j |\mathcal N_j|`, an int32 scalar."""
    leaves = [leaf.min() for leaf in jax.tree.leaves(held) if math.prod(leaf.shape)]
    if not leaves:
        raise ValueError("The coverage of a variable without entries is not defined.")
    return functools.reduce(jnp.minimum, leaves).astype(jnp.int32)


def over_rounds(key: jax.Array, fleet: Fleet, x: Tree, y: Tree, rounds: int) -> Window:
    r"""Try a fleet before it trains: minimum coverage over a window of rounds.

    .. math::
        C^*_q = \min_j |\mathcal N_j(q)|, \qquad
        C^*_{1:Q} = \min_j \sum_{q < Q} |\mathcal N_j(q)|

    An entry with :math:`C^*_{1:Q} = 0` is never trained. Rules that read scores get
    the units' numbers in place of them.

    Args:
        key: draws who takes part.
        fleet: clients, capacities and rule.
        x: one node's upper variable, or its shapes.
        y: its lower variable.
        rounds: how many, Q.

    Returns:
        The coverage of each round and of all together.

    Raises:
        ValueError: if ``rounds`` is not a whole number from 1 on.
        TypeError: if ``fleet`` is of another kind.

    Examples:
        The same phase in all layers never trains weights between distant units:

        >>> x = [jnp.ones((2, 8)), jnp.ones((8, 8))]
        >>> units = dbo.submodels.layout(x, jnp.ones(8), ["_ a", "a b"], "b")
        >>> def least(phases):
        ...     rule = dbo.submodels.staggered(phases)
        ...     four = dbo.submodels.fleet(units, [0.25] * 4, rule, minimum=0)
        ...     key = jax.random.key(0)
        ...     return int(over_rounds(key, four, x, jnp.ones(8), rounds=8).total.x)
        >>> least(dbo.submodels.aligned), least(dbo.submodels.per_layer) > 0
        (0, True)
    """
    trees.check_type(fleet, Fleet, "fleet", "dbo.submodels.fleet(layout, capacities)")
    if not isinstance(rounds, numbers.Integral) or rounds < 1:
        raise ValueError(
            "`over_rounds` looks at a whole number of rounds from 1 on, got "
            f"{rounds!r}."
        )
    layout, both = fleet.layout, (x, y)
    scores = {name: jnp.arange(1.0 * size) for name, size in layout.units.items()}

    def one(total, q):
        drawn = draw(fleet, jax.random.fold_in(key, q), q, scores)
        held = counts((layout.x, layout.y), layout.units, drawn, both)
        return jax.tree.map(jnp.add, total, held), Coverage(*map(smallest, held))

    start = jax.tree.map(lambda a: jnp.zeros(jnp.shape(a), jnp.int32), both)
    total, each = jax.lax.scan(one, start, jnp.arange(rounds, dtype=jnp.int32))
    return Window(each, Coverage(*map(smallest, total)))


def _marks(units: dict[str, int], level: Drawn) -> dict[str, jax.Array]:
    """Which units each client of a level holds: group to (s, size) of 0 and 1."""

    def mark(size, kept):
        if kept is None:
            return jnp.ones((level.clients.shape[0], size), jnp.float32)
        rows = jnp.arange(kept.shape[0])[:, None]
        return jnp.zeros((kept.shape[0], size), jnp.float32).at[rows, kept].set(1.0)

    return {name: mark(size, level.kept.get(name)) for name, size in units.items()}


def _together(held: list[jax.Array]) -> jax.Array:
    """Sum over clients of the outer products of their marks."""
    clients, *axes = "abcdefghij"[: len(held) + 1]
    terms = ",".join(clients + axis for axis in axes)
    return jnp.einsum(
        f"{terms}->{''.join(axes)}",
        *held,
        precision="highest",
        preferred_element_type=jnp.float32,
    )
