"""Floors of RABO and RAFBO on the federated toy, by rule of the sub-models.

    python benchmarks/reproduce/rabo/toy.py
    python benchmarks/reproduce/rabo/toy.py --rounds 1000 --only "full, K = 1" static

Twelve clients, three of each capacity 1, 3/4, 1/2, 1/4; every entry of x and y is a
unit of its own. The true hypergradient is that of the problem which the method solves:
one lower solution for all (RAFBO), or one for each client (RABO).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["tasks", "plots"])

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from report import header, table, write_csv
from toy_common import CAPACITIES, spread, stacked, watched

import dbojax as dbo

s = dbo.submodels
STEPS: dict[str, Any] = {"upper_step": 0.05, "lower_step": 0.1, "linear_step": 0.1}
WIDTH, EVERY = 1e-4, 10
FULL = "full, K = 1"
CASES = ("heterogeneous", "identical")
METHODS = {"RAFBO": dbo.algorithms.rafbo, "RABO": dbo.algorithms.rabo}
MOVING = ("rolling", "staggered", "random", "coverage-aware")
RADII = 10.0 ** -np.arange(0, 11, 2)


def settings(layout, rounds):
    """Label -> (rule, whether all are of capacity 1, further settings)."""
    own = np.tile(CAPACITIES, 3)
    searched = s.coverage_aware(layout, own, rounds=24)
    fifth = {name: step / 5 for name, step in STEPS.items()}
    return {
        FULL: (s.static(), True, {}),
        "full, K = 5": (s.static(), True, {"local_steps": 5, **fifth}),
        "static": (s.static(), False, {}),
        "magnitude": (s.magnitude(), False, {}),
        "rolling": (s.rolling(), False, {}),
        "staggered": (s.staggered(), False, {}),
        "random": (s.random_units(0), False, {}),
        "coverage-aware": (searched, False, {}),
        "static, keep": (s.static(), False, {"keep": True}),
        "staggered, keep": (s.staggered(), False, {"keep": True}),
    }


def problems(seeds):
    """All seeds of both cases, in one batch of runs."""
    return stacked(
        [
            dbo.tasks.federated_toy(identical=case == "identical", seed=seed)
            for case in CASES
            for seed in range(seeds)
        ]
    )


def solve(label, setting, name, toys, options):
    rule, whole, further = setting
    capacities = np.ones(12) if whole else np.tile(CAPACITIES, 3)
    layout = s.coordinates(toys.x[0, 0], toys.y[0, 0])
    method = METHODS[name](
        dbo.tasks.federated_toy().problem,
        s.fleet(layout, capacities, rule),
        perturbation=WIDTH,
        extracted=False,
        **(STEPS | further),
    )
    method = dbo.vmapped(method, toys.runs)
    begin = time.perf_counter()
    squares, coverage = watched(
        method,
        name == "RABO",
        options.rounds,
        EVERY,
        jax.random.key(0),
        method.init(toys.x, toys.y),
        toys.batch,
        toys.batch,
    )
    squares = np.asarray(squares).reshape(-1, len(CASES), options.seeds)
    seconds = time.perf_counter() - begin
    print(f"  {name}, {label}: {seconds:.0f} s", flush=True)
    return squares, int(coverage.x)


def solve_all(options):
    toys = problems(options.seeds)
    layout = s.coordinates(toys.x[0, 0], toys.y[0, 0])
    chosen = settings(layout, options.rounds)
    return {
        (name, label): solve(label, chosen[label], name, toys, options)
        for name in options.methods
        for label in options.only or chosen
    }


def floors(squares):
    """Mean over the last third of the rounds, (cases, seeds)."""
    return squares[-len(squares) // 3 :].mean(0)


def rows_of(found, name):
    for (method, label), (squares, coverage) in found.items():
        if method == name:
            row = {"clients hold": label, "C_x*": coverage}
            for case, floor in zip(CASES, floors(squares), strict=True):
                row[case] = spread(floor)
            yield row


def verdicts(found, name, seeds):
    """What was to be shown, judged by the numbers."""
    here = {
        label: floors(squares)
        for (method, label), (squares, _) in found.items()
        if method == name
    }
    lines = []
    if FULL in here and len(here) > 1:
        others = [floor[0] for label, floor in here.items() if label != FULL]
        least = (np.min(others, 0) / here[FULL][0]).min()
        lines.append(
            f"{name}, heterogeneous clients: on the worst of {seeds} seeds the best "
            f"other setting is {least:.1e} times {FULL}; its largest value is "
            f"{here[FULL][0].max():.1e}."
        )
    if "static" in here:
        for number, case in enumerate(CASES):
            static = np.median(here["static"][number])
            ratios = [
                f"{label} {np.median(here[label][number]) / static:.2f}"
                for label in MOVING
                if label in here
            ]
            lines.append(
                f"{name}, {case}: medians of moving sub-models over that of static "
                f"ones: {', '.join(ratios)}."
            )
    return lines


def radii(options):
    """Full models, K = 1, by the width of the difference, in both precisions."""
    rows = [{"r": f"{radius:.0e}"} for radius in RADII]
    for wide, column in ((True, "float64"), (False, "float32")):
        with jax.enable_x64(wide):
            task = dbo.tasks.federated_toy()
            whole = s.fleet(s.coordinates(task.x0, task.y0), np.ones(12))

            def build(radius, task=task, whole=whole):
                return dbo.algorithms.rafbo(
                    task.problem, whole, perturbation=radius, **STEPS
                )

            widths = jnp.asarray(RADII, task.x0.dtype)
            method = dbo.sweep(build, widths, batch_axis=None)
            x = dbo.replicate(task.x0[None], len(RADII))
            y = dbo.replicate(task.y0[None], len(RADII))
            squares, _ = watched(
                method,
                False,
                options.rounds,
                EVERY,
                jax.random.key(0),
                method.init(x, y),
                task.batch,
                dbo.replicate(task.batch, len(RADII)),
            )
        last = np.asarray(squares)[-len(squares) // 3 :].mean(0)
        for row, value in zip(rows, last, strict=True):
            row[column] = f"{value:.1e}"
    return rows


def picture(found, path, rounds):
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    turns = np.arange(0, rounds + 1, EVERY)
    for row, name in zip(axes, METHODS, strict=True):
        for number, (ax, case) in enumerate(zip(row, CASES, strict=True)):
            for (method, label), (squares, _) in found.items():
                if method == name:
                    ax.semilogy(turns, np.median(squares[:, number], -1), label=label)
            ax.set(title=f"{name}, {case} clients", xlabel="rounds")
            ax.set_ylabel("squared true hypergradient")
            ax.set_ylim(1e-13, None)
    axes[0, 0].legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--only", nargs="+", help="labels of settings")
    parser.add_argument("--no-radii", action="store_true", help="skip the second table")
    parser.add_argument("--out", type=Path, default=Path("results/rabo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with jax.enable_x64(True):
        found = solve_all(options)
    start, *_ = next(iter(found.values()))[0]
    lines = [
        "# RABO and RAFBO on the toy, our formulation",
        "",
        f"{header()}.",
        "",
        f"`federated_toy`, 12 clients, dx = 24, dy = 18, float64, {options.rounds} "
        f"rounds; steps {STEPS['upper_step']:g} (x), {STEPS['lower_step']:g} (y and "
        f"z), with K = 5 a fifth of them; r = {WIDTH:g}, no projection. Cells: squared "
        "norm of the true hypergradient, mean of the last third of the rounds, median "
        f"[range] of {options.seeds} seeds. At the start of RAFBO it is "
        f"{spread(start[0], '{:.2f}')} for heterogeneous clients and "
        f"{spread(start[1], '{:.2f}')} for identical ones. C_x*: the fewest clients "
        "that held an entry of x in any round.",
    ]
    for name in options.methods:
        rows = list(rows_of(found, name))
        write_csv(options.out / f"toy_{name.lower()}.csv", rows)
        lines += ["", f"## {name}", "", *table(rows), ""]
        lines += verdicts(found, name, options.seeds)
    if not options.no_radii:
        rows = radii(options)
        write_csv(options.out / "toy_radii.csv", rows)
        lines += ["", "## Width of the difference", ""]
        lines += ["RAFBO, full, K = 1, heterogeneous, one seed.", "", *table(rows)]
    picture(found, options.out / "toy.png", options.rounds)
    seconds = time.perf_counter() - begin
    lines += ["", f"Took {seconds:.0f} s, compilation included."]
    (options.out / "toy.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
