"""Ten nodes with private, unlike data learn over a ring: what does each byte buy?

    python benchmarks/demo.py           # table, CSV and PNG in a few minutes
    python benchmarks/demo.py --tune    # the grid from which STEPS was taken

Coefficient tuning on scikit-learn's digits: x holds one regularisation coefficient per
pixel, y a linear classifier; 80 % of a node's samples come from a single class.
"""

from environment import ensure

ensure(["tasks", "run", "plots"])

import argparse
import functools
import itertools
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import dbojax as dbo

NODES, HETEROGENEITY = 10, 0.8
UPPER_STEPS, LOWER_STEPS = (1.0, 10.0, 100.0), (0.1, 0.3, 1.0, 3.0)
TUNING_SEEDS = (100, 101, 102)  # splits of the data that the table never sees


def shards(seed):
    """Digits dealt out to the nodes, another way for every seed."""
    data = dbo.tasks.data
    deal = functools.partial(data.split_by_label, h=HETEROGENEITY)
    return data.distribute(data.digits(), n=NODES, deal=deal, seed=seed)


def methods(problem):
    """Label -> factory of (upper_step, lower_step); nothing else is tuned."""
    mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(NODES)))
    top = dbo.compressors.top_k(0.2)
    qsgd = dbo.compressors.scaled(dbo.compressors.qsgd(7))

    def c2dfb(inner):
        return lambda upper, lower: dbo.algorithms.c2dfb(
            problem,
            outer=dbo.channels.exact(mix, gamma=0.6),
            inner=inner,
            penalty=10.0,
            inner_steps=10,
            upper_step=upper,
            lower_step=lower,
        )

    def ma_dsbo(upper, lower):
        return dbo.algorithms.ma_dsbo(
            problem,
            channel=dbo.channels.exact(mix),
            upper_step=upper,
            lower_step=lower,
            linear_step=lower,
            lower_steps=10,
            linear_steps=10,
        )

    return {
        "C²DFB, top 20 %": c2dfb(dbo.channels.reference_point(mix, top, 0.3)),
        "C²DFB, QSGD 4 bit": c2dfb(dbo.channels.reference_point(mix, qsgd, 0.3)),
        "C²DFB, dense": c2dfb(dbo.channels.exact(mix, 0.6)),
        "C²DFB(nc), top 20 %": c2dfb(dbo.channels.error_feedback(mix, top, 0.3)),
        "MA-DSBO, dense": ma_dsbo,
    }


# (upper_step, lower_step) of least mean validation loss in the grid of `--tune`.
STEPS = {
    "C²DFB, top 20 %": (10.0, 1.0),
    "C²DFB, QSGD 4 bit": (10.0, 1.0),
    "C²DFB, dense": (10.0, 3.0),
    "C²DFB(nc), top 20 %": (1.0, 1.0),
    "MA-DSBO, dense": (100.0, 0.1),
}


def stacked(tree, runs):
    """The same start for every node of every run."""
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (runs, NODES, *leaf.shape)), tree
    )


def compare(steps, seeds):
    """History of every method; each column has one entry per seed."""
    tasks = [dbo.tasks.coefficient_tuning(shards(seed)) for seed in range(seeds)]
    first = tasks[0]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(t.batch for t in tasks))
    start = stacked(first.x0, seeds), stacked(first.y0, seeds)

    def evaluate(state):
        rows = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(seeds)]
        scores = [t.evaluate(row) for t, row in zip(tasks, rows, strict=True)]
        return {name: np.array([s[name] for s in scores]) for name in scores[0]}

    histories = {}
    for label, make in methods(first.problem).items():
        method = dbo.vmapped(make(*STEPS[label]), seeds)
        _, histories[label] = dbo.run(
            method,
            jax.random.key(0),
            method.init(*start),
            batch,
            steps,
            evaluate=evaluate,
            every=2,
            stop_on_nonfinite=False,
        )
        print(f"  {label}: {histories[label]['seconds'][-1]:.1f} s", flush=True)
    return histories


