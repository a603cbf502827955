"""Trees of arrays whose first axis counts the nodes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Participation, Tree

FEW = 64  # nodes that a matrix product mixes cheaply, however many hear one another
_UNROLLED = 32  # neighbour slots that are written out; more are scanned in chunks
_CHUNK = 8
_BLOCK = 512  # columns that are mapped at a time, where an array is large
_LARGE = 1 << 19  # entries from which on an array is mapped in blocks
_TALL = 128  # nodes; a block of more is too large for the cache


def num_nodes(tree: Tree, name: str = "tree") -> int:
    """Length of the node axis that all leaves of ``tree`` share.

    Raises:
        ValueError: if there is no leaf, a leaf has no axis, or lengths differ.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    lengths = {shape[0] for shape in shapes if shape}
    if len(lengths) != 1 or () in shapes:
        raise ValueError(
            f"Every leaf of `{name}` needs the node axis first, of one length; got "
            f"shapes {shapes}. Stack one value per node, e.g. with "
            "`dbo.replicate(value, n)`."
        )
    return lengths.pop()


def check_type(value: Any, kind: type, name: str, example: str) -> None:
    """Refuse a part that is not of its contract's type."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be a {kind.__name__}, e.g. `{example}`; got "
            f"{type(value).__name__}."
        )


def check_nodes(tree: Tree, n: int, name: str) -> None:
    """Refuse a stacked tree whose node axis does not count ``n`` nodes."""
    if jax.tree.leaves(tree) and (found := num_nodes(tree, name)) != n:
        raise ValueError(
            f"`{name}` holds {found} nodes on axis 0, but the mixing matrix has {n}. "
            f"Stack one value per node, e.g. `dbo.replicate(value, {n})`."
        )


def check_batch(batch: Tree, n: int, name: str, axis: int = 0) -> None:
    """Refuse a batch that does not count ``n`` nodes on ``axis`` of every leaf."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if any(shape[axis : axis + 1] != (n,) for shape in shapes):
        raise ValueError(
            f"Every leaf of `{name}` needs {n} nodes on axis {axis}, as in the state; "
            f"got shapes {shapes}. Stack one sample set per node, or "
            f"`dbo.replicate(batch, {n})` to give all the same."
        )


def check_floating(tree: Tree, name: str) -> None:
    """Refuse a variable with a leaf that is not real floating point."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(
            f"`{name}` must hold real floating-point arrays; got dtypes "
            f"{[str(dtype) for dtype in dtypes]}. Convert it, e.g. with "
            "`.astype(jnp.float32)`, and keep integers in the batch."
        )


def check_shapes(tree: Tree, like: Tree, name: str, like_name: str) -> None:
    """Refuse a tree whose structure or shapes differ from those of ``like``."""
    got, wanted = jax.tree.structure(tree), jax.tree.structure(like)
    if got != wanted:
        raise ValueError(
            f"`{name}` must have the structure of `{like_name}`, {wanted}; got {got}."
        )
    shapes = [(jnp.shape(a), jnp.shape(b)) for a, b in _pairs(tree, like)]
    if any(a != b for a, b in shapes):
        raise ValueError(
            f"`{name}` must have the shapes of `{like_name}`, "
            f"{[b for _, b in shapes]}; got {[a for a, _ in shapes]}."
        )


def check_like(tree: Tree, like: Tree, name: str, like_name: str) -> None:
    """Refuse a tree whose structure, shapes or dtypes differ from those of ``like``."""
    check_shapes(tree, like, name, like_name)
    dtypes = [(str(a.dtype), str(b.dtype)) for a, b in _pairs(tree, like)]
    if any(a != b for a, b in dtypes):
        raise ValueError(
            f"`{name}` must have the dtypes of `{like_name}`, "
            f"{[b for _, b in dtypes]}; got {[a for a, _ in dtypes]}. Cast it to "
            f"those, or start `{like_name}` in the others."
        )


def _pairs(a: Tree, b: Tree):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def replicate(tree: Tree, n: int) -> Tree:
    """Give each of ``n`` nodes a copy of ``tree``.

    Args:
        tree: the value of one node.
        n: number of nodes.

    Returns:
        A tree whose leaves have the node axis first, ``(n, ...)``.

    Raises:
        ValueError: if ``n`` is not a positive integer.

    Examples:
        >>> replicate({"a": jnp.ones(3)}, 4)["a"].shape
        (4, 3)
    """
    check_count(n, "replicate")
    return jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a)[None], n, axis=0), tree)


def node_mean(tree: Tree) -> Tree:
    r"""Average over the node axis, :math:`\bar v = \frac1n \sum_i v_i`.

    Args:
        tree: stacked values, ``(n, ...)``.

    Returns:
        The mean, without the node axis.

    Examples:
        >>> float(node_mean(jnp.array([1.0, 2.0, 6.0])))
        3.0
    """

    def mean(leaf):
        # A product with a row of 1/n: on CPU a reduction over the first axis of a
        # wide array costs up to 30 times as much.
        row = jnp.full((1, leaf.shape[0]), 1 / leaf.shape[0], leaf.dtype)
        flat = jnp.dot(row, leaf.reshape(leaf.shape[0], -1), precision="highest")
        return flat.reshape(leaf.shape[1:])

    return jax.tree.map(mean, tree)


def consensus_error(tree: Tree) -> jax.Array:
    r"""Disagreement :math:`\|V - \mathbf 1 \bar v^\top\|_F` over all leaves.

    Args:
        tree: stacked values, ``(n, ...)``; an empty tree counts as agreed.

    Returns:
        A scalar, zero (to rounding) if and only if all nodes hold the same value.

    Examples:
        >>> float(consensus_error(jnp.array([[1.0], [3.0]]))) == 2**0.5
        True
    """
    centred = jax.tree.map(lambda a, m: a - m[None], tree, node_mean(tree))
    return norm(centred)


def norm(tree: Tree) -> jax.Array:
    """Euclidean norm over all leaves; zero for an empty tree."""

    def square(leaf):
        # Squares of float16 overflow early, and a GPU may shorten those of float32.
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.vdot(
            leaf, leaf, precision="highest", preferred_element_type=wide
        ).real

    squares = map(square, jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, start=jnp.zeros(())))


def node_keys(key: jax.Array, n: int) -> jax.Array:
    """One key per node, a function of ``(key, node)`` alone: (n,)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def pair_keys(
    key: jax.Array, first: np.ndarray | jax.Array, second: np.ndarray | jax.Array
) -> jax.Array:
    """One key per pair of nodes, a function of ``(key, pair)`` alone: (n, K)."""

    def one(a, b):
        return jax.random.fold_in(jax.random.fold_in(key, a), b)

    return jax.vmap(jax.vmap(one))(first, second)


