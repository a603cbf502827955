"""Which units of a group a client keeps in a round.

A rule is a function of the round, the client, the group and a seed alone (of scores
too, for :func:`magnitude`), so both ends know it and no mask ever travels.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Group(NamedTuple):
    """Units that a client of one capacity keeps or drops together; Python values."""

    name: str
    number: int  # its place among the groups of the layout, from 0
    size: int  # how many units there are
    kept: int  # how many of them the client keeps
    clients: int  # how many clients there are, M


class Rule(NamedTuple):
    """How the kept units of a group are chosen."""

    # (q, client, group, scores) -> (kept,) int32, distinct; the round q and the client
    # are int32 scalars that may be traced, scores (size,) or None.
    keep: Callable[..., jax.Array]
    by_magnitude: bool = False  # whether `keep` reads scores


class Phase(NamedTuple):
    """How a window of kept units moves round its circle; whole numbers."""

    stride: int = 1  # units per round
    spread: int = 1  # turns of the circle over which all clients are spread
    offset: int = 0  # units


def static() -> Rule:
    r"""Keep a prefix, :math:`\{0, \dots, k - 1\}`, in every round.

    Small sub-models are nested in larger ones, and the last units are trained by the
    clients of full capacity alone.

    Returns:
        A rule.

    Examples:
        >>> from dbojax.submodels import Group
        >>> static().keep(7, 3, Group("h", 0, size=6, kept=2, clients=4), None)
        Array([0, 1], dtype=int32)

    References:
        Diao, Ding and Tarokh (2021), arXiv:2010.01264 (HeteroFL).
    """
    return _rule(lambda q, client, group: jnp.arange(group.kept, dtype=jnp.int32))


def random_units(seed: int) -> Rule:
    r"""Keep a fresh random subset in each round, all subsets of :math:`k` units alike.

    In the mean :math:`\sum_i \beta_i` clients hold a unit and
    :math:`\sum_i \beta_i^2` a weight between two hidden units.

    Args:
        seed: whole number, not negative; the same at the server and all clients.

    Returns:
        A rule whose sets are independent over rounds, clients and groups.

    Raises:
        ValueError: if the seed is not a whole number from 0 on.

    Examples:
        >>> from dbojax.submodels import Group
        >>> group = Group("h", 0, size=6, kept=3, clients=4)
        >>> units = random_units(seed=0).keep(7, 3, group, None)
        >>> len(set(units.tolist()))
        3

    References:
        The random sub-models of Alam et al. (2022), arXiv:2212.01548.
    """
    if not _is_whole(seed) or seed < 0:
        raise ValueError(
            "`random_units(seed)` needs a whole number from 0 on, which all clients "
            f"share, got seed={seed!r}. Write e.g. `random_units(0)`; a key is not "
            "taken, as rules are the same in every run."
        )

    def units(q, client, group):
        key = jax.random.key(int(seed))
        for number in (q, client, group.number):
            key = jax.random.fold_in(key, number)
        return jax.random.permutation(key, group.size)[: group.kept]

    return _rule(units)


def rolling(stride: int = 1) -> Rule:
    r"""Move one window round the units, the same for all clients of a capacity.

    .. math:: \{(s q + j) \bmod n : j < k\} \text{ in round } q.

    Each unit has its turn, but in a round all clients hold about the same ones.
    :func:`staggered` spreads them.

    Args:
        stride: units per round, :math:`s`; whole, and not 0.

    Returns:
        A rule.

    Raises:
        ValueError: if the stride is not a whole number, or 0.

    Examples:
        >>> from dbojax.submodels import Group
        >>> rolling().keep(5, 3, Group("h", 0, size=6, kept=2, clients=4), None)
        Array([5, 0], dtype=int32)

    References:
        Alam et al. (2022), arXiv:2212.01548 (FedRolex).
    """
    if not _is_whole(stride) or stride == 0:
        raise ValueError(
            "`rolling(stride)` moves by a whole number of units per round, got "
            f"stride={stride!r}. Write e.g. `rolling(1)`, or `static()` to stay."
        )
    phase = Phase(int(stride), spread=0)
    return _rule(lambda q, client, group: _window(phase, q, client, group))


def aligned(group: Group) -> Phase:
    """The same phase for every group: consecutive layers stay in step."""
    del group
    return Phase()


def per_layer(group: Group) -> Phase:
    r"""Strides 2, 3, 4 and so on over the groups: consecutive layers drift apart.

    Where two layers are equally wide, they drift by one unit per round, which spreads
    the pairs that are held most evenly; strides 1 and 2 would do so too, but fall into
    step where the second layer is twice as wide. All clients are spread over one turn
    of each circle: with ``spread`` equal to the stride, client :math:`i` would only
    repeat at once what client 0 does later, and a spread that shares a factor with the
    number of clients puts several on the same units.
    """
    stride = group.number + 2
    # A stride of whole turns would stand still.
    return Phase(stride + (group.size > 1 and stride % group.size == 0))


def staggered(
    phases: Callable[[Group], Phase] | dict[str, Phase] = per_layer,
) -> Rule:
    r"""Spread the clients over the circle of units, and move on in each round.

    .. math::
        \Big\{\Big(s_l q + \Big\lfloor \frac{p_l i n_l}{M} \Big\rfloor + o_l + j\Big)
        \bmod n_l : j < k\Big\}
        \text{ for client } i \text{ of } M \text{ in round } q,

    with stride :math:`s_l`, spread :math:`p_l` and offset :math:`o_l` of group
    :math:`l`. Every unit is held by about :math:`\sum_i \beta_i` clients.

    A weight needs both its units. With the same phase in two layers of equal width
    (:func:`aligned`), unit :math:`a` and unit :math:`b` are held together only if they
    are less than :math:`\beta n` apart on the circle, and for :math:`\beta < 1/2` the
    others are never trained. An offset does not help: it moves the band
    :math:`|a - b| < \beta n`, which stays as narrow. Different strides move it from
    round to round (:func:`per_layer`, the default), different spreads from client to
    client; :func:`~dbojax.submodels.phases.coverage_aware` searches both.

    Args:
        phases: a function ``Group -> Phase``, or a phase for each group by name.

    Returns:
        A rule.

    Raises:
        TypeError: if ``phases`` is neither.
        ValueError: if a phase is not made of whole numbers, or one is missing.

    Examples:
        >>> from dbojax.submodels import Group
        >>> group = Group("h", 1, size=8, kept=4, clients=4)
        >>> rule = staggered()
        >>> jax.vmap(lambda i: rule.keep(1, i, group, None))(jnp.arange(4))
        Array([[3, 4, 5, 6],
               [5, 6, 7, 0],
               [7, 0, 1, 2],
               [1, 2, 3, 4]], dtype=int32)

    References:
        Our formulation, after the rolling windows of arXiv:2212.01548.
    """
    if isinstance(phases, dict):
        for name, phase in phases.items():
            _check_phase(phase, name)
    elif not callable(phases):
        raise TypeError(
            "`staggered(phases)` needs a function `Group -> Phase`, e.g. `per_layer`, "
            f"or a dict of group name to Phase; got {type(phases).__name__}."
        )

    def units(q, client, group):
        phase = phases(group) if callable(phases) else _named(phases, group)
        return _window(_check_phase(phase, group.name), q, client, group)

    return _rule(units)


def magnitude() -> Rule:
    """Keep the units of largest score, as the server ranks them.

    All clients of a capacity hold the same units, and a unit that is never held keeps
    its score: as with :func:`static`, clients of full capacity must train the rest.

    Returns:
        A rule that reads scores.

    Raises:
        ValueError: from ``keep``, if there are no scores, or of another length.

    Examples:
        >>> from dbojax.submodels import Group
        >>> group = Group("h", 0, size=4, kept=2, clients=4)
        >>> sorted(magnitude().keep(0, 0, group, jnp.array([3, 1, 4, 1.5])).tolist())
        [0, 2]

    References:
        Our formulation; magnitude per layer is one common choice of sub-models.
    """

    def keep(q, client, group, scores):
        del q, client
        if scores is None or jnp.shape(scores) != (group.size,):
            got = "none" if scores is None else f"shape {jnp.shape(scores)}"
            raise ValueError(
                f"`magnitude()` ranks the {group.size} units of group "
                f"{group.name!r} by one score each, ({group.size},); got {got}. "
                "Give `draw` the scores, e.g. norms of the units' weights."
            )
        if _whole_group(group):
            return jnp.arange(group.size, dtype=jnp.int32)
        return jax.lax.top_k(scores, group.kept)[1]

    return Rule(keep, by_magnitude=True)


def shifts(phase: Phase, size: int, clients: int) -> np.ndarray:
    """Where each client's window starts in round 0: (clients,), exact."""
    # A whole turn of `spread * client / clients` changes nothing, so it goes first.
    turns = np.arange(clients, dtype=np.int64) * (phase.spread % clients) % clients
    return (turns * size // clients + phase.offset) % size


def turned(stride: int, q: Any, size: int) -> Any:
    """``stride * q mod size``, exact in int32 for any round and any stride."""
    turn = q % size
    total = 0 * turn
    for bit in bin(stride % size)[2:]:  # Horner's scheme: no product leaves 3 * size
        total = (2 * total + int(bit) * turn) % size
    return total


def _window(phase: Phase, q, client, group: Group) -> jax.Array:
    first = jnp.asarray(shifts(phase, group.size, group.clients), jnp.int32)[client]
    start = turned(phase.stride, jnp.asarray(q), group.size).astype(jnp.int32)
    return (start + first + jnp.arange(group.kept, dtype=jnp.int32)) % group.size


def _rule(units: Callable[..., jax.Array]) -> Rule:
    """A rule that does not read scores, and keeps a whole group without asking."""

    def keep(q, client, group, scores=None):
        del scores
        if _whole_group(group):
            return jnp.arange(group.size, dtype=jnp.int32)
        return units(q, client, group).astype(jnp.int32)

    return Rule(keep)


def _whole_group(group: Group) -> bool:
    if not 1 <= group.kept <= group.size:
        raise ValueError(
            f"Of the {group.size} units of group {group.name!r} from 1 to all can be "
            f"kept; got kept={group.kept}. Write `math.ceil(capacity * size)`."
        )
    return group.kept == group.size


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_phase(phase, name: str) -> Phase:
    if not isinstance(phase, Phase) or not all(map(_is_whole, phase)):
        raise ValueError(
            f"Group {name!r} needs a Phase of whole numbers, e.g. `Phase(stride=3, "
            f"spread=1, offset=0)`; got {phase!r}."
        )
    return Phase(*map(int, phase))


def _named(phases: dict[str, Phase], group: Group) -> Phase:
    if group.name not in phases:
        raise ValueError(
            f"`staggered` has no phase for group {group.name!r}, only for "
            f"{sorted(phases)}. Add it, or give a function of the group."
        )
    return phases[group.name]
