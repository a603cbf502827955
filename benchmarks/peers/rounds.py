"""Decentralised rounds on 8 nodes beside NumPy loops over nodes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import node_loops
import numpy as np
import optax
import turns
from report import quartiles

import dbojax as dbo

NODES, KEPT = 8, 0.1
GAMMA, STEP = 0.3, 0.1


class Size(NamedTuple):
    """Entries of a vector, samples of a node, rounds in one scan."""

    d: int
    samples: int
    rounds: int


class C2dfb(NamedTuple):
    """Settings of C²DFB."""

    penalty: float = 10.0
    inner_steps: int = 10
    upper_step: float = 0.01
    lower_step: float = 0.1


# A small model, one of the size of a9a, and one that does not fit into a cache.
SIZES = Size(20, 100, 200), Size(123, 100, 100), Size(10_000, 100, 4)
WEIGHTS = dbo.topology.metropolis(dbo.topology.ring(NODES))


def arguments(size, dtype):
    """Samples of the upper and the lower level, different at every node."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, NODES, size.samples, size.d))
    truth = rng.standard_normal(size.d) + 0.5 * rng.standard_normal((NODES, size.d))
    targets = np.sign(np.einsum("lnmd,nd->lnm", inputs, truth))
    inputs = inputs / np.sqrt(size.d)
    levels = zip(inputs, targets, strict=True)
    return tuple((a.astype(dtype), t.astype(dtype)) for a, t in levels)


def fit(y, samples):
    inputs, targets = samples
    return jnp.mean(dbo.tasks.logistic_loss(targets * (inputs @ y)))


def upper(x, y, samples):
    del x
    return fit(y, samples)


def lower(x, y, samples):
    return fit(y, samples) + jnp.sum(jnp.exp(x) * y**2)


class Program(NamedTuple):
    """A start and what one round makes of it, for both sides."""

    start: object
    step: Callable  # (key, state, data) -> state; state -> state in NumPy
    values: Callable  # state -> stacked values to compare


def moved(strategy, size, dtype):
    """A single-level method of ours: directions, then a move of the strategy."""

    def step(key, state, data):
        v, memory = state
        direction = strategy.lift(jax.grad(fit))(v, data[1])
        v, memory, _ = strategy.update(key, v, direction, memory)
        return v, memory

    start = jnp.zeros((NODES, size.d), dtype)
    return Program((start, strategy.init(start)), step, lambda state: state[0])


def channels():
    mix = dbo.mixing.mixer(WEIGHTS)
    top = dbo.compressors.top_k(KEPT)
    return dbo.channels.exact(mix), dbo.channels.reference_point(mix, top, GAMMA)


def our_dsgd(size, dtype):
    wire, _ = channels()
    return moved(dbo.strategies.diffusion_cta(wire, optax.sgd(STEP)), size, dtype)


def our_tracking(size, dtype):
    _, compressed = channels()
    move = dbo.strategies.gradient_tracking(compressed, optax.sgd(STEP))
    return moved(move, size, dtype)


def our_c2dfb(size, dtype):
    outer, inner = channels()
    method = dbo.algorithms.c2dfb(
        dbo.Problem(upper, lower), outer=outer, inner=inner, **C2dfb()._asdict()
    )

    def step(key, state, data):
        return method.step(key, state, dbo.Batch(*data))[0]

    y = jnp.zeros((NODES, size.d), dtype)
    x = jnp.full_like(y, -5.0)
    return Program(method.init(x, y), step, lambda state: state.y)


def node_samples(samples):
    return list(zip(*samples, strict=True))


def numpy_start(size, dtype):
    return [np.zeros(size.d, dtype) for _ in range(NODES)]


def numpy_links():
    kept = node_loops.heard(WEIGHTS)

    def compressed(size):
        k = int(np.ceil(KEPT * size.d - 1e-9))
        return node_loops.reference_point(kept, GAMMA, node_loops.top_k(k))

    return kept, compressed


def numpy_dsgd(size, dtype):
    links, _ = numpy_links()
    samples = node_samples(arguments(size, dtype)[1])

    def step(state):
        return node_loops.dsgd(links, STEP, state, samples)

    return Program(numpy_start(size, dtype), step, np.array)


def numpy_tracking(size, dtype):
    _, compressed = numpy_links()
    send, samples = compressed(size), node_samples(arguments(size, dtype)[1])

    def step(state):
        slopes = [node_loops.slope(*of) for of in zip(state[0], samples, strict=True)]
        return node_loops.tracking(send, STEP, state, slopes)

    start = node_loops.tracked(numpy_start(size, dtype))
    return Program(start, step, lambda state: np.array(state[0]))


def numpy_c2dfb(size, dtype):
    links, compressed = numpy_links()
    outer, inner = node_loops.dense(links, 1.0), compressed(size)
    samples = [node_samples(level) for level in arguments(size, dtype)]

    def step(state):
        return node_loops.c2dfb(outer, inner, C2dfb(), state, samples)

    y = numpy_start(size, dtype)
    levels = [one - 5 for one in y], y, y
    start = tuple(node_loops.tracked(level) for level in levels)
    return Program(start, step, lambda state: np.array(state[1][0]))


METHODS = {
    "DSGD, dense": (our_dsgd, numpy_dsgd),
    "gradient tracking, top-k 10 %": (our_tracking, numpy_tracking),
    "C2DFB, top-k 10 %, 10 inner rounds": (our_c2dfb, numpy_c2dfb),
}


def scanned(program, size, dtype):
    """A blocked call of all rounds, and what tells the values after it."""
    data = jax.tree.map(jnp.asarray, arguments(size, dtype))

    def run(state, key, data):
        def body(state, t):
            return program.step(jax.random.fold_in(key, t), state, data), None

        return jax.lax.scan(body, state, jnp.arange(size.rounds))

    args = program.start, jax.random.key(0), data
    compiled = jax.jit(run, donate_argnums=0).lower(*args).compile()
    call, state = turns.donated(compiled, *args)
    return call, lambda: np.asarray(program.values(state()))


def looped(program, size):
    kept = [program.start]

    def call():
        for _ in range(size.rounds):
            kept[0] = program.step(kept[0])

    return call, lambda: program.values(kept[0])


def contenders(name, size, dtype):
    """Who -> (call, values)."""
    ours, theirs = METHODS[name]
    return {
        "dbojax": scanned(ours(size, dtype), size, dtype),
        "NumPy, node by node": looped(theirs(size, dtype), size),
    }


def after_one(made):
    """Values of each side after one call, from the start."""
    for call, _ in made.values():
        call()
    return [values() for _, values in made.values()]


def exact(name, size):
    with jax.enable_x64(True):
        return after_one(contenders(name, size, np.float64))


def rows(repeats, sizes=SIZES):
    for name in METHODS:
        for size in sizes:
            wide, made = exact(name, size)[0], contenders(name, size, np.float32)
            narrow = after_one(made)
            calls = {who: call for who, (call, _) in made.items()}
            times = turns.taken_in_turns(calls, repeats)
            for who, values in zip(calls, narrow, strict=True):
                each = np.multiply(times[who], 1e6 / size.rounds)
                yield {
                    "round": name,
                    "who": who,
                    "d": size.d,
                    "samples of a node": size.samples,
                    "us": quartiles(each, 1),
                    "time / dbojax": turns.times_base(times, who, "dbojax"),
                    "error to float64": f"{turns.distance(values, wide):.0e}",
                }
