"""Rows that travel between devices: payloads as they are, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees
from dbojax.base import Tree
from dbojax.devices.meshes import AXIS, check_divides
from dbojax.devices.routes import Route, route

_NODES = jax.P(AXIS)


class Moves(NamedTuple):
    """A fixed gather over nodes that are spread over a mesh."""

    # f(buffer, positions, *rows) on one device -> f(tree, *stacked) on all of them,
    # where the buffer holds the rows that the device has and those that it asked for,
    # and ``rows`` are what else it needs of its own nodes.
    with_heard: Callable[[Callable], Callable]
    route: Route


def moves(index: np.ndarray, n: int, mesh: jax.sharding.Mesh) -> Moves:
    """Bring ``rows[index]`` together, ``index`` a table ``(n, ...)`` of node numbers.

    Only rows that another device asks for travel, each to each device once, as the
    arrays that they are: by ``ppermute`` in rounds of partial permutations, or by
    ``all_gather`` where all devices ask for all rows.
    """
    check_divides(mesh, n)
    plan = route(index, n, mesh.shape[AXIS])
    # Along a further axis the leaves of one node may be spread: no piece is whole.
    travel = _in_one if mesh.axis_names == (AXIS,) else _by_leaf
    sends = [step.rows for step in plan.rounds]

    def arriving(tree, sends):
        for step, rows in zip(plan.rounds, sends, strict=True):
            chosen = jax.tree.map(lambda leaf, rows=rows: leaf[rows[0]], tree)
            permute = functools.partial(
                jax.lax.ppermute, axis_name=AXIS, perm=step.pairs
            )
            yield _linear(permute, travel, chosen)

    def buffer(tree, sends):
        if plan.gathers:
            gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
            return _linear(gather, travel, tree)
        parts = tree, *arriving(tree, sends)
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def with_heard(f):
        def local(tree, positions, sends, *rows):
            return f(buffer(tree, sends), positions, *rows)

        lifted = over_nodes(local, mesh)
        return lambda tree, *rows: lifted(tree, plan.positions, sends, *rows)

    return Moves(with_heard, plan)


def over_nodes(f: Callable, mesh: jax.sharding.Mesh, to=_NODES) -> Callable:
    """``f`` on a device's blocks -> ``f`` on global arrays, nodes first.

    ``to`` tells where results are, by default with the nodes. Further axes of the mesh
    stay with the compiler.
    """
    return jax.shard_map(
        f,
        mesh=mesh,
        in_specs=_NODES,
        out_specs=to,
        axis_names={AXIS},
        check_vma=False,
    )


def lift(mesh: jax.sharding.Mesh) -> Callable[[Callable], Callable]:
    """``f`` on one node -> ``f`` on all nodes, each device at work on its own."""
    # A compiler may bring all rows together first, e.g. for convolutions with kernels
    # of their own.
    return lambda f: over_nodes(jax.vmap(f), mesh)


def _linear(send: Callable, travel: Callable, tree: Tree) -> Tree:
    """Let a tree travel as bits, and what is differentiated of it as numbers."""

    @jax.custom_jvp
    def moved(tree):
        return travel(send, tree)

    @moved.defjvp
    def _(primals, tangents):
        arrived = moved(*primals)

        def follow(tangent, like):
            if tangent.dtype == jax.dtypes.float0:
                return np.zeros(like.shape, jax.dtypes.float0)
            return send(tangent)

        return arrived, jax.tree.map(follow, *tangents, arrived)

    return moved(tree)


def _by_leaf(send: Callable, tree: Tree) -> Tree:
    """Send each leaf by itself, as bits: some back ends widen short floats."""
    return jax.tree.map(lambda leaf: _values(send(_bits(leaf)), leaf), tree)


def _in_one(send: Callable, tree: Tree) -> Tree:
    """Send all leaves in one piece: a message pays its latency once."""
    leaves, structure = jax.tree.flatten(tree)
    if len(leaves) < 2:
        return _by_leaf(send, tree)
    words = list(map(_bits, leaves))
    unit = min((word.dtype for word in words), key=lambda dtype: dtype.itemsize)
    cut = [jax.lax.bitcast_convert_type(word, unit) for word in words]
    flat = [word.reshape(len(word), -1) for word in cut]
    sent = send(jnp.concatenate(flat, axis=1))
    parts = jnp.split(sent, np.cumsum([part.shape[1] for part in flat])[:-1], axis=1)

    def joined(part, cut, word, leaf):
        part = part.reshape(len(part), *cut.shape[1:])
        return _values(jax.lax.bitcast_convert_type(part, word.dtype), leaf)

    arrived = map(joined, parts, cut, words, leaves)
    return jax.tree.unflatten(structure, arrived)


def _bits(leaf):
    """A leaf as unsigned integers of the same width."""
    if trees.is_key(leaf):
        return jax.random.key_data(leaf)
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint8)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(leaf, unsigned)


def _values(words, like):
    """Undo :func:`_bits`."""
    if trees.is_key(like):
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(like))
    if like.dtype == bool:
        return words.astype(bool)
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        part = jax.lax.bitcast_convert_type(words, like.real.dtype)
        return jax.lax.complex(part[..., 0], part[..., 1])
    return jax.lax.bitcast_convert_type(words, like.dtype)
