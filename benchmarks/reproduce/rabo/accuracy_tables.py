"""Tables, files and pictures of the comparison."""

import itertools

import accuracy_judge as judge
import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from accuracy_costs import local_step
from accuracy_methods import BATCH, FLEETS, LOCAL_STEPS, PARTICIPANTS, RADIUS, entries
from accuracy_problems import (
    CLIENTS,
    CORRUPTION,
    RIDGE,
    SPLITS,
    WIDTHS,
    dataset,
    kind_of,
    runs_of,
)
from accuracy_runs import outcome
from accuracy_tuning import LOWER_STEPS, SEEDS, UPPER_STEPS, steps_of
from report import table, write_csv

import dbojax as dbo

TITLES = {
    "mlp": "Hyper-representation, a perceptron",
    "cnn": "Hyper-representation, a convolutional network",
    "tuning": "Shared hyper-parameters: one coefficient per feature",
}
SHARE = 0.98  # of the full-size accuracy, to be reached


def preface(options):
    """What holds for all parts."""
    fleets = "; ".join(
        f"{name}: " + ", ".join(f"{count} of capacity {c:g}" for c, count in fl.items())
        for name, fl in FLEETS.items()
    )
    return [
        f"{CLIENTS} clients, {PARTICIPANTS} in a round, {options.rounds} rounds of "
        f"{LOCAL_STEPS} local steps on minibatches of {BATCH} at each level "
        "(a client has 7 samples on each in the mean, so that these are mostly all); "
        f"{options.seeds} seeds (deal, start and draws) under vmap, all splits of an "
        f"entry in one program. Capacities: {fleets}. Sub-models are extracted, masks "
        "staggered; z is projected to "
        f'{RADIUS:g}. "Only the capable": the clients of capacity 1 alone, with as '
        'many visits in all, so twice the rounds where there are 5. "All smallest": '
        "every client trains the model that the smallest can hold, and there is no "
        "other. Exact: the same with exact Hessian-vector products. SimFBO is RAFBO at "
        "full size with exact products. Training and validation data of a client have "
        "the same shares of the classes.",
        "",
        "Accuracies, all on clean test data with the server's full-width x, after the "
        "last round, mean ± standard deviation over the seeds. **One head**: y fitted "
        "anew, by the lower objective, to the training data of all. **Own heads**: one "
        "y fitted anew for each client to its own training data, judged on its own "
        "distribution (the test samples, each class in the client's proportion), mean "
        "over clients with data. These two judge x alone, in the same way for all. "
        "**As trained**: with the y that the method itself holds: the server's for "
        "RAFBO and the baselines, on the test data; the clients' for RABO, on their "
        "own distributions: compare it within a method only. MB: up and down of all "
        f"participants, until the accuracy with one head reaches {SHARE:.0%} of that "
        "of RAFBO at full size (median over the seeds, interpolated between the "
        "judgements; a run that never gets there counts as infinite), and in all. "
        "Seconds: of one seed and split, device blocked, compilation apart, all "
        "of them in one program on this machine, which plays all clients. kFLOP and "
        "KiB: operations and temporary memory of one local step of the largest and the "
        "smallest client that takes part, by XLA's account of the compiled step, which "
        "counts the passes of a finite difference, branches in a loop, only once.",
        "",
        "Steps: each entry chose its own on each split from one grid per task, upper "
        f"{UPPER_STEPS}, lower (and linear) {LOWER_STEPS}, by the accuracy with one "
        "head over the second half of as many rounds, on the worse of "
        f"{len(SEEDS)} deals that the tables never see. With exact products: the "
        "steps of the same "
        "entry with differences.",
    ]


