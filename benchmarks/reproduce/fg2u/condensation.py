"""Data condensation: what each hypergradient is worth at equal time on the clock.

    python benchmarks/reproduce/fg2u/condensation.py                 # digits, minutes
    python benchmarks/reproduce/fg2u/condensation.py --ipc 1 10
    python benchmarks/reproduce/fg2u/condensation.py --conv 16 --seconds 60
    python benchmarks/reproduce/fg2u/condensation.py --full --folder MNIST --ipc 1 10 50

A few synthetic images, on which fresh networks are trained by momentum SGD, are learnt
so that those networks know the real images: section 4 of Shen et al. (2024),
arXiv:2406.14095. Every method gets the same seconds, the same grid of outer steps and
the same seeds. ``--full`` has the paper's network and depth, and is meant for a GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["tasks", "plots"])

import argparse
import time

import condensation_runs as runs
import condensation_tables as tables
import numpy as np
from report import header, table, write_csv

import dbojax as dbo


def task_of(options, per_class):
    networks, train, test = dbo.tasks.networks, None, None
    d, classes = 64, 10  # of the digits
    if options.folder is not None:
        train, test = dbo.tasks.readers.idx_folder(options.folder)
        d, classes = train.inputs.shape[1], train.num_classes
    if options.conv:
        network = networks.conv_net(d, classes, options.conv)
    else:
        network = networks.perceptron(d, classes, (options.hidden,))
    return dbo.tasks.condensation(
        train,
        test,
        network,
        per_class,
        evaluation_steps=options.evaluation_steps,
        step_size=options.inner_rate,
    )


def same_steps(bench, programs, found):
    """All methods for as many outer steps as (FG)²U could take."""
    good = next(name for name in found if name.startswith("(FG)²U"))
    limit = int(np.mean([run.steps for run in found[good].runs]))
    for name, one in programs.items():
        again = runs.tuned(bench, one, runs.for_steps(limit)) if name != good else None
        yield name, again or found[good]


def part(options, per_class):
    """Everything at one number of images per class; Markdown lines and the curves."""
    task = task_of(options, per_class)
    bench = runs.bench(task, options)
    programs = {
        name: runs.program(bench, hyper)
        for name, hyper in runs.methods(task, options).items()
    }
    found = {}
    for name, one in programs.items():
        found[name] = runs.tuned(bench, one, runs.for_seconds(options.seconds))
        print(f"    {name}: outer step {found[name].rate:g}", flush=True)
    level = dict(same_steps(bench, programs, found))
    cheap, good = (
        next(name for name in programs if name.startswith(kind))
        for kind in ("Hessian-free", "(FG)²U")
    )
    # The first phase is short, and so were the runs with as many steps as (FG)²U.
    rates = level[cheap].rate, found[good].rate
    pairs = runs.two_phases(
        bench, programs[cheap], programs[good], rates, found[good].runs
    )
    tables.picture(found, f"{task.name}, {per_class} per class", options, per_class)
    noise, real = (runs.baseline(bench, draw) for draw in (task.noise, task.images))
    lines = [
        f"## {task.name}: {len(task.labels)} images, {per_class} per class",
        "",
        f"Nothing learnt: {tables.spread(100 * real)} % on random real images, "
        f"{tables.spread(100 * noise)} % on noise.",
        "",
        f"### Equal time: {options.seconds:g} s of {tables.clock_name(options)} each",
        "",
        *table(list(tables.rows(found, programs, per_class))),
        "",
        tables.order_line(found),
        "",
        "### Equal outer steps: as many as (FG)²U took",
        "",
        *table(list(tables.rows(level, programs, per_class))),
        "",
        tables.order_line(level),
        "",
        "### Cosine to the exact hypergradient",
        "",
        "The same network and batch in both; means over "
        f"{runs.FRESH} networks, and milliseconds of one estimate.",
        "",
        *table(list(runs.cosines(bench, programs))),
        *tables.two_phase_lines(list(pairs), options),
    ]
    return lines, list(tables.curve_rows(found, per_class))


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, help="with the IDX files of MNIST or Fashion-MNIST")
    add("--ipc", type=int, nargs="+", default=[1], help="images per class")
    add("--full", action="store_true", help="the paper's network; for a GPU")
    add("--conv", type=int, metavar="WIDTH", help="conv net instead of perceptron")
    add("--hidden", type=int, default=16, help="units of the perceptron")
    add("--inner-rate", type=float, help="by default 0.1, for the conv net 0.01")
    add("--depth", type=int, default=100)
    add("--directions", type=int, help="b in total; 32, in full 512")
    add("--chunk", type=int, help="directions at a time; 32, in full 8")
    add("--last", type=int, default=6, help="steps that the truncated one goes back")
    add("--alpha", type=float, default=0.1, help="step of Neumann's series")
    add("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3])
    add("--batch", type=int, default=512)
    add("--seeds", type=int, default=3)
    add("--seconds", type=float, help="of each run; 10, in full 1800")
    add("--first", type=float, default=0.1, help="share of Hessian-free in two phases")
    add("--two-phase-seeds", type=int, default=5)
    add("--nets", type=int, default=5, help="fresh networks that judge each x")
    add("--evaluation-steps", type=int, default=1000)
    add("--cpu-time", action="store_true", help="for machines with other work to do")
    add("--out", type=Path, default=Path("results/fg2u"))
    options = parser.parse_args()
    full = options.full
    options.conv = options.conv or (128 if full else None)
    options.directions = options.directions or (512 if full else 32)
    options.chunk = options.chunk or (8 if full else 32)
    options.seconds = options.seconds or (1800.0 if full else 10.0)
    options.inner_rate = options.inner_rate or (0.01 if options.conv else 0.1)
    return options


def main():
    options, begin = parsed(), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Data condensation",
        "",
        f"{header()}.",
        "",
        tables.settings_line(options),
    ]
    print(*lines, sep="\n", flush=True)
    curves = []
    for per_class in options.ipc:
        text, points = part(options, per_class)
        print("", *text, sep="\n", flush=True)
        lines += ["", *text]
        curves += points
    lines += ["", f"All of it took {time.perf_counter() - begin:.0f} s."]
    print(lines[-1])
    write_csv(options.out / "condensation.csv", curves)
    (options.out / "condensation.md").write_text("\n".join([*lines, ""]), "utf-8")


if __name__ == "__main__":
    main()
