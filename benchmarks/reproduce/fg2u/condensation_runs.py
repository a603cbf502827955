"""Outer Adam on the clock, for every hypergradient of the condensation benchmark."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dbojax as dbo

h = dbo.hypergradients
MARKS = 12  # moments of a run at which x is kept
FRESH, IMAGES = 8, 2048  # networks and real images that h is a mean over
ADAM = optax.scale_by_adam()


class Bench(NamedTuple):
    """What all methods share; all of it compiled."""

    task: dbo.tasks.Condensation
    draw: Callable  # (key, step) -> batch
    loss: Callable  # stacked x -> h of each
    accuracy: Callable  # (keys, stacked x) -> test accuracy of a network on each
    clock: Callable
    options: object


class Program(NamedTuple):
    """A compiled estimate ``(key, x, state, batch) -> (hypergradient, state, ok)``."""

    estimate: Callable
    state: dbo.base.State
    mebibytes: float


class Run(NamedTuple):
    """x at some moments, the start first."""

    x: jax.Array  # (moments, ...)
    seconds: np.ndarray
    steps: int
    flagged: int  # estimates that came with a warning


class Tuned(NamedTuple):
    """All seeds of a method at its best outer step; arrays (seeds, moments)."""

    rate: float
    runs: list
    loss: np.ndarray  # h
    along: np.ndarray  # test accuracy of one network at each moment
    accuracy: np.ndarray  # (seeds * networks,), at the end


class Pair(NamedTuple):
    """One phase against two, from the same start: h, and seconds to the same h."""

    one: float
    between: float
    two: float
    seconds: float
    reached: float


def inner_solver(task, options):
    """T steps from a fresh network, drawn from the key of the estimate."""
    rates = optax.cosine_decay_schedule(options.inner_rate, options.depth)
    return h.descent(
        task.problem,
        optax.sgd(rates, momentum=0.9),
        options.depth,
        start=lambda key, x, y: task.init(key),
    )


def methods(task, options):
    """Label -> estimator."""
    problem, inner = task.problem, inner_solver(task, options)
    b, chunk = options.directions, min(options.chunk, options.directions)
    return {
        f"truncated, s = {options.last}": h.truncated(problem, inner, options.last),
        "Hessian-free": h.hessian_free(problem, inner=inner),
        "Neumann, K = 20": h.neumann(problem, 20, options.alpha, inner=inner),
        f"(FG)²U, b = {b}": h.forward_gradient(problem, inner, b, chunk),
        "exact reverse, checkpointed": h.checkpointed(problem, inner),
    }


def bench(task, options):
    """Compile what does not depend on the method."""
    sampler, inner = task.sampler(IMAGES), inner_solver(task, options)
    batch, solve = sampler(jax.random.key(11), 0), h.solver(inner)
    networks = jax.random.split(jax.random.key(12), FRESH)

    def loss(x):
        def one(key):
            y = solve(key, x, task.init(key), batch)
            return task.problem.upper(x, y, batch.upper)

        return jnp.mean(jax.lax.map(one, networks))

    def accuracy(pair):
        return task.evaluate(*pair)["test_accuracy"]

    return Bench(
        task,
        jax.jit(task.sampler(options.batch)),
        jax.jit(lambda xs: jax.lax.map(loss, xs)),
        jax.jit(lambda keys, xs: jax.lax.map(accuracy, (keys, xs))),
        time.process_time if options.cpu_time else time.perf_counter,
        options,
    )


def program(bench, hyper):
    key = jax.random.key(0)
    x, y = bench.task.noise(key), bench.task.init(key)  # y only tells its shape
    state, batch = hyper.init(x, y), bench.draw(key, 0)

    def estimate(key, x, state, batch):
        hypergrad, _, state, info = hyper.estimate(key, x, y, state, batch)
        return hypergrad, state, info.ok

    compiled = jax.jit(estimate).lower(key, x, state, batch).compile()
    jax.block_until_ready(compiled(key, x, state, batch))
    size = compiled.memory_analysis().temp_size_in_bytes
    return Program(compiled, state, size / 2**20)


@jax.jit
def adam(x, memory, hypergrad, rate):
    updates, memory = ADAM.update(hypergrad, memory)
    return jnp.clip(x - rate * updates, 0, 1), memory


def for_seconds(seconds):
    """Progress of a run that ends after some time."""
    return lambda spent, steps: spent / seconds


def for_steps(limit):
    """Progress of a run that ends after some steps."""
    return lambda spent, steps: steps / limit


def learn(bench, one, key, x, rate, progress):
    """Outer Adam until ``progress(seconds, steps)`` is one; its step falls to zero."""
    memory, state, spent, steps, flagged = ADAM.init(x), one.state, 0.0, 0, 0
    jax.block_until_ready(adam(x, memory, x, 0.0))  # compiles
    key_data, key_steps = jax.random.split(key)
    moments = np.arange(1, MARKS + 1) / MARKS
    kept, times = [x], [0.0]
    while (done := progress(spent, steps)) < 1:
        begin = bench.clock()
        key, batch = jax.random.fold_in(key_steps, steps), bench.draw(key_data, steps)
        hypergrad, state, ok = one.estimate(key, x, state, batch)
        x, memory = adam(x, memory, hypergrad, rate * (1 - done))
        jax.block_until_ready(x)
        spent += bench.clock() - begin
        steps += 1
        flagged += not bool(ok)
        while len(kept) <= MARKS and progress(spent, steps) >= moments[len(kept) - 1]:
            kept.append(x)
            times.append(spent)
    return Run(jnp.stack(kept), np.array(times), steps, flagged)


def start_of(bench, seed):
    key_x, key_run = jax.random.split(jax.random.fold_in(jax.random.key(1), seed))
    return bench.task.noise(key_x), key_run


def judged(bench, keys, xs):
    """Test accuracy of networks on each x."""
    return np.asarray(bench.accuracy(keys, xs))


def tuned(bench, one, progress):
    """All seeds at the outer step with which the first seed ends lowest."""

    def run(seed, rate):
        x, key = start_of(bench, seed)
        return learn(bench, one, key, x, rate, progress)

    trials = {rate: run(0, rate) for rate in bench.options.rates}
    ends = {rate: float(bench.loss(trial.x)[-1]) for rate, trial in trials.items()}
    rate = min(ends, key=lambda rate: np.nan_to_num(ends[rate], nan=np.inf))
    found = [trials[rate], *(run(s, rate) for s in range(1, bench.options.seeds))]
    last = [run.x[-1] for run in found for _ in range(bench.options.nets)]
    keys = jax.random.split(jax.random.key(21), len(last))
    along = jax.random.split(jax.random.key(22), MARKS + 1)
    return Tuned(
        rate,
        found,
        np.stack([np.asarray(bench.loss(run.x)) for run in found]),
        np.stack([judged(bench, along, run.x) for run in found]),
        judged(bench, keys, jnp.stack(last)),
    )


def baseline(bench, draw):
    """Test accuracy on images that nobody has learnt."""
    count = bench.options.seeds * bench.options.nets
    keys = jax.random.split(jax.random.key(31), count)
    return judged(bench, keys, jnp.stack([draw(key) for key in keys]))


def cosine(a, b):
    lengths = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return float(jnp.vdot(a, b) / jnp.maximum(lengths, 1e-30))


def cosines(bench, programs):
    """Rows: cosines to the exact one at noise and at real images, and milliseconds."""
    *_, exact = programs.values()
    points = {"noise": bench.task.noise, "real images": bench.task.images}
    keys = jax.random.split(jax.random.key(41), FRESH)
    for name, one in programs.items():
        row, spent = {"method": name}, []
        for place, draw in points.items():
            found = []
            for key in keys:
                x, batch = draw(key), bench.draw(key, 0)
                truth = exact.estimate(key, x, exact.state, batch)[0]
                jax.block_until_ready(truth)
                begin = bench.clock()
                estimate = one.estimate(key, x, one.state, batch)[0]
                jax.block_until_ready(estimate)
                spent.append(bench.clock() - begin)
                found.append(cosine(estimate, truth))
            row[f"cosine at {place}"] = f"{np.mean(found):.2f}"
        yield row | {"ms": f"{1e3 * np.median(spent):.1f}"}


def crossing(seconds, losses, target):
    """When a curve first comes down to a target, by straight lines; or infinity."""
    under = np.flatnonzero(losses <= target)
    if not under.size:
        return np.inf
    if under[0] == 0:
        return seconds[0]
    i = under[0]
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])


def two_phases(bench, cheap, good, rates, known):
    """A cheap estimator for a share of the time, then a good one; or that one alone.

    ``known`` are runs of the good one alone from the first seeds.
    """
    total = bench.options.seconds
    for seed in range(bench.options.two_phase_seeds):
        x, key = start_of(bench, seed)
        early = for_seconds(bench.options.first * total)
        first = learn(bench, cheap, key, x, rates[0], early)
        late = for_seconds(total - first.seconds[-1])
        again = jax.random.fold_in(key, 1)
        second = learn(bench, good, again, first.x[-1], rates[1], late)
        alone = (
            known[seed]
            if seed < len(known)
            else learn(bench, good, key, x, rates[1], for_seconds(total))
        )
        one, between, two = (
            np.asarray(bench.loss(run.x)) for run in (alone, first, second)
        )
        seconds = np.append(first.seconds, first.seconds[-1] + second.seconds[1:])
        reached = crossing(seconds, np.append(between, two[1:]), one[-1])
        yield Pair(one[-1], between[-1], two[-1], alone.seconds[-1], reached)
