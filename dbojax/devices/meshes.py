"""Where nodes live: a mesh of devices, and arrays placed on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dbojax import trees
from dbojax.base import Algorithm, Rounds, State, Tree

AXIS = "nodes"
PROCESSES = "DBOJAX_PROCESSES"  # how many `dbojax launch` has started
_ALIGNED = 64  # bytes


def mesh(
    n: int, *, devices: Sequence[Any] | None = None, **axes: int
) -> jax.sharding.Mesh:
    """A mesh whose axis ``"nodes"`` shares ``n`` nodes out in equal blocks.

    Args:
        n: number of nodes; device ``d`` of ``D`` along the axis holds the nodes from
            ``d n / D`` on.
        devices: which ones; by default all, of all processes.
        axes: further axes by name and length, e.g. ``model=2``, along which leaves of
            one node may be spread.

    Returns:
        A mesh of as many devices as share ``n`` nodes out without a rest. In one
        process the others stay idle.

    Raises:
        ValueError: if ``n`` or an axis is not a positive integer, there are too few
            devices, or devices of several processes do not share ``n`` nodes out.
        RuntimeError: in a process of ``dbojax launch`` without
            ``dbo.devices.start``: each would go its own way.

    Examples:
        >>> dict(mesh(16).shape), dict(mesh(6).shape), dict(mesh(2, model=4).shape)
        ({'nodes': 8}, {'nodes': 6}, {'nodes': 2, 'model': 4})
    """
    if int(os.environ.get(PROCESSES) or 1) > 1 == jax.process_count():
        raise RuntimeError(
            "`dbojax launch` started this script as one of several processes, but it "
            "has not joined the others. Call `dbo.devices.start()` first in it."
        )
    trees.check_count(n, "mesh", "nodes")
    for name, length in axes.items():
        trees.check_count(length, "mesh", f"devices along {name!r}")
    found = list(jax.devices() if devices is None else devices)
    others = int(np.prod([*axes.values()], dtype=int))
    if AXIS in axes or not len(found) // others:
        raise ValueError(
            f"`mesh` shares {len(found)} devices out over 'nodes' and further axes "
            f"{axes}; give these other names, and at most that many devices in all."
        )
    length = max(k for k in range(1, 1 + len(found) // others) if n % k == 0)
    several = len({device.process_index for device in found}) > 1
    if several and length * others != len(found):
        raise ValueError(
            f"{len(found)} devices of several processes do not share {n} nodes out "
            f"evenly over {dict(axes) or 'one axis'}, and none may stay idle. Use a "
            f"multiple of {len(found) // others} nodes, or other processes."
        )
    kind = jax.sharding.AxisType.Auto
    return jax.make_mesh(
        (length, *axes.values()),
        (AXIS, *axes),
        axis_types=(kind,) * (1 + len(axes)),
        devices=found[: length * others],
    )


def place(
    tree: Tree, mesh: jax.sharding.Mesh, n: int | None = None, axis: int = 0
) -> Tree:
    """Put stacked arrays on a mesh: node ``i`` goes where the mesh has it.

    Args:
        tree: a state, or a batch. The inner samples of a ``Rounds`` have their nodes
            on axis 1.
        mesh: from :func:`mesh`.
        n: number of nodes; by default the length of the axis in the first array. Leaves
            with another length, or no such axis, are the same for all nodes, and every
            device gets them whole.
        axis: which one counts the nodes; 1 where runs of a sweep are in front.

    Returns:
        The tree with global arrays. Leaves that are on this mesh already, e.g. spread
        along a second axis of it, stay as they are.

    Raises:
        ValueError: if the mesh has no axis ``"nodes"``, or it does not divide ``n``.

    Examples:
        >>> mesh = dbo.devices.mesh(4)
        >>> held = place({"x": jnp.ones((4, 3)), "step": jnp.zeros(())}, mesh)
        >>> held["x"].sharding.spec, held["step"].sharding.is_fully_replicated
        (P('nodes',), True)
    """
    if isinstance(tree, Rounds):
        count = _count(tree.outer, n, axis)
        outer, inner = (
            place(part, mesh, count, axis + k) for k, part in enumerate(tree)
        )
        return Rounds(outer, inner)
    count = _count(tree, n, axis)
    check_divides(mesh, count)
    return jax.tree.map(lambda leaf: _put(leaf, mesh, count, axis), tree)


def init(
    method: Algorithm, x: Tree, y: Tree, mesh: jax.sharding.Mesh, n: int | None = None
) -> State:
    """Start an algorithm on a mesh, where no device ever holds all nodes.

    Args:
        method: the algorithm.
        x: upper variables; of one node, from which all start, if ``n`` is given,
            otherwise stacked.
        y: likewise, lower variables.
        mesh: from :func:`mesh`.
        n: number of nodes.

    Returns:
        The state of ``method.init``, placed as by :func:`place`.

    Raises:
        ValueError: as from :func:`place` and ``method.init``.

    Examples:
        >>> task = dbo.tasks.quadratic(n=4)
        >>> mesh, mean = dbo.devices.mesh(4), dbo.mixing.averaging(4)
        >>> method = dbo.algorithms.soba(
        ...     task.problem,
        ...     mix=dbo.devices.spread(mean, mesh),
        ...     upper_step=0.1,
        ...     lower_step=0.1,
        ... )
        >>> state = init(method, task.x0, task.y0, mesh, n=4)
        >>> state.x.shape[0], len(state.x.sharding.device_set)
        (4, 4)
    """

    def start(x, y):
        if n is not None:
            x, y = trees.replicate((x, y), n)
        return method.init(x, y)

    shapes = jax.eval_shape(start, x, y)
    count = _count(x, n)
    check_divides(mesh, count)

    def placed(leaf):
        return jax.NamedSharding(mesh, _spec(leaf, count))

    return jax.jit(start, out_shardings=jax.tree.map(placed, shapes))(x, y)


def load(read: Callable[[int], Tree], n: int, mesh: jax.sharding.Mesh) -> Tree:
    """Read every node's data where the node lives, and nowhere else.

    Args:
        read: the data of one node, as a tree of NumPy arrays of the same shapes for
            all nodes; called by each process for its own nodes alone.
        n: number of nodes.
        mesh: from :func:`mesh`.

    Returns:
        Stacked global arrays, ``(n, ...)``, of which each device holds its nodes'.

    Raises:
        ValueError: if the mesh does not share ``n`` nodes out, or nodes differ in the
            shapes or dtypes of their data.

    Examples:
        >>> mesh = dbo.devices.mesh(4)
        >>> load(lambda node: np.full(2, node), 4, mesh)[:, 0].tolist()
        [0, 1, 2, 3]
    """
    check_divides(mesh, n)
    sharding = nodes_first(mesh)
    # Devices along a second axis hold the same nodes: read once.
    held: dict[range, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map((n,)).items():
        if index:
            held.setdefault(range(n)[index[0]], []).append(device)
    read, parts = _checked(read, min(map(min, held))), []
    for block in sorted(held, key=min):
        rows = _stacked(read, block)
        parts += [jax.device_put(rows, device) for device in held[block]]

    def assembled(*parts):
        shape = (n, *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return jax.tree.map(assembled, *parts)


def _checked(read: Callable[[int], Tree], first: int) -> Callable[[int], Tree]:
    """Read NumPy arrays, and refuse a node that is unlike the first."""

    def form(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    forms = []

    def checked(node):
        tree = jax.tree.map(np.asarray, read(node))
        forms[1:] = [jax.tree.map(form, tree)]
        trees.check_like(forms[-1], forms[0], f"read({node})", f"read({first})")
        return tree

    return checked


def _stacked(read: Callable[[int], Tree], block: range) -> Tree:
    """The data of a block of nodes, of which only one node's is there twice."""
    rows = None
    for place, node in enumerate(block):
        rows = _filled(rows, read(node), place, len(block))
    return rows


