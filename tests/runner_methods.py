"""Small algorithms for the tests of the runner."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

import dbojax as dbo
from dbojax.base import Consensus

TRAFFIC = dbo.Traffic(message=24, total=3 * 2**40, rounds=11, down=7)
CALLS = dbo.Calls(gradients=4, products=3)


def noise(key, shape):
    """Numbers that depend on the key, cheaper to compile than `jax.random`."""
    a, b = jax.random.key_data(key) % 1000
    return jnp.cos(a + b * jnp.arange(float(math.prod(shape)))).reshape(shape)


class Walk(NamedTuple):
    x: jax.Array
    y: jax.Array
    half: jax.Array  # bfloat16
    key: jax.Array
    count: jax.Array


def metrics(upper, x, y):
    return dbo.Metrics(
        upper=upper,
        hypergrad_norm=jnp.linalg.norm(x),
        consensus=Consensus(
            dbo.consensus_error(x), dbo.consensus_error(y), jnp.zeros(())
        ),
        traffic=TRAFFIC,
        calls=CALLS,
    )


def start(x):
    zero = jnp.zeros((), jnp.int32)
    return Walk(x, x - 1, x.astype(jnp.bfloat16), jax.random.key(3), zero)


def noisy(rate=0.1):
    """A random walk towards the batch; its state has every kind of leaf."""

    def step(key, state, batch):
        x = state.x - rate * (state.x - batch) + noise(key, state.x.shape)
        y = jnp.tanh(state.y + x)
        turned = jax.random.wrap_key_data(
            jax.random.key_data(state.key) + jnp.uint32(1)
        )
        half = (state.half + 0.1 * x).astype(jnp.bfloat16)
        state = Walk(x, y, half, turned, state.count + 1)
        return state, metrics(jnp.mean((x - batch) ** 2), x, y)

    return dbo.Algorithm(init=lambda x, y: start(x), step=step)


def exploding(at, what):
    """All well until the step counted ``at`` (from 1), where ``what`` breaks."""

    def step(key, state, batch):
        x, y, hidden, count = state
        count = count + 1
        x = jnp.where((count >= at) & (what == "x"), jnp.inf, x * 0.9)
        y = jnp.where((count >= at) & (what == "y"), jnp.nan, y * 0.9)
        hidden = jnp.where((count >= at) & (what == "hidden"), jnp.nan, hidden)
        return (x, y, hidden, count), metrics(jnp.sum(batch) + count, x, y)

    def init(x, y):
        return x, y, jnp.ones(2), jnp.zeros((), jnp.int32)

    return dbo.Algorithm(init, step)


def sampler(key, step):
    return noise(key, (4, 3)) + step // 3