def participation(key: jax.Array, n: int, count: int) -> Participation:
    """Draw which ``count`` of ``n`` workers take part in a round, all sets alike.

    Args:
        key: another one in each round.
        n: number of workers.
        count: how many take part; a Python number, so that bytes are counted exactly.

    Returns:
        A mask for server channels.

    Raises:
        ValueError: if ``count`` is not a whole number from 1 to ``n``.

    Examples:
        >>> drawn = participation(jax.random.key(0), 10, 3)
        >>> int(drawn.mask.sum()), drawn.count
        (3, 3)
    """
    if not isinstance(count, numbers.Integral) or not 1 <= count <= n:
        raise ValueError(
            f"Of {n} workers a whole number from 1 to {n} can take part in a round; "
            f"got count={count!r}."
        )
    return Participation(jax.random.permutation(key, n) < count, int(count))


def where(rows: jax.Array | None, tree: Tree, otherwise: Tree) -> Tree:
    """``tree`` on the rows that are true, ``otherwise`` on the others; None is all."""
    if rows is None:
        return tree

    def choose(a, b):
        return jnp.where(rows.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, tree, otherwise)


def column(weights: np.ndarray | jax.Array, leaf: jax.Array) -> jax.Array:
    """One weight per node, (n,), shaped and typed to multiply ``leaf``, (n, ...)."""
    return jnp.asarray(weights, leaf.dtype).reshape((-1,) + (1,) * (leaf.ndim - 1))


