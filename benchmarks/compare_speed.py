"""All runs of a grid in one program, against one run at a time; compiling counts.

    python benchmarks/compare_speed.py

120 runs: 5 seeds x 4 upper steps x 3 graphs x 2 h of coefficient tuning on digits. The
program is that of `dbojax compare`, in which W and the steps are arguments. Against it:
a loop over `dbo.run`, as in the quickstart, where each run brings its own mixer and so
its own program; and a loop over one program that takes W and the steps as arguments,
which is as good as a loop can be. Of the loops a sample of runs is timed and scaled up.
"""

from environment import ensure

ensure(["tasks", "run", "plots"])

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from report import header, table

import dbojax as dbo
from dbojax import comparison
from dbojax.cli import GRAPHS, NODES

SEEDS, HS, UPPER = range(5), (0.0, 0.8), (3.0, 10.0, 30.0, 100.0)
LOWER = 0.125  # at which all methods converge
NAMES = ("c2dfb", "c2dfb-qsgd4", "ma-dsbo")


class Watch:
    """Wall clock and processor time since it was made, as an array of two."""

    def __init__(self):
        self.start = self.now()

    @staticmethod
    def now():
        return np.array([time.perf_counter(), time.process_time()])

    def read(self):
        return self.now() - self.start


def at_once(entry, tasks, matrices, key, steps, every):
    """Seconds for all runs, tracing and compiling included, and their accuracies."""
    watch = Watch()
    first = tasks[0]
    program = comparison.trajectories(
        entry, first.problem, first.judge, steps=steps, every=every
    )
    variants = [(upper, w) for w in matrices for upper in UPPER]
    settings = np.array([(upper, LOWER) for upper, _ in variants])
    found = program(
        comparison.keys_of(key, [*SEEDS] * len(HS)),
        np.repeat(settings[None], len(tasks), axis=0),
        np.stack([w for _, w in variants]),
        comparison.stacked(tasks),
    )
    return watch.read(), found.columns["test_accuracy"]


def loop_of_runs(entry, runs, key, steps, every):
    """Seconds of one run, each a program of its own, and the last accuracies."""
    ends, times = [], []
    for task, seed, w, upper in runs:
        watch = Watch()
        mix = dbo.mixing.mixer(w)
        method = entry.make(mix, task.problem, (upper, LOWER))
        start = dbo.replicate(task.x0, task.n), dbo.replicate(task.y0, task.n)
        _, history = dbo.run(
            method,
            jax.random.fold_in(key, seed),
            method.init(*start),
            task.batch,
            steps,
            evaluate=task.evaluate,
            every=every,
            stop_on_nonfinite=False,
        )
        times.append(watch.read())
        ends.append(history["test_accuracy"][-1])
    # The first one also compiles what all share.
    return np.mean(times[1:], axis=0), ends


def loop_of_calls(entry, runs, key, steps, every):
    """(seconds to compile, seconds of one call) of one program for one run."""
    task = runs[0][0]
    program = comparison.trajectories(
        entry, task.problem, task.judge, steps=steps, every=every
    )
    times = []
    for task, seed, w, upper in runs:
        watch = Watch()
        settings = jnp.array([[[upper, LOWER]]])
        own = comparison.stacked([task])
        program(comparison.keys_of(key, [seed]), settings, w[None], own)
        times.append(watch.read())
    return times[0], np.mean(times[1:], axis=0)


def sample(tasks, matrices, count):
    """Some of the runs, spread over the grid, and where each is in it."""
    grid = [(i, j) for i in range(len(tasks)) for j in range(len(matrices) * 4)]
    picked = [grid[k] for k in np.linspace(0, len(grid) - 1, count).astype(int)]
    runs = [
        (tasks[i], i % len(SEEDS), matrices[j // 4], UPPER[j % 4]) for i, j in picked
    ]
    return runs, picked


def speed(arguments=None):
    """Time, compare the numbers of both, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--sample", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=NAMES)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    study = comparison.studies()["coefficient_tuning"]
    tasks = [study.deal(seed, h) for h in HS for seed in SEEDS]
    graphs = ("ring", "two_hop", "erdos_renyi")
    matrices = [GRAPHS[name](NODES) for name in graphs]
    entries, key = comparison.roster(study.scales), jax.random.key(0)
    runs, where = sample(tasks, matrices, options.sample + 1)
    total = len(tasks) * len(matrices) * len(UPPER)
    rows = []
    for name in options.methods:
        entry = entries[name]
        pace = options.steps * entry.pace, options.every * entry.pace
        together, accuracy = at_once(entry, tasks, matrices, key, *pace)
        alone, ends = loop_of_runs(entry, runs, key, *pace)
        compiled, call = loop_of_calls(entry, runs, key, *pace)
        gaps = [
            abs(accuracy[*at, -1] - end) for at, end in zip(where, ends, strict=True)
        ]
        reused = compiled + (total - 1) * call
        kinds = {"wall": 0, "processor": 1}
        for kind, k in kinds.items():
            rows.append(
                {
                    "method": entry.label,
                    "clock": kind,
                    "one program, s": f"{together[k]:.1f}",
                    "loop of dbo.run, s": f"{total * alone[k]:.1f}",
                    "ratio": f"{total * alone[k] / together[k]:.1f}",
                    "loop of one program, s": f"{reused[k]:.1f}",
                    "its ratio": f"{reused[k] / together[k]:.1f}",
                    "largest gap": f"{max(gaps):.4f}",
                }
            )
        print(*rows[-2:], sep="\n", flush=True)
    lines = [
        "# A grid in one program",
        "",
        f"{header()}.",
        "",
        f"{total} runs of {options.steps} steps, an evaluation every {options.every}: "
        f"{len(SEEDS)} seeds x {len(UPPER)} upper steps x {len(graphs)} graphs "
        f"({', '.join(graphs)}) x h = {', '.join(f'{h:g}' for h in HS)}; coefficient "
        "tuning on digits, ten nodes. Tracing and compiling are included, dealing out "
        "the data is not; processor time is that of all cores, and does not mind other "
        f"work on the machine. Loops: {options.sample} runs spread over the grid, "
        "scaled to all, after one that is not counted (in the last loop it is, as the "
        "one that compiles). Gap: of the final test accuracies of the sampled runs, "
        "which were also run alone; a random compressor draws the same numbers.",
        "",
        *table(rows, left=2),
    ]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(speed())
