"""Where the directions of one estimate are pushed: on one device, or on many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dbojax.base import Tree
from dbojax.hypergradients.tangents import Combined, Swept

# (first, count, args) -> what the directions first .. first + count - 1 gave
Part = Callable[[Any, int, Tree], Swept]
# (w, args) -> the sum of all directions, weighted
Recombine = Callable[[jax.Array, Tree], Combined]


class Over(NamedTuple):
    """Where the directions of one estimate are pushed."""

    devices: int
    run: Callable[[int, Part, Recombine, Tree], Swept]  # (directions, ...) -> all


def spread(mesh: jax.sharding.Mesh, axis: str, scalars: bool = True) -> Over:
    """Split the directions over the devices along one axis of a mesh.

    Each device pushes a range of its own. With ``scalars`` only the coefficients are
    exchanged, 4 bytes a direction in float32, and every device draws all directions
    again from the key and adds them up in the order of a single device. Without, one
    vector of the size of x is reduced.

    Args:
        mesh: of devices.
        axis: name of the axis.
        scalars: what is exchanged.

    Returns:
        A value for ``over`` of :func:`forward_gradient`.

    Raises:
        ValueError: if the mesh has no such axis.

    Examples:
        >>> mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> spread(mesh, "d").devices
        4
    """
    if axis not in mesh.shape:
        raise ValueError(
            f"`spread` needs the name of one of the mesh's axes, "
            f"{tuple(mesh.shape)}; got {axis!r}."
        )
    devices = mesh.shape[axis]

    def everywhere(directions, part, recombine, args):
        own = directions // devices

        def one_device(args):
            swept = part(jax.lax.axis_index(axis) * own, own, args)
            w = jax.lax.all_gather(swept.coefficients, axis, tiled=True)
            if scalars:
                total, squares = recombine(w, args)
            else:
                total = jax.lax.psum(swept.total, axis)
                squares = jax.lax.all_gather(swept.squares, axis, tiled=True)
            return Swept(w, total, squares, swept.value, swept.aux)

        everything = jax.P()
        # Values that agree on all devices are told from others by no type here.
        return jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=everything,
            out_specs=everything,
            check_vma=False,
        )(args)

    return Over(devices, everywhere)


here = Over(1, lambda directions, part, recombine, args: part(0, directions, args))
