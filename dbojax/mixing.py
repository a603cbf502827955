"""Mixing matrices as functions: several forms of the same product, one choice.

All forms compute ``W v`` over the node axis and agree to rounding; :func:`mixer` picks
the one that was fastest when measured on CPU.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from dbojax import trees
from dbojax.base import Mix, Tree, check_mixing_matrix


class _Neighbours(NamedTuple):
    """Who each node hears, itself included; padded with itself at weight zero."""

    nodes: np.ndarray  # (n, K)
    weights: np.ndarray | jax.Array  # (n, K)


def _neighbours(w: np.ndarray) -> _Neighbours:
    heard = (w != 0) | np.eye(len(w), dtype=bool)
    slots = heard.sum(axis=1).max()
    # A stable sort puts the heard nodes first, in ascending order.
    index = np.argsort(~heard, axis=1, kind="stable")[:, :slots]
    valid = np.take_along_axis(heard, index, axis=1)
    weights = np.where(valid, np.take_along_axis(w, index, axis=1), 0.0)
    return _Neighbours(np.where(valid, index, np.arange(len(w))[:, None]), weights)


def _links(w: np.ndarray) -> int:
    return int(np.count_nonzero(w) - np.count_nonzero(np.diag(w)))


def _is_symmetric(w: np.ndarray) -> bool:
    return bool(np.abs(w - w.T).max(initial=0) < 1e-8)


def _mix(
    n: int,
    product,
    table: _Neighbours,
    links: int,
    averages: bool = False,
    symmetric: bool = True,
    of_large=None,
    pull=None,
) -> Mix:
    """Build a mix from the products with one leaf, ``(n, ...)``.

    ``of_large``, for a leaf of many columns, sums gathered rows; None: there is but one
    product. ``pull``, the product with W - I, is for what moves something else.
    """

    def by_size(gamma=None):
        small = product if gamma is None else _towards(product, gamma)
        if product is of_large:
            # The compiler would gather anew for each reader of the sum.
            small = trees.island(small)

        def mapped(leaf):
            if of_large is None or not trees.is_large(leaf):
                return small(leaf)
            return _in_place(of_large, _dense_weights(table), gamma)(leaf)

        return mapped

    def apply(v: Tree, decode=None) -> Tree:
        trees.check_nodes(v, n, "v")
        v = v if decode is None else jax.vmap(decode)(v)
        return jax.tree.map(by_size(), v)

    def pulled(leaf):
        return by_size()(leaf) - leaf if pull is None else pull(leaf)

    def towards(v: Tree, gamma, hat: Tree | None = None) -> Tree:
        trees.check_nodes(v, n, "v")
        if hat is None:
            return jax.tree.map(by_size(gamma), v)
        return jax.tree.map(lambda a, h: a + trees.times(gamma, pulled(h)), v, hat)

    def exchange(payload):
        return jax.tree.map(lambda leaf: leaf[table.nodes], payload)

    def flow(v: Tree) -> Tree:
        # Rows of W sum to one, so that what all have in common may stay out.
        apart = jax.tree.map(lambda leaf: leaf - leaf[:1], v)
        return jax.tree.map(jnp.subtract, apply(apart), apart)

    def nodes():
        return jnp.arange(n)

    weights = jnp.asarray(table.weights)
    return Mix(
        apply,
        exchange,
        weights,
        np.asarray(table.nodes),
        links,
        jax.vmap,
        nodes,
        averages=averages,
        symmetric=symmetric,
        flow=flow,
        towards=towards if of_large or pull else None,
    )


def _towards(product, gamma):
    return lambda leaf: leaf + trees.times(gamma, product(leaf) - leaf)


def _in_place(product, w, gamma):
    """A large leaf block by block, with derivatives by a matrix product.

    That of a loop over blocks would go through the whole array for each of them.
    """

    @jax.custom_jvp
    def mapped(leaf, gamma):
        step = product if gamma is None else _towards(product, gamma)
        return trees.blockwise(step)(leaf)

    @partial(mapped.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        (leaf, gamma), (dleaf, dgamma) = primals, tangents
        change = jnp.zeros_like(leaf)
        if not isinstance(dleaf, SymbolicZero):
            linear = _times(w) if gamma is None else _towards(_times(w), gamma)
            change = linear(dleaf)
        if gamma is not None and not isinstance(dgamma, SymbolicZero):
            change += trees.times(dgamma, mapped(leaf, None) - leaf)
        return mapped(leaf, gamma), change

    return lambda leaf: mapped(leaf, gamma)


def _dense_weights(table: _Neighbours) -> np.ndarray:
    n = len(table.nodes)
    w = np.zeros((n, n))
    np.add.at(w, (np.arange(n)[:, None], table.nodes), table.weights)
    return w


def _times(w):
    """The matrix product with one leaf."""

    def product(leaf):
        flat = leaf.reshape(len(leaf), -1)
        mixed = jnp.dot(jnp.asarray(w, leaf.dtype), flat, precision="highest")
        return mixed.reshape(leaf.shape)

    return product


def mixer(w: np.ndarray) -> Mix:
    r"""Multiply by the mixing matrix in the form that suits its graph.

    .. math:: (W v)_i = \sum_j w_{ij} v_j

    In a matrix product zeros are multiplied too: a value that is not finite then
    reaches all nodes at once, and so it does where messages are compressed between up
    to 64 nodes.

    Args:
        w: doubly stochastic ``(n, n)`` on a connected graph, from ``dbo.topology``.

    Returns:
        The :func:`averaging` form when all weights are ``1/n``; :func:`dense` for at
        most 64 nodes that hear more than a quarter of the others, but for large arrays
        only where they hear more than 15 others; else :func:`neighbours`.

    Raises:
        ValueError: if ``w`` is not doubly stochastic or its graph is not connected.
        TypeError: if ``w`` is traced.

    Examples:
        >>> mix = mixer(dbo.topology.metropolis(dbo.topology.ring(5)))
        >>> v = jnp.arange(5.0)
        >>> bool(jnp.allclose(mix.apply(v).mean(), v.mean())), mix.links
        (True, 10)
    """
    if isinstance(w, Tracer):
        raise TypeError(
            "`mixer` looks at the entries of `w` to pick a form, so `w` cannot be "
            "traced. Write `dbo.mixing.dense(w)` inside `jit` and `vmap`."
        )
    w = check_mixing_matrix(w)
    n, slots = len(w), _neighbours(w).nodes.shape[1]
    if np.allclose(w, 1 / n, rtol=0, atol=1e-12):
        return averaging(n)
    if n > trees.FEW:
        return neighbours(w)
    pull = _times(w - np.eye(n))
    if slots <= max(3, n / 4):
        return _gathering(w, pull)
    return _dense(w, of_large=_sums(_neighbours(w)) if slots <= 16 else None, pull=pull)


def _is_circulant(w: np.ndarray) -> bool:
    rows = np.arange(len(w))
    return np.array_equal(w, w[0][(rows[None] - rows[:, None]) % len(w)])


def shifts(w: np.ndarray) -> Mix:
    """Circulant ``W`` as a weighted sum of rolled arrays.

    On CPU slower than :func:`neighbours`, but for derivatives of small arrays, which
    cost it no more than values; those of gathered rows cost many times as much.

    Raises:
        ValueError: if the rows of ``w`` are not shifts of one another.
    """
    w = np.asarray(w, dtype=np.float64)
    if not _is_circulant(w):
        raise ValueError(
            "`shifts` needs a circulant matrix (ring, exponential); use "
            "`dbo.mixing.mixer(w)` for any other graph."
        )
    offsets = np.flatnonzero(w[0])

    def product(leaf):
        return sum(w[0, s].item() * jnp.roll(leaf, -s, axis=0) for s in offsets)

    return _mix(len(w), product, _neighbours(w), _links(w), symmetric=_is_symmetric(w))


def neighbours(w: np.ndarray) -> Mix:
    """Sparse ``W`` as one gather per neighbour slot; up to 32 slots are written out."""
    return _gathering(np.asarray(w, dtype=np.float64))


def _gathering(w: np.ndarray, pull=None) -> Mix:
    table = _neighbours(w)
    product, symmetric = _sums(table), _is_symmetric(w)
    return _mix(
        len(w),
        product,
        table,
        _links(w),
        symmetric=symmetric,
        of_large=product,
        pull=pull,
    )


def _sums(table: _Neighbours):
    return lambda leaf: trees.gathered(leaf, *table)


def dense(w: np.ndarray | jax.Array, links: int | None = None) -> Mix:
    """Any ``W`` as a matrix product; ``w`` may be traced, for sweeps over graphs.

    Args:
        w: ``(n, n)``, concrete or traced.
        links: directed edges that carry a message; counted from a concrete ``w``,
            ``n (n - 1)`` for a traced one.

    Raises:
        ValueError: if ``w`` is not square.
    """
    return _dense(w, links)


def _dense(w: np.ndarray | jax.Array, links=None, of_large=None, pull=None) -> Mix:
    w = w if isinstance(w, Tracer) else np.asarray(w, dtype=np.float64)
    n = w.shape[0] if w.ndim else 0
    if w.shape != (n, n):
        raise ValueError(f"`dense` needs a square matrix (n, n); got shape {w.shape}.")
    if isinstance(w, Tracer):
        table, edges = _Neighbours(np.tile(np.arange(n), (n, 1)), w), n * (n - 1)
    else:
        table, edges = _neighbours(w), _links(w)

    symmetric = isinstance(w, Tracer) or _is_symmetric(w)
    links = edges if links is None else links
    return _mix(
        n,
        _times(w),
        table,
        links,
        symmetric=symmetric,
        of_large=of_large,
        pull=pull,
    )


def averaging(n: int) -> Mix:
    """The complete graph with weights ``1/n``: everyone gets the mean at once."""

    def product(leaf):
        return jnp.broadcast_to(trees.node_mean(leaf)[None], leaf.shape)

    trees.check_count(n, "averaging")
    table = _neighbours(np.full((n, n), 1 / n))
    return _mix(n, product, table, n * (n - 1), averages=True)


def along(axis_name: str, n: int) -> Mix:
    r"""The mean of ``n`` nodes that a mapped axis holds, one on each of its positions.

    For code inside ``jax.shard_map`` or ``jax.vmap(..., axis_name=...)``, where a node
    sees its own share, with a node axis of length one. Payloads are gathered as they
    are, so that only they cross between devices, and averaged in the order of nodes.

    Args:
        axis_name: of the mapped axis.
        n: its length.

    Raises:
        ValueError: if ``n`` is not a positive integer; at trace time, if the axis has
            another length.

    Examples:
        >>> mix, v = along("workers", 4), jnp.arange(4.0)
        >>> mean = jax.vmap(lambda own: mix.apply(own[None]), axis_name="workers")(v)
        >>> mean[:, 0].tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    trees.check_count(n, "along")

    def gather(leaf):
        return jax.lax.all_gather(leaf, axis_name, tiled=True)

    def apply(v: Tree, decode=None) -> Tree:
        if (found := jax.lax.axis_size(axis_name)) != n:
            raise ValueError(
                f"`along({axis_name!r}, {n})` is for an axis of length {n}; this one "
                f"has {found}."
            )
        trees.check_nodes(v, 1, "v")
        if decode is None:
            return jax.lax.pmean(v, axis_name)
        mean = trees.node_mean(jax.vmap(decode)(jax.tree.map(gather, v)))
        return jax.tree.map(lambda leaf: leaf[None], mean)

    def exchange(payload):
        return jax.tree.map(lambda leaf: gather(leaf)[None], payload)

    def nodes():
        return jax.lax.axis_index(axis_name)[None]

    weights = jnp.full((1, n), 1 / n)
    links = n * (n - 1)
    heard = np.arange(n)[None]
    return Mix(
        apply, exchange, weights, heard, links, jax.vmap, nodes, False, averages=True
    )