def report(part, options):
    """Run one part, write CSV and picture, and return its lines."""
    name, fleet = part.split("-")
    source = dataset(options)
    d = source[0].inputs.shape[1]
    cases = list(itertools.product(SPLITS.values(), range(options.seeds)))
    found, costs = {}, {}
    deals = {}
    for entry in entries(name, fleet):
        if entry.capacity not in deals:
            deals[entry.capacity] = runs_of(
                kind_of(name, d, entry.capacity), source, cases
            )
        runs = deals[entry.capacity]
        pairs = [
            steps_of(name, entry, split)
            for split in SPLITS
            for _ in range(options.seeds)
        ]
        found[entry] = outcome(entry, runs, pairs, options.rounds)
        costs[entry] = local_step(entry, runs)
        print(
            f"  {entry.label}: {found[entry].seconds:.1f} s + "
            f"{found[entry].compile_seconds:.1f} s compiling",
            flush=True,
        )
    lines = [f"## {TITLES[name]}, {fleet} capacities", "", about(name, source)]
    raw, start = [], at_start(deals[1.0])
    for number, split in enumerate(SPLITS):
        part_of = slice(number * options.seeds, (number + 1) * options.seeds)
        target = SHARE * next(iter(found.values())).watched[-1, part_of].mean()
        rows = rows_of(found, costs, part_of, target)
        raw += [{"split": split, **row} for row in rows]
        lines += ["", f"### {split}, target {target:.3f}", ""]
        words = ", ".join(f"{spread(v[part_of])} with {k}" for k, v in start.items())
        lines += [f"The full-size x at the start: {words}.", "", *table(rows)]
    write_csv(options.out / f"accuracy_{part}.csv", raw)
    picture(found, options.seeds, options.out / f"accuracy_{part}.png")
    return lines


def at_start(runs):
    """Accuracies of x before any step: what training has to add to."""
    return {
        "one head": np.asarray(judge.along(runs)(runs.x0)),
        "own heads": np.asarray(judge.at_end(runs)(runs.x0)),
    }


def about(name, source):
    data = source[0].name
    if name == "tuning":
        return (
            f"{data}; features are a sample's pixels and as many of another sample, "
            f"{CORRUPTION:.0%} of the training labels replaced, ridge "
            f"{RIDGE[name]:g}. A client holds some features of x, y and its inputs."
        )
    return f"{data}; widths {WIDTHS[name]} at full size, ridge {RIDGE[name]:g}."


def reached(steps, accuracy, target):
    """Round at which one seed passes the target, interpolated."""
    at = np.flatnonzero(accuracy >= target)
    if not at.size:
        return np.inf
    if at[0] == 0:
        return float(steps[0])
    i = at[0]
    share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return steps[i - 1] + share * (steps[i] - steps[i - 1])


def spread(values):
    return f"{values.mean():.3f} ± {values.std():.3f}"


def rows_of(found, costs, part, target):
    """One table; the first entry is the reference."""
    rows = []
    for entry, one in found.items():
        seeds = one.watched[:, part].T
        hit = np.median([reached(one.steps, seed, target) for seed in seeds])
        (flops, memory), (flops_small, memory_small) = costs[entry]
        c_x, c_y = one.coverage["x"], one.coverage["y"]
        rows.append(
            {
                "entry": entry.label,
                "one head": spread(one.watched[-1, part]),
                "own heads": spread(one.own[part]),
                "as trained": spread(one.trained[part]),
                "MB to target": (
                    f"{hit * one.megabytes:.1f}" if np.isfinite(hit) else "not reached"
                ),
                "MB in all": f"{one.rounds * one.megabytes:.1f}",
                "s": f"{one.seconds / one.watched.shape[1]:.2f}",
                "kFLOP": f"{flops:.0f} / {flops_small:.0f}",
                "KiB": f"{memory:.0f} / {memory_small:.0f}",
                "C_x* min, mean": f"{c_x[0]:.0f}, {c_x[1]:.1f}",
                "C_y*": f"{c_y[0]:.0f}, {c_y[1]:.1f}",
            }
        )
    return rows


def picture(found, seeds, path):
    """Accuracy with one head over what was sent; the band is all seeds."""
    figure, axes = plt.subplots(
        1, len(SPLITS), figsize=(6 * len(SPLITS), 5), layout="constrained"
    )
    for number, (ax, split) in enumerate(zip(axes, SPLITS, strict=True)):
        part = slice(number * seeds, (number + 1) * seeds)
        histories = {
            entry.label: {
                "total_bytes": one.steps * one.megabytes * 1e6,
                "accuracy": one.watched[:, part],
            }
            for entry, one in found.items()
        }
        dbo.plots.curves(
            histories, "total_bytes", "accuracy", ax=ax, logx=True, logy=False
        )
        ax.set_title(split)
        ax.get_legend().remove()
    axes[-1].legend(fontsize="x-small", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
