"""Steps to a fixed norm of the true hypergradient against the number of workers."""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from csoba_common import compressed, sampled, slope_of, starts, uncompressed, watched
from report import table, write_csv

import dbojax as dbo

WORKERS = (1, 2, 4, 8, 16, 32)
SIGMA, TARGET, KEPT, SEEDS, RATIO = 1.0, 0.2, 2, 16, 4.0
# One grid of upper steps for all; the lower step is RATIO times as long.
GRID = 0.32 * 2.0 ** -np.arange(12)
SINGLE = {"SOBA": 3_000, "C-SOBA": 25_000}  # most steps of a single worker
FEWEST = 300


def norms(label, n, steps):
    """Root mean square over the seeds, (steps, grid)."""
    task = dbo.tasks.worker_quadratic(n=n, heterogeneity=0.0)
    noisy = dbo.tasks.with_gradient_noise(task, SIGMA)
    draw, slope = noisy.sampler(1), slope_of(task)
    tenth = dbo.compressors.random_k(KEPT)
    make = (uncompressed(noisy.problem, n) | compressed(noisy.problem, n, tenth))[label]

    def build(upper):
        own = sampled(make(upper, RATIO * upper), lambda key, data: draw(key, 0))
        return watched(own, slope)

    settings = jnp.repeat(jnp.asarray(GRID, jnp.float32), SEEDS)
    method = dbo.sweep(build, settings, batch_axis=None)

    @jax.jit
    def run(state, key):
        def body(state, step):
            state, metrics = method.step(jax.random.fold_in(key, step), state, ())
            squares = metrics.hypergrad_norm.reshape(len(GRID), SEEDS) ** 2
            return state, jnp.mean(squares, 1)

        return jax.lax.scan(body, state, jnp.arange(steps))[1]

    start = method.init(*starts(task, settings.size))
    return np.sqrt(np.asarray(run(start, jax.random.key(n)), np.float64))


def hitting(norm):
    """First step at which the mean of the last 5 % of the steps is at the target.

    Where a run diverged, a large number stands for what is none.
    """
    total = np.concatenate(
        [[0.0], np.cumsum(np.nan_to_num(norm, nan=1e6).clip(0, 1e6))]
    )
    ends = np.arange(1, len(norm) + 1)
    window = np.maximum(1, ends // 20)
    means = (total[ends] - total[ends - window]) / window
    reached = np.flatnonzero(means <= TARGET)
    return int(ends[reached[0]]) if reached.size else None


def best(label, n):
    """(steps to the target, upper step) of the best entry of the grid."""
    steps = max(FEWEST, SINGLE[label] // n)
    found = norms(label, n, steps)
    hits = [(hitting(found[:, i]) or np.inf, GRID[i]) for i in range(len(GRID))]
    return min(hits)


def slope(rows, label, last):
    """Of log steps against log n, up to ``last`` workers."""
    chosen = [
        row
        for row in rows
        if row["workers"] <= last and np.isfinite(row[f"{label}, steps"])
    ]
    logs = np.log([[row["workers"], row[f"{label}, steps"]] for row in chosen])
    return np.polyfit(*logs.T, 1)[0]


def picture(rows, path):
    figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    n = np.array(WORKERS)
    for label in SINGLE:
        steps = np.array([row[f"{label}, steps"] for row in rows])
        (line,) = ax.loglog(n, steps, "o-", label=label)
        ax.loglog(n, steps[0] / n, "--", color=line.get_color(), alpha=0.6)
    ax.plot([], [], "k--", alpha=0.6, label="slope -1")
    ax.set(xlabel="workers", ylabel=f"steps to a norm of {TARGET:g}")
    ax.legend()
    figure.savefig(path, dpi=150)


def report(options):
    """Run, write CSV and picture, and return the lines of this part."""
    rows = []
    for n in WORKERS:
        row = {"workers": n}
        for label in SINGLE:
            steps, upper = best(label, n)
            row[f"{label}, steps"], row[f"{label}, upper step"] = steps, f"{upper:.2g}"
        for label in SINGLE:
            ratio = rows[0][f"{label}, steps"] if rows else row[f"{label}, steps"]
            row[f"{label}, speed-up"] = f"{ratio / row[f'{label}, steps']:.1f}"
        print(f"  {row}", flush=True)
        rows.append(row)
    write_csv(options.out / "speedup.csv", rows)
    picture(rows, options.out / "speedup.png")
    fitted = functools.partial(slope, rows)
    return [
        "## Speed-up with the number of workers",
        "",
        "`worker_quadratic(heterogeneity=0)`, dx = dy = 20, Gaussian noise of "
        "standard "
        f"deviation {SIGMA:g} on every entry of every direction, random_k({KEPT}). "
        "Steps "
        f"until the true hypergradient norm, root mean square over {SEEDS} seeds and "
        f"mean of the last 5 % of the steps, is at most {TARGET:g} (it starts at "
        "2.24). "
        f"Upper step: the best of one grid of {len(GRID)}, {GRID[-1]:.1e} to "
        f"{GRID[0]:.2g} by factors of two, for every n; lower step {RATIO:g} times it.",
        "",
        *table(rows),
        "",
        "Fitted slope of log(steps) against log(n), -1 being linear speed-up: "
        + "; ".join(
            f"{label} {fitted(label, 32):.2f} (to 8 workers {fitted(label, 8):.2f})"
            for label in SINGLE
        )
        + ".",
    ]
