"""Which process keeps which piece of an array, and how pieces become arrays again."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees
from dbojax.base import Tree
from dbojax.runner.peers import Peers, peers_of

Box = tuple[tuple[int, int], ...]  # start and stop on each axis
_BLOCK = 1 << 14  # words that are hashed at a time


class Piece(NamedTuple):
    """A box of one array, and the rank of the process that keeps it."""

    box: Box
    rank: int


def named(tree: Tree) -> list[tuple[str, Any]]:
    """All leaves, each under a name such as ``state.x``."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [("state" + jax.tree_util.keystr(path), leaf) for path, leaf in pairs]


def form(leaf) -> tuple[str, list[int]]:
    """The dtype by name, and the shape."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return str(leaf.dtype), list(leaf.shape)


def numbers(leaf) -> jax.Array | np.ndarray:
    """The numbers behind a leaf, placed as it is.

    Raises:
        ValueError: if there are none.
    """
    if trees.is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.hasobject:
        raise ValueError(
            f"A checkpoint holds arrays of numbers, got {leaf!r}. Take it out of the "
            "tree, or put it into `meta`."
        )
    return array


def bits(array) -> np.ndarray:
    """An array on the host, in a dtype that NumPy knows; the same bits."""
    array = np.asarray(array)
    native = array.dtype.isbuiltin == 1
    return array if native else array.view(f"u{array.dtype.itemsize}")


def pieces(array: jax.Array | np.ndarray, peers: Peers) -> list[Piece]:
    """Boxes that fill an array, each once, whatever copies there are."""
    shape = np.shape(array)
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return [Piece(tuple((0, size) for size in shape), 0)]
    owners: dict[Box, int] = {}
    for device, index in array.sharding.devices_indices_map(shape).items():
        owners.setdefault(_box(index, shape), peers.rank_of(device))
    return list(itertools.starmap(Piece, owners.items()))


def kept(array: jax.Array | np.ndarray, peers: Peers) -> Iterator[tuple[Box, Any]]:
    """The pieces that this process keeps, and their values."""
    mine = [piece.box for piece in pieces(array, peers) if piece.rank == peers.rank]
    shape = np.shape(array)
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        held = {box: array for box in mine}
    else:
        held = {_box(s.index, shape): s.data for s in array.addressable_shards}
    return ((box, held[box]) for box in mine)


def _box(index: Sequence[slice], shape: Sequence[int]) -> Box:
    return tuple(
        part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )


def slices(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(start, stop) for start, stop in box)


def joined(
    box: Box, parts: Sequence[Box], read: Callable[[int], np.ndarray]
) -> np.ndarray:
    """What a box holds, from those of the parts that meet it."""
    if box in parts:
        return read(parts.index(box))
    sides, whole = [stop - start for start, stop in box], None
    for number, part in enumerate(parts):
        both = zip(box, part, strict=True)
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in both]
        if all(start < stop for start, stop in common):
            found = read(number)
            whole = np.empty(sides, found.dtype) if whole is None else whole
            whole[_within(common, box)] = found[_within(common, part)]
    assert whole is not None, "parts fill the array, and boxes are not empty"
    return whole


def _within(common, box: Box) -> tuple[slice, ...]:
    pairs = zip(common, box, strict=True)
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in pairs)


def build(like, read: Callable[[Box], np.ndarray]) -> jax.Array:
    """A leaf placed like ``like``, of which no device gets more than its share."""
    pattern = numbers(like)
    shape, dtype = np.shape(pattern), pattern.dtype

    def values(index):
        box = _box(index, shape)
        sides = [stop - start for start, stop in box]
        return read(box).view(dtype) if all(sides) else np.zeros(sides, dtype)

    if isinstance(pattern, jax.Array) and pattern.committed:
        array = jax.make_array_from_callback(shape, pattern.sharding, values)
    else:
        array = jnp.array(values((slice(None),) * len(shape)))
    if trees.is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return array


def digest(tree: Tree, peers: Peers | None = None) -> str:
    r"""Tell trees apart: by names, dtypes, shapes and bits, not by placement.

    With the words :math:`w_j` of 32 bits of all leaves, each at its place in the whole
    array,

    .. math:: D = \sum_j r_j w_j \bmod 2^{64}

    for two sequences of odd pseudorandom :math:`r_j`. Sums of integers do not depend on
    the order, so each process sums over what it keeps, and 16 bytes of each cross the
    network. A changed word changes D for certain; two trees agree by chance with a
    probability of about :math:`2^{-64}` or less. It recognises a run, and is no
    cryptographic hash.

    Examples:
        >>> mesh = jax.make_mesh((2,), ("a",))
        >>> rows = jax.NamedSharding(mesh, jax.P("a"))
        >>> x = jnp.arange(6.0).reshape(2, 3)
        >>> digest(x) == digest(jax.device_put(x, rows)), digest(x) == digest(-x)
        (True, False)
    """
    peers = peers_of(tree) if peers is None else peers
    pairs = named(tree)
    table = [[name, *form(leaf)] for name, leaf in pairs]
    total = np.zeros(2, np.uint64)
    for row, (_, leaf) in zip(table, pairs, strict=True):
        seed = hashlib.sha256(json.dumps(row).encode()).digest()[:8]
        salt = np.frombuffer(seed, np.uint64)
        array = numbers(leaf)
        for box, values in kept(array, peers):
            total += _sum(bits(values), box, np.shape(array), salt)
    if peers.size > 1:
        told = peers.gather(total.view(np.uint32))[:, : 2 * len(total)]
        total = np.ascontiguousarray(told).view(np.uint64).sum(0, dtype=np.uint64)
    text = json.dumps([table, total.tolist()])
    return hashlib.sha256(text.encode()).hexdigest()


def _sum(values: np.ndarray, box: Box, shape, salt) -> np.ndarray:
    flat = np.ascontiguousarray(values).reshape(-1)
    width = max(1, flat.dtype.itemsize // 4)
    words = flat.view(f"u{min(4, flat.dtype.itemsize)}")
    total = np.zeros(2, np.uint64)
    for start in range(0, len(words), _BLOCK):
        part = words[start : start + _BLOCK].astype(np.uint64)
        places = _places(np.arange(start, start + len(part)), width, box, shape)
        for lane, factors in enumerate(_factors(places.astype(np.uint64), salt)):
            total[lane : lane + 1] += np.dot(factors, part)
    return total


def _places(local: np.ndarray, width: int, box: Box, shape) -> np.ndarray:
    """Positions in the whole array, of words in a box of it."""
    box, shape = (*box, (0, width)), (*shape, width)
    sides = [stop - start for start, stop in box]
    if sides[1:] == list(shape[1:]):
        return local + box[0][0] * math.prod(sides[1:])
    full = np.zeros(len(local), np.int64)
    where = np.unravel_index(local, sides)
    for coordinate, (start, _), size in zip(where, box, shape, strict=True):
        full = full * size + coordinate + start
    return full


def _factors(z: np.ndarray, salt: np.ndarray) -> Iterator[np.ndarray]:
    # The finaliser of splitmix64 (Steele, Lea and Flood, 2014), made odd; a second
    # round of it for the second sum.
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += salt
    for _ in range(2):
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        z |= np.uint64(1)
        yield z
