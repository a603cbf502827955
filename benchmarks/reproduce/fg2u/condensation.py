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
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import header, table, write_csv

import dbojax as dbo

# Table 1 of the paper: test accuracy on MNIST in per cent, by images per class.
PAPER = {
    1: ("73.76 ± 1.68", "65.98 ± 1.38", "68.37 ± 1.44", "82.44 ± 0.68", "92.32 ± 0.33"),
    10: (
        "94.05 ± 0.33",
        "94.97 ± 0.34",
        "95.75 ± 0.24",
        "96.12 ± 0.28",
        "96.79 ± 0.29",
    ),
    50: (
        "96.63 ± 0.41",
        "96.34 ± 0.31",
        "96.78 ± 0.22",
        "97.01 ± 0.19",
        "97.72 ± 0.23",
    ),
}
KINDS = ("truncated", "Hessian-free", "Neumann", "(FG)²U", "exact reverse")


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


def spread(values, digits=2):
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def paper(name, per_class):
    """The published accuracy of a method's kind, where there is one."""
    kind = [i for i, kind in enumerate(KINDS) if name.partition(",")[0] == kind]
    known = kind and per_class in PAPER
    return PAPER[per_class][kind[0]] if known else ""


def rows(found, programs, per_class):
    for name, one in found.items():
        steps = np.array([run.steps for run in one.runs])
        seconds = np.array([run.seconds[-1] for run in one.runs])
        yield {
            "method": name,
            "outer step": f"{one.rate:g}",
            "ms per step": f"{1e3 * seconds.sum() / steps.sum():.1f}",
            "steps": f"{steps.mean():.0f}",
            "seconds": f"{seconds.mean():.1f}",
            "MiB": f"{programs[name].mebibytes:.2f}",
            "flagged": sum(run.flagged for run in one.runs),
            "h at the end": spread(one.loss[:, -1], 3),
            "test accuracy %": spread(100 * one.accuracy),
            "paper, MNIST %": paper(name, per_class),
        }


def curve_rows(found, per_class):
    for name, one in found.items():
        for (seed, mark), loss in np.ndenumerate(one.loss):
            yield {
                "images per class": per_class,
                "method": name,
                "outer step": one.rate,
                "seed": seed,
                "seconds": one.runs[seed].seconds[mark],
                "h": loss,
                "test accuracy": one.along[seed, mark],
            }


def picture(found, title, options, per_class):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, one in found.items():
        seconds = np.mean([run.seconds for run in one.runs], 0)
        axes[0].plot(seconds, one.along.mean(0), marker=".", label=name)
        axes[1].semilogy(seconds, one.loss.mean(0), marker=".", label=name)
    axes[0].set(xlabel="seconds", ylabel="test accuracy", title=title)
    axes[1].set(xlabel="seconds", ylabel="loss on real images after T steps")
    axes[0].legend(fontsize="x-small")
    figure.savefig(options.out / f"condensation_{per_class}.png", dpi=120)
    plt.close(figure)


def two_phase_lines(pairs, options):
    """Seconds until two phases reach what one phase ends with, seed by seed."""
    rows = [
        {
            "seed": seed,
            "h, one phase, at the end": f"{pair.one:.3f}",
            "h after Hessian-free": f"{pair.between:.3f}",
            "h, two phases, at the end": f"{pair.two:.3f}",
            "seconds of one phase": f"{pair.seconds:.2f}",
            "seconds of two to the same h": f"{pair.reached:.2f}"
            if np.isfinite(pair.reached)
            else "never",
        }
        for seed, pair in enumerate(pairs)
    ]
    sooner = sum(pair.reached < pair.seconds for pair in pairs)
    ratios = [pair.reached / pair.seconds for pair in pairs]
    return [
        "",
        "### Two phases",
        "",
        f"Hessian-free for {options.first:.0%} of the time, then (FG)²U with a fresh "
        "Adam, each with its outer step of the first table, against (FG)²U alone.",
        "",
        *table(rows),
        "",
        f"- Two phases got there sooner on {sooner} of {len(pairs)} seeds; median "
        f"ratio of seconds {np.median(ratios):.2f}.",
    ]


