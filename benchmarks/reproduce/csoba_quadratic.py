"""Floors on closed-form quadratics: workers alike or not, with noise or without."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from csoba_common import (
    compressed,
    sampled,
    slope_of,
    stacked,
    starts,
    uncompressed,
    watched,
)
from report import table, write_csv

import dbojax as dbo

NODES, KEPT, STEPS, LAST = 8, 2, 6000, 200
UPPER, LOWER = 0.005, 0.02
CASES = ((0.0, 0.0), (1.0, 0.0), (0.0, 0.1), (1.0, 0.1))  # heterogeneity, noise
SEEDS = (0, 1, 2)  # of the problem; each run has its own compressor seed
ROUNDS = {"CM-SOBA, 10 rounds": 10, "EF-SOBA, 5 rounds": 5}


class Run(NamedTuple):
    """What makes one run differ from the next."""

    batch: dbo.Batch
    sigma: jax.Array
    slope: tuple  # of the true hypergradient


def contestants(problem):
    tenth = dbo.compressors.random_k(KEPT)
    found = uncompressed(problem, NODES) | compressed(problem, NODES, tenth)
    for label, rounds in ROUNDS.items():
        many = compressed(problem, NODES, dbo.compressors.multi_step(tenth, rounds))
        found[label] = many[label.partition(",")[0]]
    return found


def solve():
    """Label -> history of all runs; runs count through the cases, then the seeds."""
    runs, like = [], None
    for h, sigma in CASES:
        for seed in SEEDS:
            like = dbo.tasks.worker_quadratic(n=NODES, heterogeneity=h, seed=seed)
            runs.append(Run(like.batch, jnp.asarray(sigma), slope_of(like)))
    runs, histories = stacked(runs), {}
    for label in contestants(like.problem):

        def build(run, label=label):
            noisy = dbo.tasks.with_gradient_noise(
                like._replace(batch=run.batch), run.sigma
            )
            draw = noisy.sampler(ROUNDS.get(label, 1))
            method = contestants(noisy.problem)[label](UPPER, LOWER)
            own = sampled(method, lambda key, data: draw(key, 0))
            return watched(own, run.slope)

        method = dbo.sweep(build, runs, batch_axis=None)
        start = method.init(*starts(like, len(CASES) * len(SEEDS)))
        _, histories[label] = dbo.run(method, jax.random.key(0), start, (), STEPS)
        print(f"  {label}: {histories[label]['seconds'][-1]:.1f} s", flush=True)
    return histories


def by_case(history):
    """Norms as (steps, cases, seeds)."""
    return history["hypergrad_norm"].reshape(-1, len(CASES), len(SEEDS))


def rows_of(histories):
    for label, history in histories.items():
        floors = by_case(history)[-LAST:].mean(0)
        row = {"method": label, "bytes up": history["message_bytes"][0]}
        for (h, sigma), floor in zip(CASES, floors, strict=True):
            low, middle, high = np.quantile(floor, [0, 0.5, 1])
            name = f"h = {h:g}, noise {sigma:g}"
            row[name] = f"{middle:.1e} [{low:.1e}, {high:.1e}]"
        yield row


def picture(histories, path):
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    window = np.ones(50) / 50
    for case, (ax, (h, sigma)) in enumerate(zip(axes.flat, CASES, strict=True)):
        for label, history in histories.items():
            norm = np.median(by_case(history)[:, case], -1)
            smooth = np.convolve(norm, window, "valid")
            sent = history["message_bytes"][len(window) - 1 :] / 1e6
            ax.plot(sent, smooth, label=label)
        ax.set(xscale="log", yscale="log", title=f"h = {h:g}, noise {sigma:g}")
        ax.set(xlabel="MB up per worker", ylabel="true hypergradient norm")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def report(options):
    """Run, write CSV and picture, and return the lines of this part."""
    with jax.enable_x64(True):  # the floors are below what float32 can show
        histories = solve()
    rows = list(rows_of(histories))
    write_csv(options.out / "quadratic.csv", rows)
    picture(histories, options.out / "quadratic.png")
    worse = [by_case(histories[m])[-LAST:, 1].mean() for m in ("C-SOBA", "EF-SOBA")]
    return [
        "## Floors on the closed-form quadratic",
        "",
        f"`worker_quadratic`, {NODES} workers, dx = dy = 20, float64; "
        f"random_k({KEPT}), "
        f"{STEPS} steps of {UPPER:g} (x) and {LOWER:g} (y, z), moving averages of "
        f"weight 0.1. Cells: norm of the true hypergradient, mean of the last {LAST} "
        f"iterates, median [range] of {len(SEEDS)} problems. Bytes up: one worker, one "
        "step, exact. Methods with R rounds compress in R messages a step and, with "
        "noise, average R samples, so for equal bytes and samples they would have an "
        "R-th of the steps; here all have the same.",
        "",
        *table(rows),
        "",
        f"Without noise and with unlike workers the floor of C-SOBA is "
        f"{worse[0] / worse[1]:.0f} times that of EF-SOBA.",
    ]
