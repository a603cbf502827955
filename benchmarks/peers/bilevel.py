"""One weight for each group of features: the problem of the solvers, ours and by hand.

Logistic regression with d = 100 features in p = 10 groups; batches are blocks of the
data, which every solver slices alike.
"""

import functools
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dbojax as dbo

D, P, BLOCK, BLOCKS = 100, 10, 64, 32
STEP, TERMS, ROUNDS = 0.1, 10, 10
RATE = 0.5  # of recursive momentum


class Data(NamedTuple):
    """Blocks of samples."""

    inputs: jax.Array  # (BLOCKS, BLOCK, D)
    targets: jax.Array  # (BLOCKS, BLOCK), -1 or 1


def arguments(dtype):
    """x, y and the data of the upper and the lower level."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, BLOCKS, BLOCK, D))
    answers = inputs @ rng.standard_normal(D) + rng.standard_normal(inputs.shape[:-1])
    targets = np.where(answers > 0, 1.0, -1.0)
    levels = (
        Data(jnp.asarray(a, dtype), jnp.asarray(t, dtype))
        for a, t in zip(inputs, targets, strict=True)
    )
    return jnp.full(P, -5.0, dtype), jnp.zeros(D, dtype), *levels


def fit(y, samples):
    return jnp.mean(jax.nn.softplus(-samples.targets * (samples.inputs @ y)))


def upper(x, y, samples):
    del x
    return fit(y, samples)


def lower(x, y, samples):
    weights = jnp.exp(x)[:, None]
    return fit(y, samples) + jnp.sum(weights * y.reshape(P, -1) ** 2) / 2


def block(data, index):
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), data
    )


def problem(above, below):
    """The objectives on all data; a batch is the number of a block, or several."""

    def on(objective, data):
        def value(x, y, drawn):
            # SABA looks at one sample, here a whole block, with a sample axis.
            return objective(x, y, block(data, jnp.ravel(drawn)[0]))

        return value

    return dbo.Problem(on(upper, above), on(lower, below))


def orders(key, steps, levels):
    """Numbers of the blocks, (steps, levels): every epoch goes through all of them."""
    keys = jax.random.split(key, (levels, steps // BLOCKS))
    shuffled = jax.vmap(jax.vmap(lambda k: jax.random.permutation(k, BLOCKS)))(keys)
    return shuffled.reshape(levels, -1).T


def decay(step):
    """The step size that benchopt's SOBA takes."""
    return STEP / jnp.sqrt(1.0 + step)


# By dbojax, on one node.


class Solver(NamedTuple):
    """A method and what it sees in a step."""

    method: dbo.Algorithm
    batch: Callable  # numbers of the blocks that were drawn -> batch of one node
    draws: int  # blocks in a step


def on_one_node(batch):
    if isinstance(batch, dbo.Rounds):  # whose rounds come first
        inner = jax.tree.map(lambda leaf: leaf[:, None], batch.inner)
        return dbo.Rounds(on_one_node(batch.outer), inner)
    return jax.tree.map(lambda leaf: leaf[None], batch)


def one_each(drawn):
    return dbo.Batch(drawn[0], drawn[1])


def one_and_several(drawn):
    return dbo.Batch(drawn[0], drawn[1:])


def soba(of):
    mix = dbo.mixing.averaging(1)
    method = dbo.algorithms.soba(of, mix=mix, upper_step=decay, lower_step=decay)
    return Solver(method, one_each, draws=2)


def saba(of):
    """A whole block is what it remembers as one sample, as benchopt's does."""

    def batch(drawn):
        size = jnp.asarray(BLOCKS)
        return dbo.Batch(*(dbo.Indexed(one, one, size) for one in drawn[:, None]))

    method = dbo.algorithms.saba(
        of,
        mix=dbo.mixing.averaging(1),
        num_upper=BLOCKS,
        num_lower=BLOCKS,
        upper_step=STEP,
        lower_step=STEP,
    )
    return Solver(method, batch, draws=2)


def series(of):
    """Directions with a Neumann series that takes a fresh block for each term.

    The first block below gives the slope and the mixed product.
    """

    def init(x, y):
        del x, y
        return jnp.zeros(()), ()

    def directions(key, x, y, z, memory, batch):
        del key
        above, below = batch
        first, rest = below[0], below[1:]
        f_x, f_y = jax.grad(of.upper, (0, 1))(x, y, above)
        d_y, pull = jax.vjp(lambda x: jax.grad(of.lower, 1)(x, y, first), x)

        def term(carry, samples):
            v, total = carry
            slope = functools.partial(jax.grad(of.lower, 1), x)
            _, image = jax.jvp(lambda y: slope(y, samples), (y,), (v,))
            v = v - STEP * image
            return (v, total + v), None

        (_, total), _ = jax.lax.scan(term, (f_y, f_y), rest)
        (cross,) = pull(STEP * total)
        return (f_x - cross, d_y, jnp.zeros_like(z)), memory

    one, product = dbo.Calls(gradients=1), dbo.Calls(products=1)
    calls = one * 2 + product * (TERMS + 1), one, dbo.Calls()
    return dbo.Oracle(init, directions, calls)


def moves(*steps):
    """One worker's strategies."""
    channel = dbo.channels.server(dbo.mixing.averaging(1))
    return [dbo.strategies.allreduce(channel, optax.sgd(step)) for step in steps]


def stocbio(of):
    """SGD on y, then a step of x along the series."""
    a = dbo.algorithms
    x, y, z = moves(STEP, STEP, STEP)
    below, above = a.Phase(y=y, z=z, times=ROUNDS), a.Phase(x=x)
    method = a.compose(of, series(of), below, above)

    def batch(drawn):
        # The rounds do not look at their upper part.
        inner = dbo.Batch(drawn[:ROUNDS], drawn[:ROUNDS, None])
        return dbo.Rounds(one_and_several(drawn[ROUNDS:]), inner)

    return Solver(method, batch, draws=ROUNDS + TERMS + 2)


def mrbo(of):
    """Recursive momentum on the directions of the series."""

    def slower(step):
        return STEP / (1.0 + step) ** (1 / 3)

    x, y, z = moves(slower, slower, slower)
    oracle = dbo.oracles.storm(series(of), RATE)
    method = dbo.algorithms.single_loop(of, x=x, y=y, z=z, oracle=oracle)
    return Solver(method, one_and_several, draws=TERMS + 2)


SOLVERS = types.MappingProxyType(
    {"SOBA": soba, "SABA": saba, "stocBiO": stocbio, "MRBO": mrbo}
)


def scanned(step, draws, steps):
    """``(state, key, above, below) -> (state, told)`` by a scan over shuffled epochs.

    ``step`` takes (key, state, above, below, numbers of blocks).
    """

    def program(state, key, above, below):
        key_order, key = jax.random.split(key)

        def body(state, now):
            t, drawn = now
            return step(jax.random.fold_in(key, t), state, above, below, drawn)

        drawn = orders(key_order, steps, draws)
        return jax.lax.scan(body, state, (jnp.arange(steps), drawn))

    return program


def step_of(name, metrics=False):
    """The step of one of ours; without its metrics the compiler leaves them out."""

    def step(key, state, above, below, drawn):
        solver = SOLVERS[name](problem(above, below))
        state, told = solver.method.step(key, state, on_one_node(solver.batch(drawn)))
        return state, told if metrics else None

    return step
