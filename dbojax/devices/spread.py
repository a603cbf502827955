"""Mixes and networks for nodes on many devices: the same laws, fewer bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees
from dbojax.base import Mix, Network, Tree
from dbojax.devices.meshes import AXIS
from dbojax.devices.moves import lift, moves, over_nodes

Part = TypeVar("Part", Mix, Network)


def spread(part: Part, mesh: jax.sharding.Mesh) -> Part:
    r"""The same mix, or network, for nodes that are spread over a mesh.

    .. math:: v_i \leftarrow \sum_j w_{ij} v_j

    Nodes on the same device share its memory. What another device asks for travels as
    what it is, a payload or a value: each message once to each device, by ``ppermute``
    in rounds of partial permutations, or by ``all_gather`` where all devices ask for
    all. A mean over all nodes takes the payloads of all to all devices, or, where that
    costs fewer bytes, adds decoded values up by an all-reduce.

    Channels and algorithms do not change. Those of neighbours then keep copies of what
    they heard in place of one running sum, as nodes that cannot see each other must,
    ``(n, K, ...)`` on a graph of K - 1 neighbours.

    Args:
        part: from ``dbo.mixing`` or ``dbo.networks``, with concrete weights.
        mesh: from ``dbo.devices.mesh(n)``; on one device it works as well.

    Returns:
        A part of the same kind, for stacked arrays that ``dbo.devices.place`` has put
        on the mesh, in one program that ``jax.jit`` compiles for all devices.

    Raises:
        ValueError: if the mesh does not share the nodes out, or a mix was spread.
        TypeError: if ``part`` is another kind of thing.

    Examples:
        >>> w = dbo.topology.metropolis(dbo.topology.ring(8))
        >>> mix = dbo.mixing.mixer(w)
        >>> mesh = dbo.devices.mesh(8)
        >>> v = dbo.devices.place(jnp.arange(8.0), mesh)
        >>> near = jax.jit(dbo.devices.spread(mix, mesh).apply)(v)
        >>> bool(jnp.allclose(near, w @ np.arange(8.0)))
        True
    """
    if isinstance(part, Network):
        return _network(part, mesh)
    example = "dbo.mixing.mixer(w)"
    trees.check_type(part, Mix, "spread(part)", example)
    return (_mean if part.averages else _mix)(part, mesh)


def crossings(part: Mix | Network, mesh: jax.sharding.Mesh) -> int:
    """Messages of one exchange that cross from device to device.

    The meter counts a message for each directed link. Links within a device cost
    nothing, and a message to several nodes of another device crosses once.

    Args:
        part: a mix, not spread yet, or a network; in the turn in which most cross.
        mesh: from ``dbo.devices.mesh(n)``.

    Returns:
        How many rows travel; each weighs ``Traffic.message`` bytes. A channel that
        sends another message over each link (``changing_reference_point``) shares none:
        there every link that leaves its device counts.

    Raises:
        ValueError: if the mesh does not share the nodes out, or a mix was spread.

    Examples:
        >>> mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(8)))
        >>> mix.links, dbo.devices.crossings(mix, dbo.devices.mesh(8))
        (16, 16)
        >>> two = dbo.devices.mesh(8, devices=jax.devices()[:2])
        >>> dbo.devices.crossings(mix, two)
        4
    """
    tables = _tables(part)
    return max(moves(table, len(table), mesh).route.messages for table in tables)


def _tables(part) -> list[np.ndarray]:
    """Who is in the slots of each node, (n, K), turn by turn; not heard is oneself."""
    if isinstance(part, Network):
        own = np.arange(len(part.nodes))[:, None]
        table = part.nodes[:, : part.heard]
        return [np.where(up[:, : part.heard], table, own) for up in part.turns]
    if not part.local:
        raise ValueError(
            "This mix is for several devices already. Pass the one that `dbo.mixing` "
            "made, before `spread`."
        )
    return [np.asarray(part.heard)]


def _in_turn(steps, functions, *arguments):
    """The function whose turn it is."""
    if len(functions) == 1:
        return functions[0](*arguments)
    return jax.lax.switch(steps % len(functions), functions, *arguments)


def _total(table, mesh) -> Callable:
    """``total(v, weights, apart, decode)`` over the slots of a table."""
    n = len(table)
    with_own = np.concatenate([np.arange(n)[:, None], table], axis=1)
    with_heard = moves(with_own, n, mesh).with_heard

    def total(v, weights, apart=False, decode=None):
        trees.check_nodes(v, n, "v")

        def local(rows, positions, weights):
            own, heard = positions[:, 0], positions[:, 1:]

            def one(leaf):
                # Sums of short floats, with short weights, would move equal values.
                wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
                less = wide[own] if apart else None
                mixed = trees.gathered(wide, heard, weights, less=less)
                return mixed.astype(leaf.dtype)

            return jax.tree.map(one, _decoded(rows, decode))

        return with_heard(local)(v, weights)

    return total


def _decoded(v, decode):
    return v if decode is None else jax.vmap(decode)(v)


def _rows(rows, positions):
    return jax.tree.map(lambda leaf: leaf[positions], rows)


def _mix(mix: Mix, mesh) -> Mix:
    (table,) = _tables(mix)
    total, weights = _total(table, mesh), np.asarray(mix.weights)

    def apply(v: Tree, decode=None) -> Tree:
        return total(v, weights, decode=decode)

    def flow(v: Tree, decode=None) -> Tree:
        return total(v, weights, apart=True, decode=decode)

    return _sending(mix, table, mesh, apply, flow)


def _sending(mix, table, mesh, apply, flow) -> Mix:
    """A mix whose nodes see of one another what travels."""
    taken = moves(table, len(table), mesh).with_heard(_rows)

    def exchange(payload):
        trees.check_nodes(payload, len(table), "payload")
        return taken(payload)

    return mix._replace(
        apply=apply,
        exchange=exchange,
        flow=flow,
        towards=None,
        lift=lift(mesh),
        local=False,
    )


def _mean(mix: Mix, mesh) -> Mix:
    (table,) = _tables(mix)
    n = len(table)

    def mean_of_all(v, decode):
        return trees.node_mean(_decoded(everyone(v), decode))

    def mean_of_sums(v, decode):
        return summed(_decoded(v, decode))

    def flow_of_all(v, decode):
        heard = _decoded(everyone(v), decode)
        return less(heard, _decoded(v, decode), trees.node_mean)

    def flow_of_sums(v, decode):
        own = _decoded(v, decode)
        return less(own, own, summed)

    def everyone(v):
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, AXIS, tiled=True), v)

    def summed(v):
        def share(leaf):
            return trees.times(len(leaf) / n, trees.node_mean(leaf))

        return jax.lax.psum(jax.tree.map(share, v), AXIS)

    def less(heard, own, mean_of):
        # The mean, then the mean of what is off it: what rounding left of the first.
        mean = mean_of(heard)
        rest = mean_of(jax.tree.map(lambda h, m: h - m[None], heard, mean))
        return jax.tree.map(lambda m, r, o: (m[None] - o) + r[None], mean, rest, own)

    def cheaper(of_all, of_sums, v, decode, to):
        trees.check_nodes(v, n, "v")
        dense = trees.one_node(jax.eval_shape(lambda v: _decoded(v, decode), v))
        # All payloads to all devices, or values there and back in an all-reduce.
        gathers = n * trees.nbytes(trees.one_node(v)) <= 2 * trees.nbytes(dense)
        chosen = functools.partial(of_all if gathers else of_sums, decode=decode)
        return over_nodes(chosen, mesh, to)(v)

    def apply(v: Tree, decode=None) -> Tree:
        mean = cheaper(mean_of_all, mean_of_sums, v, decode, jax.P())
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[None], (n, *leaf.shape)), mean
        )

    def flow(v: Tree, decode=None) -> Tree:
        return cheaper(flow_of_all, flow_of_sums, v, decode, jax.P(AXIS))

    return _sending(mix, table, mesh, apply, flow)


def _network(network: Network, mesh) -> Network:
    totals = [_total(table, mesh) for table in _tables(network)]
    others = network.nodes[:, 1:].astype(int)
    slots = others.shape[1]
    opposite = others * slots + network.reverse[:, 1:] - 1
    own = np.arange(others.size).reshape(others.shape)

    def swapped(links):
        return moves(links, links.size, mesh).with_heard(_rows)

    whole = swapped(opposite)
    swaps = [swapped(np.where(up[:, 1:], opposite, own)) for up in network.turns]

    def weights(key, step):
        # A small table that every device has: drawn by all, for nothing to travel.
        everywhere = jax.NamedSharding(mesh, jax.P())
        drawn = network.weights(key, step)
        return jax.lax.with_sharding_constraint(drawn, everywhere)

    def total(v, weights, step, apart=False, decode=None):
        settings = {"apart": apart, "decode": decode}
        turns = [functools.partial(each, **settings) for each in totals]
        return _in_turn(step, turns, v, weights)

    def swap(tree, step=None):
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
        return whole(flat) if step is None else _in_turn(step, swaps, flat)

    return network._replace(weights=weights, total=total, swap=swap, lift=lift(mesh))
