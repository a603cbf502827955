"""Run a comparison: tune everybody alike, then fill the cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dbojax.base import check_mixing_matrix
from dbojax.comparison.cells import Cell
from dbojax.comparison.programs import Trajectories, seconds_per_step, trajectories
from dbojax.comparison.roster import Entry
from dbojax.comparison.studies import Study, stacked
from dbojax.comparison.tuning import Grid, Tuned, keys_of, tune
from dbojax.mixing import mixer
from dbojax.runner import History
from dbojax.tasks.task import Task


class Plan(NamedTuple):
    """How much of everything; one plan for all methods."""

    graphs: Mapping[str, np.ndarray]  # mixing matrices; steps are tuned on the first
    hs: tuple[float, ...] = (0.0, 0.8)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    steps: int = 100  # of a method of pace 1, in tuning as in the table
    every: int = 2
    grid: Grid = Grid()


class Outcome(NamedTuple):
    """What one method did on one task."""

    cells: list[Cell]
    tuned: list[Tuned]  # one per heterogeneity
    step_seconds: float  # of one run by itself


def outcomes(
    study: Study, roster: Mapping[str, Entry], plan: Plan, key: jax.Array
) -> Iterator[tuple[str, Outcome]]:
    """Tune and run each entry in turn; tuning is one program, the table another.

    Args:
        study: the task.
        roster: who takes part.
        plan: how much.
        key: of all randomness; seed s runs with ``fold_in(key, s)``.

    Yields:
        The name of an entry, and what it did.

    Raises:
        ValueError: if the plan is impossible, entries share a label, or a task is not
            judged as :class:`Study` says.
    """
    _check(plan)
    _check_once([entry.label for entry in roster.values()], "entry's label")
    if not roster:
        return
    tuning = _dealt(study, plan.hs, plan.tuning_seeds)
    table = _dealt(study, plan.hs, plan.seeds)
    _check_judge(table[0])
    first = next(iter(plan.graphs.values()))
    for entry, w in itertools.product(roster.values(), plan.graphs.values()):
        # Says so before any run where a method does not work over a graph.
        entry.make(mixer(w), table[0].problem, entry.centre)
    for name, entry in roster.items():
        chosen = _tuned(entry, plan, key, tuning)
        found = _all_runs(entry, plan, key, table, chosen)
        seconds = seconds_per_step(
            entry, table[0], first, chosen[0].settings, steps=10 * entry.pace
        )
        cells = _cells(study.name, entry, plan, found, chosen, seconds)
        yield name, Outcome(cells, chosen, seconds)


def _check(plan: Plan) -> None:
    if not (plan.graphs and plan.hs and plan.seeds and plan.tuning_seeds):
        raise ValueError(
            "A plan needs a graph, a heterogeneity, a seed and a tuning seed at least; "
            f"got {plan}."
        )
    both = sorted(set(plan.seeds) & set(plan.tuning_seeds))
    if both:
        raise ValueError(
            f"Seeds {both} would both tune and judge. Keep `tuning_seeds` apart from "
            "`seeds`, e.g. tuning_seeds=(1000, 1001)."
        )
    for name in ("hs", "seeds", "tuning_seeds"):
        _check_once(getattr(plan, name), f"value of `{name}`")
    if min(plan.steps, plan.every) < 1 or plan.steps % plan.every:
        raise ValueError(
            "A plan's `steps` are a positive multiple of `every`, got "
            f"{plan.steps} and {plan.every}."
        )
    sizes = {len(check_mixing_matrix(w)) for w in plan.graphs.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"All graphs of a plan need the same nodes, got {sorted(sizes)}."
        )


def _check_once(values: Sequence, what: str) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"Each {what} may come once in a plan, got {tuple(values)}.")


def _check_judge(task: Task) -> None:
    """Refuse what would be missed after hours; nothing is computed."""
    if task.judge is None:
        return  # `stacked` says it
    scores = jax.eval_shape(task.judge, task.x0, task.y0, task.batch, task.held)
    missing = {"validation_loss", "test_accuracy"} - set(scores)
    if missing:
        raise ValueError(
            f"`judge` must give {sorted(missing)} too, by which steps are tuned and "
            f"methods are judged; it gives {sorted(scores)}."
        )


def _dealt(study: Study, hs, seeds) -> list[Task]:
    """Heterogeneity first, then seeds."""
    return [study.deal(seed, h) for h in hs for seed in seeds]


def _program(entry: Entry, task: Task, steps: int, every: int):
    problem, judge = task.problem, task.judge
    assert judge is not None  # `stacked` has seen to it
    pace = entry.pace
    return trajectories(entry, problem, judge, steps=steps * pace, every=every * pace)


def _tuned(entry: Entry, plan: Plan, key, tasks) -> list[Tuned]:
    cases, groups = stacked(tasks), len(plan.hs)
    seeds = len(plan.tuning_seeds)
    program = _program(entry, tasks[0], plan.steps, _seldom(plan))
    w = next(iter(plan.graphs.values()))
    keys = keys_of(key, plan.tuning_seeds * groups)

    def losses(pairs):
        settings = np.repeat(pairs, seeds, axis=0)
        matrices = np.repeat(w[None], pairs.shape[1], axis=0)
        found = program(keys, settings, matrices, cases)
        # The mean over the run asks for speed, and punishes what swings.
        means = found.columns["validation_loss"].mean(-1)
        return means.reshape(groups, seeds, -1)

    return tune(losses, plan.grid, entry.centre, groups)


def _seldom(plan: Plan) -> int:
    """Steps between the ten or so evaluations of a tuning run."""
    count = plan.steps // plan.every
    apart = next(k for k in range(max(1, count // 10), 0, -1) if count % k == 0)
    return apart * plan.every


def _all_runs(entry: Entry, plan: Plan, key, tasks, chosen) -> Trajectories:
    """All seeds, heterogeneities and graphs at once, each h with its own steps."""
    program = _program(entry, tasks[0], plan.steps, plan.every)
    pairs = np.array([tuned.settings for tuned in chosen])
    settings = np.repeat(pairs, len(plan.seeds), axis=0)[:, None]
    settings = np.repeat(settings, len(plan.graphs), axis=1)
    keys = keys_of(key, plan.seeds * len(plan.hs))
    return program(keys, settings, np.stack([*plan.graphs.values()]), stacked(tasks))


def links(w: np.ndarray) -> int:
    """Directed edges of a mixing matrix that carry a message."""
    return int(np.count_nonzero(w) - np.count_nonzero(np.diag(w)))


def _cells(task: str, entry: Entry, plan: Plan, found: Trajectories, chosen, seconds):
    if found.traffic.total != found.traffic.message:
        raise ValueError(
            f"`{entry.label}` sends other bytes over a link than its messages hold, so "
            "bytes over a graph cannot be counted. Build all its channels on the `mix` "
            "that `make` is given."
        )

    def cell(i, h, j, graph, w):
        rows = slice(i * len(plan.seeds), (i + 1) * len(plan.seeds))
        scores = {name: v[rows, j].T for name, v in found.columns.items()}
        counts = _counts(entry, plan, found, links(w), seconds)
        who = (task, entry.method, entry.message, entry.dense, graph, h, plan.seeds)
        steps = chosen[i].settings, chosen[i].edge
        return Cell(*who, *steps, History({**counts, **scores}))

    return [
        cell(i, h, j, graph, w)
        for i, h in enumerate(plan.hs)
        for j, (graph, w) in enumerate(plan.graphs.items())
    ]


def _counts(entry: Entry, plan: Plan, found: Trajectories, edges: int, seconds: float):
    every = plan.every * entry.pace
    step = every * np.arange(1, plan.steps // plan.every + 1)
    return {
        "step": step,
        "message_bytes": step * found.traffic.message,
        "total_bytes": step * found.traffic.message * edges,
        "rounds": step * found.traffic.rounds,
        "gradients": step * found.calls.gradients,
        "products": step * found.calls.products,
        "seconds": step * seconds,
    }
