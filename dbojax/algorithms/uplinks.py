"""How the clients' updates reach the server: sums over who takes part, and bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import submodels, trees
from dbojax.base import Channel, Compressor, Participation, State, Tree
from dbojax.submodels import Drawn, Fleet


class Uplink(NamedTuple):
    """One exchange with the server, whatever the clients hold."""

    init: Callable[[Tree], State]  # one whole variable -> memory
    # (key, labels, drawn, moves, like, state) -> (sum, state, bytes of each level's
    # clients); ``moves`` are (s, ...) per level, on the units that each client holds.
    total: Callable[..., tuple[Tree, State, list[int]]]


def uplink_of(part: Compressor | Channel | None, fleet: Fleet) -> Uplink:
    """Make an uplink of what a user gives as one."""
    if part is None or isinstance(part, Compressor):
        return _own_units(part, fleet.layout.units)
    example = "dbo.channels.ef21(dbo.mixing.averaging(n), compressor)"
    trees.check_type(part, Channel, "uplink", f"dbo.compressors.qsgd(7)` or `{example}")
    if not part.averages:
        raise ValueError(
            "`uplink` must give the server one mean, as server channels do, e.g. "
            f"`{example}`; this channel works between neighbours."
        )
    return _whole_rows(part, fleet)


def _own_units(compressor: Compressor | None, units) -> Uplink:
    """Messages as long as what a client holds; nobody remembers."""

    def sent(key, move):
        assert compressor is not None
        payload, _ = compressor.compress(key, move, compressor.init(move))
        return compressor.decompress(payload, move), payload

    def total(key, labels, drawn, moves, like, state):
        sizes, heard = [], []
        for part, move in zip(drawn, moves, strict=True):
            payload = move
            if compressor is not None:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, part.clients)
                move, payload = jax.vmap(sent)(keys, move)
            heard.append(move)
            sizes.append(trees.nbytes(trees.one_node(payload)))
        zeros = jax.tree.map(jnp.zeros_like, like)
        return summed(labels, units, drawn, heard, zeros), state, sizes

    return Uplink(lambda whole: (), total)


def _whole_rows(channel: Channel, fleet: Fleet) -> Uplink:
    """Whole variables of all clients through a channel, zero where nothing is held."""
    n, units = fleet.clients, fleet.layout.units
    present = sum(level.participants for level in fleet.levels)

    def init(whole):
        zeros = jax.tree.map(jnp.zeros_like, whole)
        memory = channel.init(trees.replicate(zeros, n))
        if present < n and jax.tree.leaves(memory):
            raise ValueError(
                f"This `uplink` remembers what clients sent, but only {present} of {n} "
                "take part in a round: what it remembers of the others would count as "
                "theirs who hold an entry now. Let all take part, or use a channel "
                "without memory, `dbo.channels.server(mix, compressor)`, or the "
                "compressor by itself."
            )
        return memory

    def total(key, labels, drawn, moves, like, state):
        rows = trees.replicate(jax.tree.map(jnp.zeros_like, like), n)
        taking = jnp.zeros(n, bool)
        for part, move in zip(drawn, moves, strict=True):
            back = jax.vmap(lambda own, kept: submodels.put(labels, units, own, kept))(
                move, part.kept
            )
            rows = jax.tree.map(
                lambda a, b, at=part.clients: a.at[at].set(b), rows, back
            )
            taking = taking.at[part.clients].set(True)
        mask = None if present == n else Participation(taking, present)
        held, state, traffic = channel.send(key, rows, state, mask)
        mean = jax.tree.map(lambda leaf: leaf[0], held)
        total = jax.tree.map(lambda leaf: trees.times(present, leaf), mean)
        return total, state, [traffic.message] * len(drawn)

    return Uplink(init, total)


def summed(labels, units, drawn: tuple[Drawn, ...], moves, total: Tree) -> Tree:
    """``total`` plus the updates of all clients, one put back at a time."""

    def add(total, one):
        kept, move = one
        back = submodels.put(labels, units, move, kept)
        return jax.tree.map(jnp.add, total, back), None

    for part, move in zip(drawn, moves, strict=True):
        total, _ = jax.lax.scan(add, total, (part.kept, move))
    return total


def part_bytes(fleet: Fleet, labels: Tree, whole: Tree) -> list[int]:
    """Bytes of what a client of each level holds of a variable, from shapes alone."""

    def cut(kept, whole):
        return submodels.take(labels, fleet.layout.units, whole, kept)

    def of(level):
        kept = {
            name: jax.ShapeDtypeStruct((k,), jnp.int32)
            for name, k in level.kept.items()
        }
        return trees.nbytes(jax.eval_shape(cut, kept, whole))

    return list(map(of, fleet.levels))
