"""One compiled program for all runs of one method: cases, step sizes and graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Algorithm, Calls, Problem, Traffic
from dbojax.comparison.roster import Entry
from dbojax.comparison.studies import Cases
from dbojax.mixing import dense, mixer
from dbojax.tasks.task import Task
from dbojax.trees import node_mean, replicate


class Trajectories(NamedTuple):
    """What all runs of one method left behind."""

    columns: dict[str, np.ndarray]  # (cases, variants, evaluations)
    traffic: Traffic  # of one step on one link: `total` equals `message`
    calls: Calls  # of one step


def trajectories(
    entry: Entry, problem: Problem, judge: Callable, *, steps: int, every: int
) -> Callable[..., Trajectories]:
    """Compile-once function of all runs of one method.

    Args:
        entry: the method.
        problem: objectives that all cases share.
        judge: ``(x, y, batch, held) -> scores``, called on the mean over the nodes.
        steps: of each run.
        every: steps from one evaluation to the next.

    Returns:
        ``(keys, settings, w, cases) -> Trajectories`` with keys ``(cases,)``, settings
        ``(cases, variants, 2)`` and mixing matrices ``(variants, n, n)``. A run equals
        ``dbo.run`` with the same key and ``dbo.mixing.dense(w)`` to rounding. Calls
        with the same shapes share one program.

    Raises:
        ValueError: if ``steps`` is not a positive multiple of ``every``.

    Examples:
        Two graphs in one program; the nodes agree better where all hear all:

        >>> topology, c = dbo.topology, dbo.comparison
        >>> task = dbo.tasks.quadratic(n=4, dx=2, dy=3)
        >>> def judge(x, y, batch, held):
        ...     return {"size": jnp.sum(x**2)}
        >>> task = task._replace(judge=judge, held=())
        >>> run = trajectories(
        ...     c.roster()["d-soba"], task.problem, judge, steps=20, every=10
        ... )
        >>> w = np.stack([topology.metropolis(g(4))
        ...               for g in (topology.ring, topology.complete)])
        >>> keys = jax.random.split(jax.random.key(0), 1)
        >>> found = run(keys, np.full((1, 2, 2), 0.05), w, c.stacked([task]))
        >>> ring, complete = found.columns["consensus_x"][0, :, -1]
        >>> bool(complete < ring), found.columns["size"].shape
        (True, (1, 2, 2))
    """
    if min(steps, every) < 1 or steps % every:
        right = max(every, 1) * max(1, steps // max(every, 1))
        raise ValueError(
            f"`steps` must be a positive multiple of `every`, got steps={steps}, "
            f"every={every}. Write e.g. steps={right}, every={max(every, 1)}."
        )

    def one(key, settings, w, case: Cases):
        # One link: bytes over all links are what the host makes of the graph's.
        method = entry.make(dense(w, links=1), problem, (settings[0], settings[1]))
        n = w.shape[0]
        state = method.init(replicate(case.x0, n), replicate(case.y0, n))
        return _scan(method, judge, key, state, case, steps, every)

    over_variants = jax.vmap(one, (None, 0, 0, None))

    @jax.jit
    def program(keys, settings, w, cases):
        if jax.default_backend() != "cpu":
            return jax.vmap(over_variants, (0, 0, None, 0))(keys, settings, w, cases)
        # One after the other a case's data stay in the cache: 10 to 30 % less time.
        rows = keys, settings, cases
        return jax.lax.map(lambda row: over_variants(row[0], row[1], w, row[2]), rows)

    def run(keys, settings, w, cases):
        out = program(keys, jnp.asarray(settings), jnp.asarray(w), cases)
        columns, traffic, calls = jax.block_until_ready(out)
        columns = {name: np.asarray(v, float) for name, v in columns.items()}
        return Trajectories(columns, traffic, calls)

    return run


def _scan(method: Algorithm, judge, key, state, case: Cases, steps, every):
    step_key, _ = jax.random.split(key)  # as `dbo.run` does

    def step(state, t):
        return method.step(jax.random.fold_in(step_key, t), state, case.batch)

    def chunk(state, first):
        times = first + jnp.arange(every, dtype=jnp.int32)
        state, metrics = jax.lax.scan(step, state, times)
        scores = judge(node_mean(state.x), node_mean(state.y), case.batch, case.held)
        last = jax.tree.map(lambda leaf: leaf[-1], metrics)
        measured = {
            "upper": last.upper,
            "hypergrad_norm": last.hypergrad_norm,
            "consensus_x": last.consensus.x,
            "consensus_y": last.consensus.y,
        }
        return state, ({**measured, **scores}, metrics.traffic, metrics.calls)

    firsts = jnp.arange(0, steps, every, dtype=jnp.int32)
    return jax.lax.scan(chunk, state, firsts)[1]


def seconds_per_step(
    entry: Entry,
    task: Task,
    w: np.ndarray,
    settings: tuple[float, float],
    *,
    steps: int = 20,
    repeats: int = 5,
) -> float:
    """Time of a step of one run by itself: all nodes, one machine, compiling apart.

    Args:
        entry: the method.
        task: what it runs on.
        w: mixing matrix.
        settings: upper and lower step.
        steps: per measurement.
        repeats: measurements; the median counts.
    """
    method = entry.make(mixer(w), task.problem, settings)

    @jax.jit
    def program(key, state, batch):
        def step(state, t):
            state, metrics = method.step(jax.random.fold_in(key, t), state, batch)
            return state, metrics.upper

        return jax.lax.scan(step, state, jnp.arange(steps))

    start = replicate(task.x0, task.n), replicate(task.y0, task.n)
    batch = jax.tree.map(jnp.asarray, task.batch)
    arguments: Any = (jax.random.key(0), method.init(*start), batch)
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - begin)
    return float(np.median(times)) / steps
