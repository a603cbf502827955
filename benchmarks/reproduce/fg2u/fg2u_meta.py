"""Outer Adam on the mean hypergradient of a few tasks, on the clock."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dbojax as dbo


class Method(NamedTuple):
    """An estimator, the solver that judges it, and where its tasks come from."""

    hyper: dbo.Hypergradient
    inner: dbo.hypergradients.Inner  # adapts to the tasks that judge
    draw: Callable  # key -> tasks to learn from, stacked


class Run(NamedTuple):
    """Snapshots of one run on the clock."""

    steps: np.ndarray  # (snapshots,)
    seconds: np.ndarray  # (snapshots,), compilation left out
    x: dbo.base.Tree  # (snapshots, ...)
    bad: int  # estimates that came with a warning


def mean_estimate(method, key, x, y):
    """Mean of the estimates of all tasks of a draw, and how many were flagged."""
    key_draw, key_tasks = jax.random.split(key)
    batches = method.draw(key_draw)
    count = jax.tree.leaves(batches)[0].shape[0]

    def one(key, batch):
        state = method.hyper.init(x, y)
        hypergrad, _, _, info = method.hyper.estimate(key, x, y, state, batch)
        return hypergrad, info.ok

    found, ok = jax.vmap(one)(jax.random.split(key_tasks, count), batches)
    # A flagged estimate counts as zero.
    found = dbo.trees.where(ok, found, jax.tree.map(jnp.zeros_like, found))
    return dbo.node_mean(found), jnp.sum(~ok)


def learner(method, x, start_of_y):
    """Compiled ``(key, rate, carry, count) -> carry``; carry is made by `begin`."""

    def step(key, rate, carry):
        x, memory, done, bad = carry
        hypergrad, flagged = mean_estimate(
            method, jax.random.fold_in(key, done), x, start_of_y(x)
        )
        updates, memory = optax.adam(rate).update(hypergrad, memory)
        return optax.apply_updates(x, updates), memory, done + 1, bad + flagged

    def advance(key, rate, carry, count):
        return jax.lax.fori_loop(0, count, lambda _, c: step(key, rate, c), carry)

    example = jax.random.key(0), jnp.float32(0), begin(x), jnp.int32(1)
    return jax.jit(advance).lower(*example).compile()


def mebibytes(compiled):
    """Memory that a program needs beside what it takes and returns."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def begin(x):
    return x, optax.adam(1.0).init(x), jnp.int32(0), jnp.int32(0)


def on_the_clock(advance, key, rate, x, seconds, clock=time.perf_counter):
    """Learn for some seconds; snapshots after 0, 10, 20, 40, ... steps and at the end.

    ``clock`` may be `time.process_time`, where others keep the processor busy.
    """
    rate, carry = jnp.float32(rate), begin(x)
    done, spent, mark, snapshots = 0, 0.0, 10, [(0, 0.0, x)]
    pace = seconds
    while spent < seconds:
        left = max(1, int((seconds - spent) / pace))
        # One step first, to learn the pace; never past the next snapshot.
        count = 1 if done == 0 else min(left, mark - done)
        begun = clock()
        carry = jax.block_until_ready(advance(key, rate, carry, jnp.int32(count)))
        spent += clock() - begun
        done += count
        pace = spent / done
        if done == mark:
            snapshots.append((done, spent, carry[0]))
            mark *= 2
    if snapshots[-1][0] < done:
        snapshots.append((done, spent, carry[0]))
    steps, times, xs = zip(*snapshots, strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *xs)
    return Run(np.array(steps), np.array(times), stacked, int(carry[3]))


def best_rate(advance, key, rates, x, seconds, judge, clock=time.perf_counter):
    """The rate with the least loss after some seconds, ``judge(x) -> loss``."""
    losses = []
    for rate in rates:
        run = on_the_clock(advance, key, rate, x, seconds, clock)
        losses.append(float(judge(row(run.x, -1))))
    finite = np.where(np.isfinite(losses), losses, np.inf)
    return rates[int(np.argmin(finite))]


def best_snapshot(run, judge):
    """Number of the snapshot with the least finite loss."""
    losses = np.array([float(judge(row(run.x, i))) for i in range(len(run.steps))])
    return int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))


def clock_of(options):
    """The wall clock, or what the processor spent, and the name of its unit."""
    if options.cpu_time:
        return time.process_time, "processor seconds of all threads"
    return time.perf_counter, "seconds of wall clock"


def row(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def at_steps(run, steps):
    """Number of the snapshot after so many steps."""
    return int(np.flatnonzero(run.steps == steps)[0])


def common_steps(runs):
    """The greatest number of steps after which all runs have a snapshot."""
    return max(set.intersection(*(set(run.steps.tolist()) for run in runs)))


def spread(values, digits=3):
    """Mean and standard deviation."""
    values = np.asarray(values)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
