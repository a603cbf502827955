"""Mixes and networks for nodes on many devices: the same laws, fewer bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees
from dbojax.base import Mix, Network, Tree
from dbojax.devices.meshes import AXIS
from dbojax.devices.moves import lift, moves, over_nodes


@overload
def spread(part: Mix, mesh: jax.sharding.Mesh) -> Mix: ...
@overload
def spread(part: Network, mesh: jax.sharding.Mesh) -> Network: ...


def spread(part, mesh):
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
        part: a mix, not spread yet, or a network.
        mesh: from ``dbo.devices.mesh(n)``.

    Returns:
        How many rows travel; each weighs ``Traffic.message`` bytes.

    Raises:
        ValueError: if the mesh does not share the nodes out, or a mix was spread.

    Examples:
        >>> mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(8)))
        >>> mix.links, dbo.devices.crossings(mix, dbo.devices.mesh(8))
        (16, 16)
        >>> dbo.devices.crossings(mix, jax.make_mesh((2,), ("nodes",)))
        4
    """
    table = _heard(part)
    return moves(table, len(table), mesh).route.messages


def _heard(part) -> np.ndarray:
    """Who is in the slots of each node: (n, K)."""
    if isinstance(part, Network):
        return part.nodes[:, : part.heard]
    if not part.local:
        raise ValueError(
            "This mix is for several devices already. Pass the one that `dbo.mixing` "
            "made, before `spread`."
        )
    n = part.weights.shape[1] if part.averages else part.weights.shape[0]
    return np.asarray(part.exchange(np.arange(n)))


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
                less = leaf[own] if apart else None
                return trees.gathered(leaf, heard, weights, less=less)

            return jax.tree.map(one, rows if decode is None else jax.vmap(decode)(rows))

        return with_heard(local)(v, weights)

    return total


def _mix(mix: Mix, mesh) -> Mix:
    table, weights = _heard(mix), np.asarray(mix.weights)
    total = _total(table, mesh)
    taken = moves(table, len(table), mesh).with_heard(_rows)

    def apply(v: Tree, decode=None) -> Tree:
        return total(v, weights, decode=decode)

    def flow(v: Tree, decode=None) -> Tree:
        return total(v, weights, apart=True, decode=decode)

    return mix._replace(
        apply=apply, exchange=taken, flow=flow, lift=lift(mesh), local=False
    )


def _rows(rows, positions):
    return jax.tree.map(lambda leaf: leaf[positions], rows)


def _mean(mix: Mix, mesh) -> Mix:
    n = mix.weights.shape[1]
    taken = moves(_heard(mix), n, mesh).with_heard(_rows)

    def decoded(v, decode):
        return v if decode is None else jax.vmap(decode)(v)

    def of_all(v, decode):
        everyone = jax.tree.map(
            lambda leaf: jax.lax.all_gather(leaf, AXIS, tiled=True), v
        )
        return trees.node_mean(decoded(everyone, decode))

    def of_sums(v, decode):
        def share(leaf):
            return trees.times(len(leaf) / n, trees.node_mean(leaf))

        shares = jax.tree.map(share, decoded(v, decode))
        return jax.lax.psum(shares, AXIS)

    def mean(v: Tree, decode=None) -> Tree:
        trees.check_nodes(v, n, "v")
        dense = trees.one_node(jax.eval_shape(lambda v: decoded(v, decode), v))
        # All payloads to all devices, or values there and back in an all-reduce.
        gathers = n * trees.nbytes(trees.one_node(v)) <= 2 * trees.nbytes(dense)
        one = functools.partial(of_all if gathers else of_sums, decode=decode)
        return over_nodes(one, mesh, to=jax.P())(v)

    def apply(v: Tree, decode=None) -> Tree:
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[None], (n, *leaf.shape)), mean(v, decode)
        )

    def flow(v: Tree, decode=None) -> Tree:
        # The mean of what is off the mean: what rounding left of the first one.
        apart = jax.tree.map(jnp.subtract, decoded(v, decode), apply(v, decode))
        return jax.tree.map(jnp.subtract, apply(apart), apart)

    return mix._replace(
        apply=apply, exchange=taken, flow=flow, lift=lift(mesh), local=False
    )


def _network(network: Network, mesh) -> Network:
    table = _heard(network)
    others = network.nodes[:, 1:].astype(int)
    links = others * others.shape[1] + network.reverse[:, 1:] - 1
    swapped = moves(links, links.size, mesh).with_heard(_rows)

    def weights(key, step):
        # A small table that every device has: drawn by all, for nothing to travel.
        everywhere = jax.NamedSharding(mesh, jax.P())
        drawn = network.weights(key, step)
        return jax.lax.with_sharding_constraint(drawn, everywhere)

    def swap(tree):
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
        return swapped(flat)

    total = _total(table, mesh)
    return network._replace(weights=weights, total=total, swap=swap, lift=lift(mesh))
