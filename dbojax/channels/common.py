"""What all channels check, and how all nodes compress."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees
from dbojax.base import Compressor, Mix, Payload, State, Tree

_NUMBERS = int | float | np.integer | np.floating


def compressed(
    mix: Mix, compressor: Compressor, key: jax.Array, v: Tree, memory: State
) -> tuple[Payload, State]:
    """Payloads of all nodes; a node's randomness depends on its number alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, mix.nodes())
    return mix.lift(compressor.compress)(keys, v, memory)


def check_mix(mix, name, example="dbo.mixing.mixer(w)"):
    """Refuse what is not a mix."""
    trees.check_type(mix, Mix, f"{name}(mix)", example)


def check_gamma(gamma, name):
    """Refuse what is not a consensus step."""
    if not isinstance(gamma, _NUMBERS | np.ndarray | jax.Array):
        raise TypeError(
            f"`{name}` needs a number for its consensus step, 0 < gamma <= 1; got "
            f"{gamma!r}."
        )
    if isinstance(gamma, _NUMBERS) and not 0 < gamma <= 1:
        raise ValueError(
            f"`{name}` needs a consensus step 0 < gamma <= 1, got {gamma}."
        )


def sender(flow: Callable) -> Callable:
    """The ``send`` of a channel from its ``flow``."""

    def send(key, v, state, mask=None):
        moved, state, traffic = flow(key, v, state, mask)
        return jax.tree.map(jnp.add, v, moved), state, traffic

    return send


def check_compressor(compressor, name, argument):
    """Refuse what is not a compressor."""
    example = "dbo.compressors.top_k(0.1)"
    trees.check_type(compressor, Compressor, f"{name}({argument})", example)


def check_contraction(compressor, name, argument="compressor"):
    """Refuse a compressor without `delta`."""
    check_compressor(compressor, name, argument)
    if compressor.delta is None:
        raise ValueError(
            f"`{name}` needs a contraction, but this compressor declares no `delta`. "
            "Wrap an unbiased one as `dbo.compressors.scaled(compressor)`."
        )


def no_mask(mask, name):
    """Refuse a mask: neighbours exchange in every round."""
    if mask is not None:
        raise ValueError(
            f"`{name}` exchanges with all neighbours in every round and takes no mask; "
            "leave `mask`, or `participants` of `compose`, out, or use a channel with "
            "a server, e.g. `dbo.channels.server(dbo.mixing.averaging(n))`."
        )
