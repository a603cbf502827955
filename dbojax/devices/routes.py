"""Which rows travel where: a fixed gather over blocks, as rounds of permutations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Round(NamedTuple):
    """A partial permutation of devices; each sender sends as many rows."""

    pairs: tuple[tuple[int, int], ...]  # (from, to)
    rows: np.ndarray  # (devices, rows), int32: what a device sends, by local number


class Route(NamedTuple):
    """How ``rows[index]`` is had where rows and index are shared out in blocks.

    A device puts its own rows and those that arrive, round by round, into a buffer.
    """

    rounds: tuple[Round, ...]
    # (m, ...), int32: where in its device's buffer an entry of the index is.
    positions: np.ndarray
    messages: int  # rows that cross between devices, all in all
    # Whether all rows go everywhere, and the buffer is all rows in their order.
    gathers: bool


def route(index: np.ndarray, n: int, devices: int) -> Route:
    """Plan ``rows[index]``, every row crossing to a device at most once.

    A row that several entries of one device ask for crosses once. Where every device
    asks for all rows, one gathering of all costs the same bytes in fewer messages.

    Args:
        index: ``(m, ...)`` integers in [0, n); entries on axis 0 are shared out.
        n: number of rows.
        devices: blocks of ``n / devices`` rows and ``m / devices`` entries; divides
            both.

    Examples:
        >>> ring = (np.arange(8)[:, None] + [-1, 0, 1]) % 8
        >>> plan = route(ring, 8, 4)
        >>> len(plan.rounds), plan.messages, plan.gathers
        (2, 8, False)
        >>> route(np.tile(np.arange(8), (8, 1)), 8, 4).gathers
        True
    """
    index = np.asarray(index)
    block, share = n // devices, len(index) // devices
    asked = np.zeros((devices, n), bool)
    for device in range(devices):
        asked[device, index[device * share : (device + 1) * share].reshape(-1)] = True
        asked[device, device * block : (device + 1) * block] = False
    messages = int(asked.sum())
    if devices > 1 and messages == n * (devices - 1):
        return Route((), index.astype(np.int32), messages, gathers=True)
    rounds, where = _rounds(asked, block)
    owner = np.repeat(np.arange(devices), share).reshape(
        (-1,) + (1,) * (index.ndim - 1)
    )
    return Route(rounds, where[owner, index], messages, gathers=False)


def _rounds(asked, block):
    """Rounds that bring all that is asked for, and where it is in the buffers."""
    devices, n = len(asked), block * len(asked)
    own = np.arange(n) - np.arange(devices)[:, None] * block
    where = np.where((own >= 0) & (own < block), own, -1).astype(np.int32)
    # (to, from) -> rows to bring, by local number
    parts = asked.reshape(devices, devices, block)
    left = [[np.flatnonzero(row) for row in part] for part in parts]
    rounds, filled = [], block
    while True:
        demand = np.array([[len(rows) for rows in part] for part in left])
        if not demand.any():
            return tuple(rounds), where
        pairs = _matching(demand)
        count = min(int(demand[pair]) for pair in pairs)
        sends = np.zeros((devices, count), np.int32)
        for to, sender in pairs:
            local, left[to][sender] = left[to][sender][:count], left[to][sender][count:]
            sends[sender] = local
            where[to, sender * block + sends[sender]] = np.arange(
                filled, filled + count
            )
        rounds.append(Round(tuple((sender, to) for to, sender in pairs), sends))
        filled += count


def _matching(demand):
    """Disjoint pairs with a demand, those of the busiest devices first.

    Among equals the pairs that lie as far apart, so that a ring or another circulant
    graph takes one round per shift.
    """
    devices = len(demand)
    to, sender = np.nonzero(demand)
    busy = np.maximum(demand.sum(axis=1)[to], demand.sum(axis=0)[sender])
    hears, speaks, pairs = set(), set(), []
    for at in np.lexsort((to, (sender - to) % devices, -busy)):
        pair = int(to[at]), int(sender[at])
        if pair[0] not in hears and pair[1] not in speaks:
            pairs.append(pair)
            hears.add(pair[0])
            speaks.add(pair[1])
    return pairs