def gathered(
    leaf: jax.Array,
    nodes: np.ndarray | jax.Array,
    weights: np.ndarray | jax.Array,
    less: jax.Array | None = None,
) -> jax.Array:
    r"""Weighted sum over neighbour slots, :math:`\sum_k w_{ik} (v_{j(i, k)} - u_i)`.

    Args:
        leaf: v, ``(n, ...)``.
        nodes: j, ``(n, K)``.
        weights: w, ``(n, K)``.
        less: u, ``(n, ...)``; None is zero.
    """

    def total(nodes, weights):
        def term(k):
            heard = leaf[nodes[:, k]]
            heard = heard if less is None else heard - less
            return column(weights[:, k], leaf) * heard

        return sum(map(term, range(1, nodes.shape[1])), start=term(0))

    slots = nodes.shape[1]
    if slots <= _UNROLLED:
        return total(nodes, weights)
    chunks = -(-slots // _CHUNK)

    def chunked(part):
        padded = jnp.pad(part, ((0, 0), (0, chunks * _CHUNK - slots)))
        return padded.reshape(-1, chunks, _CHUNK).swapaxes(0, 1)

    def add(sum_, chunk):
        return sum_ + total(*chunk), None

    parts = chunked(nodes), chunked(weights)
    start = jnp.zeros((len(nodes), *leaf.shape[1:]), leaf.dtype)
    return jax.lax.scan(add, start, parts)[0]


def over_slots(weights: jax.Array, leaf: jax.Array) -> jax.Array:
    """Weighted sum over slots, ``(n, K), (n, K, ...) -> (n, ...)``.

    Few terms are written out: on CPU a sum over a short axis takes many times as long.
    """
    weights = weights.astype(leaf.dtype)
    if weights.shape[1] > _UNROLLED:
        return jnp.einsum("nk,nk...->n...", weights, leaf, precision="highest")
    total = jnp.zeros((len(leaf), *leaf.shape[2:]), leaf.dtype)
    for k in range(weights.shape[1]):
        total += column(weights[:, k], total) * leaf[:, k]
    return total


def island(product: Callable[[jax.Array], jax.Array]) -> Callable:
    """Keep the compiler from fusing ``product`` with what comes before and after.

    On CPU it would compute what is gathered anew for each reader: two exchanges in a
    row then cost up to ten times their sum. A branch is a border to it; the condition
    always holds, which the compiler cannot know.
    """

    def bordered(leaf):
        if not leaf.size:
            return leaf
        first = leaf.reshape(-1)[0]
        certain = (first == first) | jnp.isnan(first)
        return jax.lax.cond(certain, product, lambda leaf: leaf, leaf)

    def either(leaf):
        return jax.lax.platform_dependent(leaf, cpu=bordered, default=product)

    return either


def is_large(leaf: jax.Array) -> bool:
    """Whether a map of the node axis pays block by block, see :func:`blockwise`."""
    n = len(leaf)
    return n <= _TALL and leaf.size >= max(_LARGE, 2 * _BLOCK * n)


def blockwise(product: Callable[[jax.Array], jax.Array]) -> Callable:
    """Map a large array over its node axis in place, a block of columns at a time.

    On CPU a block stays in the cache, and a loop over steps, which would copy a second
    array back into the first, has none to copy.

    Args:
        product: maps ``(n, ...)`` to the same shape, each column by itself.
    """

    def on_cpu(leaf):
        columns = leaf.reshape(len(leaf), -1)
        width = columns.shape[1]

        def one_block(i, columns):
            # The last one begins within the one before; what that has mapped stays.
            start = jnp.minimum(i * _BLOCK, width - _BLOCK)
            part = jax.lax.dynamic_slice_in_dim(columns, start, _BLOCK, axis=1)
            new = start + jax.lax.iota(jnp.int32, _BLOCK) >= i * _BLOCK
            part = jnp.where(new, product(part), part)
            return jax.lax.dynamic_update_slice_in_dim(columns, part, start, axis=1)

        blocks = -(-width // _BLOCK)
        columns = jax.lax.fori_loop(0, blocks, one_block, columns)
        return columns.reshape(leaf.shape)

    def either(leaf):
        return jax.lax.platform_dependent(leaf, cpu=on_cpu, default=product)

    return either


def check_count(value: Any, name: str, of: str = "nodes") -> None:
    """Refuse what is not a whole number >= 1."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(
            f"`{name}` needs a whole number n >= 1 of {of}, got {value!r}."
        )


def check_positive(value: Any, name: str) -> None:
    """Refuse what is not a number, or a concrete one that is not positive.

    Raises:
        TypeError: if it is no number; arrays and tracers pass.
        ValueError: if it is not positive.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` is a number > 0; got {value!r}.")
    if not float(value) > 0:
        raise ValueError(f"`{name}` must be > 0; got {value}.")


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def one_node(tree: Tree) -> Tree:
    """Shapes and dtypes of one node's share of a stacked tree."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), tree)


def size(tree: Tree) -> int:
    """Number of entries over all leaves, from shapes alone."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves, from shapes and dtypes alone."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def times(scalar: float | jax.Array, leaf: jax.Array) -> jax.Array:
    """``scalar * leaf`` in the dtype of the leaf, whatever that of the scalar."""
    return jnp.asarray(scalar, leaf.dtype) * leaf


def wide(tree: Tree) -> Tree:
    """Copy into at least float32, where running memories of short floats keep digits.

    A copy in any case, so that a state may be donated.
    """

    def copy(leaf):
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.array(leaf, dtype, copy=True)

    return jax.tree.map(copy, tree)


def cast(tree: Tree, like: Tree) -> Tree:
    """``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def averaged(weight: float | jax.Array, average: Tree, tree: Tree) -> Tree:
    """``(1 - weight) average + weight tree``, in the dtypes of ``average``."""
    return jax.tree.map(
        lambda r, d: times(1 - weight, r) + times(weight, d.astype(r.dtype)),
        average,
        tree,
    )


def ravel(tree: Tree) -> jax.Array:
    """All leaves as one vector, in the widest of their dtypes."""
    leaves = jax.tree.leaves(tree)
    if len(leaves) == 1:
        return leaves[0].reshape(-1)
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


def unravel(flat: jax.Array, like: Tree) -> Tree:
    """Undo :func:`ravel`; ``like`` gives shapes and dtypes, arrays or not."""
    leaves, structure = jax.tree.flatten(like)
    ends, parts = 0, []
    for leaf in leaves:
        start, ends = ends, ends + math.prod(leaf.shape)
        parts.append(flat[start:ends].reshape(leaf.shape).astype(leaf.dtype))
    return jax.tree.unflatten(structure, parts)
