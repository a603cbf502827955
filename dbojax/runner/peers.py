"""The processes of one run: what each tells the others, and when one is gone."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dbojax.base import Tree

WORDS = 32  # how many uint32 each process can tell the others at a time

# What XLA says of a process that cannot be reached; its other errors pass unchanged.
_LOST = re.compile(
    r"\bGloo\b.*(closed by peer|reset by peer|refused|Broken pipe|timeout|timed out"
    r"|unreachable|No route to host)"
    r"|remote process exited or there was a network error",
    re.DOTALL | re.IGNORECASE,
)

_PASS = (
    "Pass it in all of them or in none: not `... if dbo.devices.is_first() else None`."
)
_ADVICE = {
    "key": "Make it in the same way everywhere, e.g. `jax.random.key(0)`.",
    "evaluate": _PASS,
    "checkpoint": _PASS,
    "batches": "Pass the same kind everywhere, e.g. `from_host(batch_at)`.",
}


class PeerLostError(ConnectionError):
    """Another process of this run is gone, or cannot be reached any more.

    Only the links tell: it is raised at the next exchange. A process that exchanges
    nothing is ended by JAX itself, when the missing one stops to send signs of life.
    """


class Peers(NamedTuple):
    """The processes that share a tree of arrays, as one of them sees them."""

    rank: int = 0
    size: int = 1
    # rank_of(device) -> the rank of the process that drives it
    rank_of: Callable[[Any], int] = lambda device: 0
    # gather(words) -> (size, WORDS): waits for all, so that it is a barrier as well
    gather: Callable[[np.ndarray], np.ndarray] = lambda words: padded(words)[None]


ALONE = Peers()


def peers_of(tree: Tree) -> Peers:
    """Those that hold a share of the arrays; nobody else if all are on this host.

    Examples:
        >>> peers_of(jnp.ones(3)).size
        1
    """
    devices = {
        device
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        for device in leaf.sharding.device_set
    }
    if not devices:
        return ALONE
    ordered = sorted(devices, key=lambda device: device.id)
    processes = sorted({device.process_index for device in ordered})
    ranks = {process: rank for rank, process in enumerate(processes)}
    owners = [ranks[device.process_index] for device in ordered]
    return Peers(
        rank=ranks[jax.process_index()],
        size=len(ranks),
        rank_of=lambda device: ranks[device.process_index],
        gather=_gather(ordered, [owners.index(rank) for rank in range(len(ranks))]),
    )


def _gather(devices, speakers):
    # One row per device, and one all-gather: its links stay open, and then wait for a
    # late process without limit, while opening them gives up after 30 seconds.
    mesh = jax.sharding.Mesh(
        np.array(devices), ("all",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    rows = jax.NamedSharding(mesh, jax.P("all"))
    everywhere = jax.NamedSharding(mesh, jax.P())

    def gather(words):
        row = padded(words)[None]
        shape = (len(devices), WORDS)
        mine = jax.make_array_from_callback(shape, rows, lambda index: row)
        told = jax.jit(_same, out_shardings=everywhere)(mine)
        wait(told)
        return np.asarray(told)[speakers]

    return gather


def wait(array: jax.Array) -> None:
    """Wait for a result on every device of this process.

    When a process is gone, some devices fail and others go on waiting for those that
    did: an error counts as soon as one has it, whichever it is.
    """
    pending = [shard.data for shard in array.addressable_shards]
    pause = 2e-5
    while pending:
        ready = [part.is_ready() for part in pending]
        jax.block_until_ready(list(itertools.compress(pending, ready)))
        pending = [part for part, done in zip(pending, ready, strict=True) if not done]
        time.sleep(pause if pending else 0)
        pause = min(2 * pause, 2e-3)


def _same(rows):
    return rows


def padded(words) -> np.ndarray:
    """Up to ``WORDS`` numbers of 32 bits, zeros behind them."""
    words = np.asarray(words, np.uint32)
    return np.pad(words, (0, WORDS - len(words)))


def barrier(peers: Peers) -> None:
    """Wait until every process is here."""
    peers.gather(np.zeros(1, np.uint32))


def agree(peers: Peers, **values) -> None:
    """Refuse processes that were told different things.

    Raises:
        ValueError: that names what differs.
    """
    hashes = [hashlib.sha256(json.dumps(value).encode()) for value in values.values()]
    words = [np.frombuffer(each.digest()[:12], np.uint32) for each in hashes]
    told = peers.gather(np.concatenate(words))
    for i, name in enumerate(values):
        if (told != told[0])[:, 3 * i : 3 * i + 3].any():
            raise ValueError(
                f"All processes of a run need the same `{name}`, but it differs among "
                f"them. {_ADVICE.get(name, 'Pass one value everywhere.')}"
            )


def together(
    peers: Peers, what: str, work: Callable[[], Sequence[int] | np.ndarray]
) -> np.ndarray:
    """Do what each process has to do; all succeed, or all raise.

    Returns:
        What the work of each process gave, up to ``WORDS - 1`` numbers of 32 bits.
    """
    error, words = None, ()
    try:
        words = work()
    except Exception as caught:
        error = caught
    told = peers.gather(np.array([error is None, *words], np.uint32))
    if error is not None:
        raise error
    if not told[:, 0].all():
        rank = int(np.argmin(told[:, 0]))
        raise OSError(
            f"Process {rank} of {peers.size} could not {what}, so that the others "
            "stop as well. Its own message says why."
        )
    return told[:, 1:]


@contextlib.contextmanager
def watched(where: Callable[[], str]):
    """Say in one sentence that a process is gone; ``where`` tells what is left."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not is_lost(error):
            raise
        raise PeerLostError(
            "Another process of this run is gone or unreachable (or came more than "
            f"30 s late to the first exchange). {where()} Start all processes again "
            'with `resume="auto"`, or let `dbojax launch --restarts 3` do it.'
        ) from error


def is_lost(error: BaseException) -> bool:
    """Whether an error of a compiled program means that a process is gone."""
    return bool(_LOST.search(str(error)))
