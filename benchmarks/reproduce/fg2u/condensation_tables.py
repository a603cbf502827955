"""Tables and pictures of the condensation benchmark."""

import condensation_runs as runs
import matplotlib
import numpy as np
from report import table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
    if not pairs:
        return []
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
        "Adam, against (FG)²U alone; the outer step of (FG)²U is that of the first "
        "table, that of Hessian-free, for a short run, that of the second.",
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


def clock_name(options):
    return "processor time" if options.cpu_time else "wall clock"
