"""What all strategies share: checks of their parts, and one local step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax

from dbojax import trees
from dbojax.base import Channel, State, Strategy


class MovedState(NamedTuple):
    """Memories of the parts of a strategy that has none of its own."""

    channel: State
    optimizer: State


def no_mask(mask, name, why):
    """Refuse a mask, and say why."""
    if mask is not None:
        raise ValueError(
            f"{name} needs all nodes in every round: {why}. Leave `mask`, or "
            "`participants` of `compose`, out, or use "
            "`dbo.strategies.allreduce(channel, optimizer)`."
        )


def check_strategy(strategy, name):
    """Refuse what is not a strategy."""
    example = "dbo.strategies.allreduce(channel, optax.sgd(0.1))"
    trees.check_type(strategy, Strategy, name, example)


def check_channel(channel, name):
    """Refuse what is not a channel, or one that keeps sums but no values."""
    trees.check_type(channel, Channel, name, "dbo.channels.exact(mix)")
    if channel.pushes:
        raise ValueError(
            f"`{name}` hands out shares and keeps no values, so that equal ones drift "
            "apart; it is for `dbo.strategies.gradient_push(channel, optimizer)` "
            "alone. Here write `dbo.channels.changing(network)`, which needs a network "
            "whose rows sum to one."
        )


def lift_of(channel):
    """How to map over the nodes of a channel: on many devices, each over its own."""
    part = channel.network if channel.mix is None else channel.mix
    return jax.vmap if part is None else part.lift


def check_parts(channel, optimizer):
    """Refuse parts of another kind."""
    check_channel(channel, "channel")
    kind = optax.GradientTransformation
    trees.check_type(optimizer, kind, "optimizer", "optax.sgd(0.1)")


def add(v, change):
    """The sum of two trees, in the dtypes of the first."""
    # A step size may be a float64 scalar; the variable keeps its dtype.
    return jax.tree.map(lambda a, b: (a + b).astype(a.dtype), v, change)


def local_step(optimizer, direction, opt_state, v):
    """What each node's own transform makes of its direction."""
    return jax.vmap(optimizer.update)(direction, opt_state, v)
