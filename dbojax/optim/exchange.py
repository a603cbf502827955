"""Channels as links of an optax chain."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Channel, Mix, State, Traffic, Tree


class CommunicateState(NamedTuple):
    """Key of the next exchange, memories of the channel, bytes of one exchange."""

    key: jax.Array
    channel: State
    traffic: Traffic  # static, so it can be read inside and outside `jit`


def communicate(
    channel: Channel, *, seed: int | jax.Array = 0, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Exchange updates over a channel, as one link of an optax chain.

    With a channel that gives all workers the same (one with a server, or ``exact`` over
    the averaging mix), stacked gradients ``(n, ...)`` go in and one mean tree comes
    out: parameters and the states of what follows have no node axis. Over any other
    channel stacked trees go in and out, and every node keeps its own parameters; wrap
    what follows in :func:`per_node`.

    Args:
        channel: how the updates travel, e.g. ``dbo.channels.ef21(mix, compressor)``.
        seed: of the keys; a number or a typed key, which moves along in the state.
        axis_name: inside ``jax.shard_map`` or ``jax.vmap`` over this axis each worker
            gives its own updates, without node axis; build the channel on
            ``dbo.mixing.along(axis_name, n)`` and call ``init`` inside as well.
            ``shard_map`` needs ``check_vma=False``: it cannot know that all workers
            decode the same from what they gathered.

    Returns:
        An optax transform. Its ``update`` takes the key of an exchange as ``key=`` if
        one is given, and ``mask=dbo.participation(...)`` for partial participation.
        ``state.traffic`` holds the bytes of one exchange among all.

    Raises:
        ValueError: if an axis is named and the channel does not give all workers the
            same; from ``init`` and ``update``, if node axes do not fit the channel,
            updates do not fit the parameters, or their dtypes change the bytes.
        TypeError: if ``channel`` is not a channel of this package.

    Examples:
        >>> top = dbo.compressors.top_k(1)
        >>> channel = dbo.channels.ef21(dbo.mixing.averaging(4), top)
        >>> tx = optax.chain(communicate(channel), optax.adam(1e-3))
        >>> params, gradients = jnp.ones(3), jnp.ones((4, 3))
        >>> updates, state = tx.update(gradients, tx.init(params), params)
        >>> updates.shape, state[0].traffic.message, state[0].traffic.down
        ((3,), 9, 24)
    """
    example = "dbo.channels.ef21(mix, compressor)"
    trees.check_type(channel, Channel, "communicate(channel)", example)
    if channel.mix is None:
        raise TypeError("`communicate` needs to know the `mix` of its channel.")
    mix = channel.mix
    if axis_name is not None and not channel.averages:
        raise ValueError(
            f"Along {axis_name!r} only a channel that gives all workers the same can "
            "communicate, e.g. `dbo.channels.server(dbo.mixing.along(axis_name, n))`."
        )

    def init(params) -> Any:
        known = jax.tree.map(jnp.zeros_like, params)
        if channel.averages:
            known = trees.replicate(known, mix.weights.shape[0])
        memory = channel.init(known)
        key = _key(seed)
        traffic = jax.eval_shape(channel.send, key, known, memory)[2]
        return CommunicateState(key, memory, traffic)

    def update(updates, state, params=None, *, key=None, mask=None, **extra) -> Any:
        del extra
        next_key, drawn = jax.random.split(state.key)
        key = drawn if key is None else key
        rows = as_rows(updates, params, mix, axis_name, unstack=channel.averages)
        held, memory, traffic = channel.send(key, rows, state.channel, mask)
        if mask is None and traffic != state.traffic:
            raise ValueError(
                f"With updates of these dtypes an exchange is {traffic}, but `init` "
                f"counted {state.traffic} for those of the parameters. Cast the "
                "updates to the dtypes of the parameters."
            )
        if channel.averages:
            held = first(held)
        return held, CommunicateState(next_key, memory, state.traffic)

    return optax.GradientTransformationExtraArgs(init, update)


def _key(seed) -> jax.Array:
    return seed if trees.is_key(seed) else jax.random.key(seed)


def as_rows(
    updates: Tree, params: Tree | None, mix: Mix, axis_name: str | None, unstack: bool
) -> Tree:
    """Updates with the rows that ``mix`` sees; refuses what does not fit ``params``.

    ``unstack``: whether parameters have no node axis.
    """
    if axis_name is not None:
        updates = jax.tree.map(lambda leaf: leaf[None], updates)
    trees.check_nodes(updates, mix.weights.shape[0], "updates")
    if params is not None:
        one = trees.one_node(updates) if unstack else updates
        name = "updates[i]" if unstack else "updates"
        trees.check_shapes(one, params, name, "params")
    return updates


def first(held: Tree) -> Tree:
    """One node's share of what all nodes hold alike."""
    return jax.tree.map(lambda leaf: leaf[0], held)


def per_node(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Let every node apply an optax transform to its own row of stacked trees.

    Args:
        optimizer: acts on one node's tree.

    Returns:
        The same on trees with the node axis first, its state included.

    Examples:
        >>> tx = per_node(optax.clip_by_global_norm(1.0))
        >>> v = jnp.array([[3.0, 4.0], [0.6, 0.8]])
        >>> clipped, _ = tx.update(v, tx.init(v), v)
        >>> bool(jnp.allclose(clipped, jnp.array([[0.6, 0.8]])))
        True
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **extra):
        def one(updates, state, params):
            return optimizer.update(updates, state, params, **extra)

        return jax.vmap(one)(updates, state, params)

    return optax.GradientTransformationExtraArgs(jax.vmap(optimizer.init), update)