def tune(steps):
    """Final validation loss on splits of their own, one grid for every method."""
    tasks = [dbo.tasks.coefficient_tuning(shards(seed)) for seed in TUNING_SEEDS]
    grid = list(itertools.product(UPPER_STEPS, LOWER_STEPS))
    for label, make in methods(tasks[0].problem).items():
        # A setting that diverges on one split is out: its mean is not a number.
        losses = np.mean([final_losses(make, grid, t, steps) for t in tasks], axis=0)
        print(f"{label}: best {grid[int(np.nanargmin(losses))]}", flush=True)
        for settings, loss in zip(grid, losses, strict=True):
            print(f"    upper {settings[0]:g}, lower {settings[1]:g}: {loss:.4f}")


def final_losses(make, grid, task, steps):
    """Validation loss of every setting of the grid, all in one program."""
    method = dbo.sweep(
        lambda row: make(row[0], row[1]), jnp.array(grid), batch_axis=None
    )
    state, _ = dbo.run(
        method,
        jax.random.key(0),
        method.init(stacked(task.x0, len(grid)), stacked(task.y0, len(grid))),
        task.batch,
        steps,
        every=steps,
        stop_on_nonfinite=False,
    )
    return np.asarray(jax.vmap(task.evaluate)(state)["validation_loss"])


def table(histories):
    """Cost to a common accuracy, and where each method ends; a line per method."""
    dense = [h for label, h in histories.items() if "dense" in label]
    finals = [h.evaluated()["test_accuracy"][-1].mean() for h in dense]
    target = 0.98 * max(finals)
    lines = [
        f"Target: mean test accuracy {target:.4f}, 98 % of the best dense method's.",
        "MB = 1e6 bytes to the target, over one directed link and over all of them.",
        "",
        "| method | MB/link | MB all | steps | gradients | products | seconds "
        "| final accuracy | final validation loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, history in histories.items():
        rows = history.evaluated()
        reached = np.flatnonzero(rows["test_accuracy"].mean(1) >= target)
        columns = ("message_bytes", "total_bytes", "step", "gradients", "products")
        cost = ["not reached", "", "", "", "", ""]
        if reached.size:
            link, every, *counts = (rows[name][reached[0]] for name in columns)
            seconds = rows["seconds"][reached[0]]
            cost = [f"{link / 1e6:.3f}", f"{every / 1e6:.2f}", *map(str, counts)]
            cost.append(f"{seconds:.2f}")
        lines.append(f"| {' | '.join([label, *cost, *_end(rows)])} |")
    return "\n".join(lines)


def _end(rows):
    """Final accuracy and validation loss, over the seeds that did not diverge."""
    losses, accuracy = rows["validation_loss"][-1], rows["test_accuracy"][-1]
    kept = np.isfinite(losses)
    note = "" if kept.all() else f" ({(~kept).sum()} of {len(kept)} diverged)"
    if not kept.any():
        return "all diverged", ""
    spread = f"{accuracy[kept].mean():.4f} ± {accuracy[kept].std():.4f}{note}"
    return spread, f"{losses[kept].mean():.4f}"


def picture(histories, path):
    """Accuracy and validation loss against the bytes over one link."""
    _, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    shown = {"test_accuracy": (0.7, 1.0), "validation_loss": (0.1, 3.0)}
    for ax, (quantity, limits) in zip(axes, shown.items(), strict=True):
        log = quantity == "validation_loss"
        dbo.plots.curves(
            histories, x="message_bytes", y=quantity, ax=ax, logx=True, logy=log
        )
        ax.set_ylim(*limits)
    axes[0].figure.savefig(path, dpi=150)


def main():
    """Run the comparison, print the table, write CSV and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", action="store_true", help="print the grid and stop")
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    options = parser.parse_args()
    if options.tune:
        return tune(options.steps)
    device = jax.devices()[0].device_kind
    print(
        f"dbojax {dbo.__version__}, JAX {jax.__version__}, {device}, Python "
        f"{platform.python_version()}: {NODES} nodes on a ring, h = {HETEROGENEITY}, "
        f"{options.steps} steps, {options.seeds} seeds at once"
    )
    histories = compare(options.steps, options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    for label, history in histories.items():
        name = "".join(c if c.isalnum() else "_" for c in label)
        history.to_csv(options.out / f"{name}.csv")
    report = table(histories)
    (options.out / "table.md").write_text(report + "\n")
    picture(histories, options.out / "curves.png")
    print(f"\n{report}\n\nTable, CSV and picture are in {options.out}/.")
    return None


if __name__ == "__main__":
    main()
