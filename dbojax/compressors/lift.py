"""From functions of a vector to compressors of trees."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Compressor, Payload, Tree


def stateless(
    compress: Callable[[jax.Array, Tree], Payload],
    decompress: Callable[[Payload, Tree], Tree],
    add: Callable[[Payload, jax.Array, Tree], Tree] | None = None,
    delta: Callable[[int], float] | None = None,
    omega: Callable[[int], float] | None = None,
    add_all: Callable[[Payload, jax.Array, Tree], Tree] | None = None,
) -> Compressor:
    r"""Make a compressor without memory from two pure functions.

    Args:
        compress: ``(key, v) -> payload``, the arrays that cross a link.
        decompress: ``(payload, like) -> v``; ``like`` gives shapes and dtypes alone.
        add: ``(payload, scale, into) -> into + scale * v``, where that costs less than
            a dense ``v``.
        delta: contraction, :math:`E\|C(v)-v\|^2 \le (1-\delta(d))\|v\|^2`.
        omega: variance of an unbiased compressor,
            :math:`E\|C(v)-v\|^2 \le \omega(d)\|v\|^2`.
        add_all: ``(payloads, scales, into)``, as ``add`` for K messages at once, where
            that costs less than one after the other; leaves ``(K, ...)``, scales
            ``(K,)``.

    Returns:
        A compressor whose state is ``()``.

    Examples:
        >>> half = stateless(lambda key, v: v / 2, lambda payload, like: payload)
        >>> payload, state = half.compress(None, jnp.ones(3), half.init(jnp.ones(3)))
        >>> half.decompress(payload, jnp.ones(3)).tolist(), state
        ([0.5, 0.5, 0.5], ())
    """
    return Compressor(
        init=lambda v: (),
        compress=lambda key, v, state: (compress(key, v), state),
        decompress=decompress,
        add=add,
        delta=delta,
        omega=omega,
        add_all=add_all,
    )


def flat_like(like: Tree) -> jax.ShapeDtypeStruct:
    """Shape and dtype of ``ravel(like)``; refuses what is not real floating point."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(like)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(
            "Compressors act on trees of real floating-point arrays; got dtypes "
            f"{[str(dtype) for dtype in dtypes]}. Convert the leaves, e.g. with "
            "`.astype(jnp.float32)`, or keep the others out of what is sent."
        )
    return jax.ShapeDtypeStruct((trees.size(like),), jnp.result_type(*dtypes))


def on_trees(compressor: Compressor) -> Compressor:
    """Lift a compressor of vectors to trees, as one concatenated vector.

    A tree of one leaf costs nothing extra; several leaves cost one concatenation. A
    tree without entries sends nothing.

    Args:
        compressor: acts on arrays of shape (d,); its ``decompress`` asks of ``like``
            only shape and dtype.

    Returns:
        A compressor of the same law, ``d`` being the number of entries of the tree;
        nothing is lost of none, ``delta(0) = 1`` and ``omega(0) = 0``.

    Raises:
        ValueError: at trace time, if a leaf is not real floating point.

    Examples:
        >>> first = stateless(
        ...     compress=lambda key, v: v[:1],
        ...     decompress=lambda payload, like: jnp.full(like.shape, payload),
        ... )
        >>> lifted = on_trees(first)
        >>> tree = {"a": jnp.ones((2, 2)), "b": jnp.zeros(3)}
        >>> payload, _ = lifted.compress(None, tree, ())
        >>> payload.shape, jax.tree.map(jnp.shape, lifted.decompress(payload, tree))
        ((1,), {'a': (2, 2), 'b': (3,)})
    """

    def init(v):
        return compressor.init(trees.ravel(v)) if trees.size(v) else ()

    def compress(key, v, state):
        if not trees.size(v):
            return (), state
        dtype = flat_like(v).dtype
        return compressor.compress(key, trees.ravel(v).astype(dtype), state)

    def decompress(payload, like):
        if not trees.size(like):
            return trees.unravel(jnp.zeros(0), like)
        return trees.unravel(compressor.decompress(payload, flat_like(like)), like)

    def adding(add):
        def lifted(payload, scale, into):
            if not trees.size(into):
                return into
            return trees.unravel(add(payload, scale, trees.ravel(into)), into)

        return lifted if add else None

    def unless_empty(law, of_nothing):
        return None if law is None else lambda d: law(d) if d else of_nothing

    return compressor._replace(
        init=init,
        compress=compress,
        decompress=decompress,
        add=adding(compressor.add),
        delta=unless_empty(compressor.delta, 1.0),
        omega=unless_empty(compressor.omega, 0.0),
        add_all=adding(compressor.add_all),
    )


def per_leaf(compressor: Compressor, like: Tree | None = None) -> Compressor:
    r"""Compress each leaf of a tree by itself, each with its own key.

    With leaves of lengths :math:`d_1 + \dots + d_L = d` the errors add up, so

    .. math::
        \delta = \min_l \delta(d_l), \qquad \omega = \max_l \omega(d_l).

    A law is a function of ``d`` alone. With ``like`` it is the line above. Without, it
    is the bound that holds for every way to cut ``d`` into leaves, the worst over all
    lengths up to ``d``: sound, weaker, and evaluated in time proportional to ``d``.

    Args:
        compressor: applied to every leaf; an int count must not exceed any leaf's size.
        like: one node's tree as it will be sent (arrays or shapes), for a sharp law.

    Returns:
        A compressor whose payload and state are tuples with one entry per leaf.

    Raises:
        ValueError: if a law made with ``like`` is asked for another number of entries.

    Examples:
        >>> tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([30.0, 40.0])}
        >>> top = per_leaf(dbo.compressors.top_k(1), like=tree)
        >>> payload, _ = top.compress(jax.random.key(0), tree, top.init(tree))
        >>> jax.tree.map(lambda a: a.tolist(), top.decompress(payload, tree))
        {'a': [0.0, 2.0], 'b': [0.0, 40.0]}
        >>> top.delta(4)
        0.5
    """

    def init(v):
        return tuple(compressor.init(leaf) for leaf in jax.tree.leaves(v))

    def compress(key, v, state):
        leaves = jax.tree.leaves(v)
        keys = (
            [None] * len(leaves) if key is None else jax.random.split(key, len(leaves))
        )
        sent = [
            compressor.compress(*args) for args in zip(keys, leaves, state, strict=True)
        ]
        return tuple(payload for payload, _ in sent), tuple(
            memory for _, memory in sent
        )

    def decompress(payload, like):
        leaves, structure = jax.tree.flatten(like)
        parts = map(compressor.decompress, payload, leaves)
        return jax.tree.unflatten(structure, list(parts))

    def add(payload, scale, into):
        leaves, structure = jax.tree.flatten(into)
        parts = [
            compressor.add(part, scale, leaf)  # pyright: ignore
            for part, leaf in zip(payload, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, parts)

    def worst(law, extreme, of_nothing):
        if law is None:
            return None

        def of_all_leaves(d):
            if like is None:
                return extreme(map(law, range(1, d + 1)), default=of_nothing)
            if d != trees.size(like):
                raise ValueError(
                    f"`per_leaf(like=...)` knows the law for d={trees.size(like)} "
                    f"entries, got d={d}. Give the tree that is sent as `like`."
                )
            laws = (law(trees.size(leaf)) for leaf in jax.tree.leaves(like))
            return extreme(laws, default=of_nothing)

        return of_all_leaves

    return Compressor(
        init=init,
        compress=compress,
        decompress=decompress,
        add=add if compressor.add else None,
        delta=worst(compressor.delta, min, 1.0),
        omega=worst(compressor.omega, max, 0.0),
    )
