"""The channel over which nothing travels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dbojax.base import Channel, Traffic


def private() -> Channel:
    r"""Keep every node's value to itself, :math:`v_i \leftarrow v_i`.

    With it a strategy moves a personal variable: one that each node has for itself.

    Returns:
        A channel without memory and without traffic.

    Examples:
        >>> v = jnp.array([[1.0], [5.0]])
        >>> held, _, traffic = private().send(jax.random.key(0), v, ())
        >>> held.tolist() == v.tolist(), traffic.total
        (True, 0)
    """

    def init(known):
        del known
        return ()

    def send(key, v, state, mask=None):
        del key, mask
        return v, state, Traffic()

    def flow(key, v, state, mask=None):
        del key, mask
        return jax.tree.map(jnp.zeros_like, v), state, Traffic()

    return Channel(init, send, flow=flow)
