"""The solvers on a task of `objectives.py`, by dbojax on one node."""

import functools
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from objectives import block

import dbojax as dbo

STEP, TERMS, ROUNDS = 0.1, 10, 10
RATE = 0.5  # of recursive momentum


def problem(task, above, below):
    """The objectives on all data; a batch is the number of a block, or several."""

    def on(objective, data):
        def value(x, y, drawn):
            # SABA looks at one sample, here a whole block, with a sample axis.
            return objective(x, y, block(data, jnp.ravel(drawn)[0]))

        return value

    return dbo.Problem(on(task.upper, above), on(task.lower, below))


def orders(key, task, levels):
    """Numbers of the blocks, (steps, levels): every epoch goes through all of them."""
    keys = jax.random.split(key, (levels, task.epochs))
    shuffled = jax.vmap(jax.vmap(lambda k: jax.random.permutation(k, task.blocks)))(
        keys
    )
    return shuffled.reshape(levels, -1).T


def decay(step):
    """The step size that benchopt's SOBA takes."""
    return STEP / jnp.sqrt(1.0 + step)


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


def soba(of, task):
    del task
    mix = dbo.mixing.averaging(1)
    method = dbo.algorithms.soba(of, mix=mix, upper_step=decay, lower_step=decay)
    return Solver(method, one_each, draws=2)


def saba(of, task):
    """A whole block is what it remembers as one sample, as benchopt's does."""

    def batch(drawn):
        size = jnp.asarray(task.blocks)
        return dbo.Batch(*(dbo.Indexed(one, one, size) for one in drawn[:, None]))

    method = dbo.algorithms.saba(
        of,
        mix=dbo.mixing.averaging(1),
        num_upper=task.blocks,
        num_lower=task.blocks,
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


def stocbio(of, task):
    """SGD on y, then a step of x along the series."""
    del task
    a = dbo.algorithms
    x, y, z = moves(STEP, STEP, STEP)
    below, above = a.Phase(y=y, z=z, times=ROUNDS), a.Phase(x=x)
    method = a.compose(of, series(of), below, above)

    def batch(drawn):
        # The rounds do not look at their upper part.
        inner = dbo.Batch(drawn[:ROUNDS], drawn[:ROUNDS, None])
        return dbo.Rounds(one_and_several(drawn[ROUNDS:]), inner)

    return Solver(method, batch, draws=ROUNDS + TERMS + 2)


def mrbo(of, task):
    """Recursive momentum on the directions of the series."""

    def slower(step):
        return STEP / (1.0 + step) ** (1 / 3)

    x, y, z = moves(slower, slower, slower)
    oracle = dbo.oracles.storm(series(of), RATE, together=task.heavy)
    method = dbo.algorithms.single_loop(of, x=x, y=y, z=z, oracle=oracle)
    return Solver(method, one_and_several, draws=TERMS + 2)


SOLVERS = types.MappingProxyType(
    {"SOBA": soba, "SABA": saba, "stocBiO": stocbio, "MRBO": mrbo}
)


def scanned(task, step, draws):
    """``(state, key, above, below) -> (state, told)`` by a scan over shuffled epochs.

    ``step`` takes (key, state, above, below, numbers of blocks).
    """

    def program(state, key, above, below):
        key_order, key = jax.random.split(key)

        def body(state, now):
            t, drawn = now
            return step(jax.random.fold_in(key, t), state, above, below, drawn)

        drawn = orders(key_order, task, draws)
        return jax.lax.scan(body, state, (jnp.arange(len(drawn)), drawn))

    return program


def made(name, task, above, below):
    """One of ours on the data of both levels."""
    return SOLVERS[name](problem(task, above, below), task)


def step_of(name, task, metrics=False):
    """The step of one of ours; without its metrics the compiler leaves them out."""

    def step(key, state, above, below, drawn):
        solver = made(name, task, above, below)
        state, told = solver.method.step(key, state, on_one_node(solver.batch(drawn)))
        return state, told if metrics else None

    return step