def _filled(rows: Tree | None, tree: Tree, place: int, length: int) -> Tree:
    if rows is None:
        rows = jax.tree.map(lambda leaf: _empty(length, leaf), tree)
    pairs = zip(jax.tree.leaves(rows), jax.tree.leaves(tree), strict=True)
    for stack, leaf in pairs:
        stack[place] = leaf
    return rows


def _empty(length: int, like: np.ndarray) -> np.ndarray:
    """A stack that starts where CPUs use it as it is, and do not copy it."""
    dtype = jax.dtypes.canonicalize_dtype(like.dtype)
    size = length * like.size * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(length, *like.shape)


def nodes_first(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Placement of a stacked array: its first axis along the mesh's nodes."""
    return jax.NamedSharding(mesh, jax.P(AXIS))


def check_divides(mesh: jax.sharding.Mesh, n: int) -> int:
    """How many nodes a device holds, or say why ``n`` cannot be shared out."""
    trees.check_type(mesh, jax.sharding.Mesh, "mesh", "dbo.devices.mesh(n)")
    length = mesh.shape.get(AXIS)
    if length is None or n % length:
        raise ValueError(
            f"{n} nodes need a mesh with an axis {AXIS!r} whose length divides {n}; "
            f"got {dict(mesh.shape)}. Make one with `dbo.devices.mesh(n)`; if {n} is "
            "not the number of nodes, since the first array is the same for all of "
            "them, write `place(tree, mesh, n)`."
        )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds[AXIS] != jax.sharding.AxisType.Auto:
        raise ValueError(
            f"The axis {AXIS!r} must be of type Auto, got {kinds[AXIS]}. Make the mesh "
            "with `dbo.devices.mesh(n)`, or pass `axis_types` to `jax.make_mesh`."
        )
    return n // length


def _count(tree, n, axis=0):
    if n is not None:
        return n
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
    lengths = [shape[axis] for shape in shapes if len(shape) > axis]
    if not lengths:
        raise ValueError(
            f"The number of nodes is the length of axis {axis} of the first array that "
            "has one, but here is none. Write `place(tree, mesh, n)`."
        )
    return lengths[0]


def _put(leaf, mesh, n, axis=0):
    spec = _spec(leaf, n, axis)
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, jax.NamedSharding):
        before = leaf.sharding
        if before.mesh == mesh and before.spec[: len(spec)] == tuple(spec):
            return leaf
    # An array of NumPy could otherwise be used as it is, and change later.
    leaf = np.array(leaf, copy=True) if isinstance(leaf, np.ndarray) else leaf
    sharding = jax.NamedSharding(mesh, spec)
    if trees.is_key(leaf) and not sharding.is_fully_addressable:
        # What JAX hands to other processes must be numbers.
        data = jax.device_put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(leaf, sharding)


def _spec(leaf, n, axis=0):
    stacked = np.ndim(leaf) > axis and np.shape(leaf)[axis] == n
    return jax.P(*(None,) * axis, AXIS) if stacked else jax.P()