def order_line(found):
    """Whether the order of the paper came out."""
    mean = {name.partition(",")[0]: one.accuracy.mean() for name, one in found.items()}
    cheap = max(mean["truncated"], mean["Hessian-free"])
    holds = cheap < mean["(FG)²U"] < mean["exact reverse"]
    return (
        "- The paper's order, truncated and Hessian-free < (FG)²U < exact reverse, "
        f"{'holds' if holds else 'does not hold'} here."
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
    rates = found[cheap].rate, found[good].rate
    pairs = runs.two_phases(
        bench, programs[cheap], programs[good], rates, found[good].runs
    )
    picture(found, f"{task.name}, {per_class} per class", options, per_class)
    noise, real = (runs.baseline(bench, draw) for draw in (task.noise, task.images))
    lines = [
        f"## {task.name}: {len(task.labels)} images, {per_class} per class",
        "",
        f"Nothing learnt: {spread(100 * real)} % on random real images, "
        f"{spread(100 * noise)} % on noise.",
        "",
        f"### Equal time: {options.seconds:g} s of {clock_name(options)} each",
        "",
        *table(list(rows(found, programs, per_class))),
        "",
        order_line(found),
        "",
        "### Equal outer steps: as many as (FG)²U took",
        "",
        *table(list(rows(level, programs, per_class))),
        "",
        order_line(level),
        "",
        "### Cosine to the exact hypergradient",
        "",
        "The same network and batch in both; means over "
        f"{runs.FRESH} networks, and milliseconds of one estimate.",
        "",
        *table(list(runs.cosines(bench, programs))),
        *two_phase_lines(list(pairs), options),
    ]
    return lines, list(curve_rows(found, per_class))


def clock_name(options):
    return "processor time" if options.cpu_time else "wall clock"


def settings_line(options):
    network = (
        f"the 3-block conv net of width {options.conv}"
        if options.conv
        else f"a perceptron with {options.hidden} hidden units"
    )
    rates = ", ".join(f"{rate:g}" for rate in options.rates)
    return (
        f"The network is {network}. T = {options.depth} steps of SGD with momentum "
        f"0.9, rate {options.inner_rate:g} to 0 as a cosine, from a fresh network in "
        f"each outer step; {options.batch} real images in each outer step. Outer Adam, "
        "its step falling to 0 in line with the time or the steps of a run; x starts "
        "uniform and is clipped to [0, 1]. Compilation does not count as time. Of the "
        f"outer steps {rates} each method takes the one with which its first seed ends "
        f"with the least h, and keeps it on {options.seeds} seeds. h: loss after T "
        f"steps on {runs.IMAGES} real training images (or all), mean over {runs.FRESH} "
        f"fresh networks, the same everywhere. Test accuracy: {options.nets} fresh "
        f"networks per seed, {options.evaluation_steps} steps on x; ± is the standard "
        "deviation over all of them. b: directions in total. MiB: temporaries of one "
        "compiled estimate. The paper's column (Table 1) is for MNIST, a conv net of "
        "width 128 and 10 000 outer steps: other data, network and budget than here, "
        "unless the heading says MNIST."
    )


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, help="with the IDX files of MNIST or Fashion-MNIST")
    add("--ipc", type=int, nargs="+", default=[1], help="images per class")
    add("--full", action="store_true", help="the paper's network; for a GPU")
    add("--conv", type=int, metavar="WIDTH", help="conv net instead of perceptron")
    add("--hidden", type=int, default=32, help="units of the perceptron")
    add("--inner-rate", type=float, help="by default 0.1, for the conv net 0.01")
    add("--depth", type=int, default=100)
    add("--directions", type=int, default=None, help="b in total; 32, in full 512")
    add("--chunk", type=int, default=32, help="directions at a time")
    add("--last", type=int, default=6, help="steps that the truncated one goes back")
    add("--alpha", type=float, default=0.1, help="step of Neumann's series")
    add("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3])
    add("--batch", type=int, default=512)
    add("--seeds", type=int, default=3)
    add("--seconds", type=float, default=None, help="of each run; 5, in full 1800")
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
    options.seconds = options.seconds or (1800.0 if full else 5.0)
    options.inner_rate = options.inner_rate or (0.01 if options.conv else 0.1)
    return options


def main():
    options, begin = parsed(), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ["# Data condensation", "", f"{header()}.", "", settings_line(options)]
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
