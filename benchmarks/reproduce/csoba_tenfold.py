"""Bytes up to a fixed accuracy, compressed or not, with data alike or unlike."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from csoba_common import compressed, stacked, uncompressed
from csoba_steps import STEPS, TUNED_OVER
from report import table, write_csv

import dbojax as dbo

NODES, BATCH, EVERY = 8, 32, 10
LENGTH = 600  # steps of one round; R rounds take an R-th
UPPER_STEPS = {
    "representation": (0.01, 0.03, 0.1, 0.3, 1.0),
    "cleaning": (100.0, 300.0, 1000.0, 3000.0),
}
LOWER_STEPS = {"representation": (0.3, 1.0, 2.0), "cleaning": (0.3, 1.0, 3.0)}
RIDGE = 0.02  # of hyper-cleaning, whose inputs are in [0, 1]
TUNING_SEEDS = (100, 101)  # splits and starts that the tables never see
SPLITS = {"homogeneous": None, "Dirichlet(0.3)": 0.3}
ROUNDS = {"EF-SOBA, 2 x random 10 %": 2}
FASHION_SAMPLES = 8000
UNCOMPRESSED = ("SOBA", "MA-SOBA")
FAMILY = ("C-SOBA", "CM-SOBA", "EF-SOBA")


class Data(NamedTuple):
    """What one run trains on and is judged by."""

    batch: dbo.Batch
    test: dbo.tasks.data.Samples


def contestants(problem):
    """Label -> factory of (upper_step, lower_step); nothing else is tuned."""
    c = dbo.compressors
    found = uncompressed(problem, NODES)
    for name, compressor, chosen in (
        ("random 10 %", c.random_k(0.1), FAMILY),
        ("QSGD 4 bit", c.qsgd(7), FAMILY),
        ("random 4 %", c.random_k(0.04), FAMILY[2:]),
        ("2 x random 10 %", c.multi_step(c.random_k(0.1), 2), FAMILY[2:]),
    ):
        makes = compressed(problem, NODES, compressor)
        found |= {f"{label}, {name}": makes[label] for label in chosen}
    return found


def dataset(options):
    """Training and test set, the latter None where it is cut off the first."""
    if options.fashion is None:
        return dbo.tasks.data.digits(), None
    train, test = dbo.tasks.readers.fashion_mnist(options.fashion)
    rng = np.random.default_rng(0)
    keep = np.sort(rng.choice(len(train.labels), FASHION_SAMPLES, replace=False))
    return train._replace(inputs=train.inputs[keep], labels=train.labels[keep]), test


def backbone():
    return dbo.tasks.mlp((32, 16))


def logits(kind, x, y, inputs):
    if kind == "cleaning":
        return inputs @ y
    return backbone().apply({"params": x}, inputs) @ y["kernel"] + y["bias"]


@functools.cache
def task_of(kind, alpha, seed, source):
    """(task, what it is judged by) for one way to deal out the data."""
    data = dbo.tasks.data
    deal = data.split_evenly
    if alpha is not None:
        deal = functools.partial(data.split_dirichlet, alpha=alpha)
    train, test = source()
    more = {} if test is None else {"test": test, "fractions": (0.5, 0.5, 0.0)}
    shards = data.distribute(train, n=NODES, deal=deal, seed=seed, **more)
    if kind == "cleaning":
        return dbo.tasks.hyper_cleaning(shards, ridge=RIDGE, seed=seed), shards.test
    return dbo.tasks.hyper_representation(shards, backbone(), seed=seed), shards.test


def padded(batches):
    """Stack batches of unlike lengths; what is added is masked out."""

    def one_level(parts):
        width = max(part.mask.shape[1] for part in parts)

        def grown(leaf):
            more = ((0, 0), (0, width - leaf.shape[1]), *[(0, 0)] * (leaf.ndim - 2))
            return jnp.pad(leaf, more)

        return stacked([jax.tree.map(grown, part) for part in parts])

    levels = zip(*batches, strict=True)
    return dbo.Batch(*(one_level(list(parts)) for parts in levels))


def drawn(key, samples, size):
    """Minibatch of each worker, with replacement; the true samples come first."""
    n = samples.mask.shape[0]
    counts = jnp.sum(samples.mask, 1, keepdims=True)
    chosen = jax.random.randint(key, (n, size), 0, jnp.maximum(counts, 1))
    rows = jnp.arange(n)[:, None]
    return jax.tree.map(lambda leaf: leaf[rows, chosen], samples)


def runs_of(label, kind, tasks, pairs, key, length):
    """History of one method on all tasks, each with its pair of steps, at once."""
    first = tasks[0][0]
    rounds = ROUNDS.get(label, 1)
    make = contestants(first.problem)[label]

    def build(pair):
        method = make(pair[0], pair[1])

        def step(key, state, data):
            key_upper, key_lower, key = jax.random.split(key, 3)
            batch = dbo.Batch(
                drawn(key_upper, data.batch.upper, BATCH * rounds),
                drawn(key_lower, data.batch.lower, BATCH * rounds),
            )
            return method.step(key, state, batch)

        return method._replace(step=step)

    @jax.jit
    @jax.vmap
    def scores(x, y, data):
        d, t = dbo.tasks.classification, data.test
        x, y = (jax.tree.map(lambda leaf: leaf[0], v) for v in (x, y))
        check = data.batch.upper
        losses = jax.vmap(
            lambda part: d.cross_entropy(logits(kind, x, y, part.inputs), part)
        )(check)
        return {
            "test_accuracy": d.accuracy(logits(kind, x, y, t.inputs), t),
            "validation_loss": jnp.mean(losses),
        }

    data = Data(
        padded([task.batch for task, _ in tasks]), stacked([test for _, test in tasks])
    )
    method = dbo.sweep(build, jnp.asarray(pairs))
    start = [
        stacked([dbo.replicate(v, NODES) for v in values])
        for values in zip(*((task.x0, task.y0) for task, _ in tasks), strict=True)
    ]
    _, history = dbo.run(
        method,
        key,
        method.init(*start),
        data,
        length // rounds,
        evaluate=lambda state: scores(state.x, state.y, data),
        every=max(1, EVERY // rounds),
        stop_on_nonfinite=False,
    )
    seconds = history["seconds"][-1], history.compile_seconds
    print(f"    {label}: {seconds[0]:.1f} s + {seconds[1]:.1f} s compiling", flush=True)
    return history


def tuned(kind, options, source):
    """(split, label) -> best pair: the lowest mean loss over the run's validations."""
    grid = list(itertools.product(UPPER_STEPS[kind], LOWER_STEPS[kind]))
    cases = [(alpha, seed) for alpha in SPLITS.values() for seed in TUNING_SEEDS]
    tasks = [task_of(kind, *case, source) for case in cases]
    length = options.steps or LENGTH
    best = {}
    for label in contestants(tasks[0][0].problem):
        history = runs_of(
            label,
            kind,
            [task for task in tasks for _ in grid],
            grid * len(tasks),
            jax.random.key(7),
            length,
        )
        losses = history.evaluated()["validation_loss"].mean(0)
        # The worst seed decides, or a setting that may collapse would win.
        losses = losses.reshape(len(SPLITS), len(TUNING_SEEDS), len(grid)).max(1)
        for split, row in zip(SPLITS, losses, strict=True):
            # A setting that diverges on one split is out: its mean is not a number.
            best[split, label] = grid[int(np.nanargmin(row))]
            cells = ", ".join(
                f"{upper:g}/{lower:g} {loss:.3f}"
                for (upper, lower), loss in zip(grid, row, strict=True)
            )
            print(f"      {split}: best {best[split, label]} of {cells}", flush=True)
    return best


def tune(options):
    """Print the grids, and write what belongs into ``csoba_steps.py``."""
    source = functools.cache(lambda: dataset(options))
    lines = [
        '"""Chosen by `csoba.py --tune`: (upper step, lower step) of every method."""',
        "",
        f"TUNED_OVER = {options.steps or LENGTH}  # steps",
        "STEPS = {",
    ]
    for kind in UPPER_STEPS:
        print(f"  hyper-{kind}", flush=True)
        found = tuned(kind, options, source)
        for split in SPLITS:
            lines.append(f'    ("{kind}", "{split}"): {{')
            lines += [
                f'        "{label}": {pair},'
                for (where, label), pair in found.items()
                if where == split
            ]
            lines.append("    },")
    path = options.out / "csoba_steps.py"
    path.write_text("\n".join([*lines, "}", ""]), encoding="utf-8")
    print(f"{path} is ready to replace the file beside this one.")


def compare(kind, options, source):
    """Label -> history; runs count through the splits, then the seeds."""
    cases = [(a, seed) for a in SPLITS.values() for seed in range(options.seeds)]
    tasks = [task_of(kind, *case, source) for case in cases]
    if options.fashion is None:
        found = {(s, label): p for s in SPLITS for label, p in STEPS[kind, s].items()}
    else:
        found = tuned(kind, options, source)
    histories = {}
    for label in contestants(tasks[0][0].problem):
        pairs = [found[split, label] for split in SPLITS for _ in range(options.seeds)]
        length = options.steps or LENGTH
        key = jax.random.key(0)
        histories[label] = runs_of(label, kind, tasks, pairs, key, length)
    return histories


def reached(history, accuracy, target):
    """Step of each seed at which the accuracy passes the target, interpolated."""
    steps = history.evaluated()["step"]
    found = []
    for column in accuracy.T:
        at = np.flatnonzero(column >= target)
        if not at.size:
            found.append(np.inf)
        elif at[0] == 0:
            found.append(steps[0])
        else:
            i = at[0]
            share = (target - column[i - 1]) / (column[i] - column[i - 1])
            found.append(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return np.array(found, float)


def ending(accuracy):
    """Mean over the last tenth of the evaluations, for each seed."""
    return accuracy[-max(1, len(accuracy) // 10) :].mean(0)


def accuracies(histories, split, seeds):
    where = list(SPLITS).index(split)
    part = slice(where * seeds, (where + 1) * seeds)
    return {
        label: history.evaluated()["test_accuracy"][:, part]
        for label, history in histories.items()
    }


def rows_of(histories, split, seeds):
    """The table of one task and split, and the factor of the best compressed method."""
    accuracy = accuracies(histories, split, seeds)
    best = max(ending(accuracy[label]).mean() for label in UNCOMPRESSED)
    target = 0.98 * best
    hits = {
        label: np.median(reached(history, accuracy[label], target))
        for label, history in histories.items()
    }

    def mega(label, steps, *columns):
        return sum(histories[label][c][0] for c in columns) * steps / 1e6

    least = min(mega(u, hits[u], "message_bytes") for u in UNCOMPRESSED)
    rows, ratios = [], {}
    for label, steps in hits.items():
        end = ending(accuracy[label])
        row = {
            "method": label,
            "kB up per step": f"{mega(label, 1e3, 'message_bytes'):.2f}",
        }
        if np.isfinite(steps):
            up = mega(label, steps, "message_bytes")
            both = mega(label, steps, "message_bytes", "down_bytes")
            row["MB up to target"], row["factor"] = f"{up:.3f}", "ends below"
            if end.mean() >= target:
                ratios[label] = least / up
                row["factor"] = f"{least / up:.1f}"
            row["MB up + down"], row["steps"] = f"{both:.2f}", f"{steps:.0f}"
        else:
            row |= dict.fromkeys(
                ("MB up to target", "factor", "MB up + down", "steps"), ""
            )
            row["MB up to target"] = "not reached"
        row["final accuracy"] = f"{end.mean():.4f} ± {end.std():.4f}"
        row["gap, points"] = f"{100 * (end.mean() - best):+.1f}"
        rows.append(row)
    return target, rows, {k: r for k, r in ratios.items() if k not in UNCOMPRESSED}


def verdict(split, ratios, rows):
    ten = [label for label, ratio in ratios.items() if ratio >= 10]
    if not ratios:
        return f"{split}: no compressed method ends at the target."
    best = max(ratios, key=ratios.get)
    gaps = {row["method"]: row["gap, points"] for row in rows}
    if ten:
        named = ", ".join(f"{label} ({ratios[label]:.1f})" for label in ten)
        return f"{split}: ten-fold or more, ending above the target, with {named}."
    return (
        f"{split}: the ten-fold claim does not hold here; the best factor of those "
        f"that end above the target is "
        f"{ratios[best]:.1f}, {best} ({gaps[best]} points at the end)."
    )


def picture(found, seeds, path):
    figure, axes = plt.subplots(
        len(found), len(SPLITS), figsize=(12, 4.5 * len(found)), layout="constrained"
    )
    for line, (kind, histories) in zip(axes, found.items(), strict=True):
        for ax, split in zip(line, SPLITS, strict=True):
            for label, accuracy in accuracies(histories, split, seeds).items():
                sent = histories[label].evaluated()["message_bytes"] / 1e6
                style = "--" if label in UNCOMPRESSED else "-"
                ax.plot(sent, np.median(accuracy, 1), style, label=label)
            ax.set(xscale="log", ylim=(0.5, 1.0), title=f"{kind}, {split}")
            ax.set(xlabel="MB up per worker", ylabel="test accuracy")
    axes[0, 0].legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def report(options):
    """Run, write CSV and picture, and return the lines of this part."""
    source = functools.cache(lambda: dataset(options))
    found = {}
    for kind in UPPER_STEPS:
        print(f"  hyper-{kind}", flush=True)
        found[kind] = compare(kind, options, source)
    name = "digits" if options.fashion is None else "Fashion-MNIST"
    tuned_over = TUNED_OVER if options.fashion is None else options.steps or LENGTH
    lines = [
        f"## Ten-fold? Bytes up to a fixed accuracy, {name}",
        "",
        f"{NODES} workers, minibatches of {BATCH} on each level, {options.seeds} seeds "
        "(split, start and noise), constant steps. Hyper-representation: backbone "
        "64-32-16 and a linear head; hyper-cleaning: half of the training labels "
        f"replaced at random, one entry of x per training sample, ridge {RIDGE}. There "
        "each worker's direction of x is zero but for its own samples; that gets no "
        "credit: a dense message counts all entries, and a sparsifier draws from all "
        "of them. Target: 98 % of the best uncompressed final test accuracy (means "
        "over seeds; final = mean of the last tenth of the evaluations). Every method "
        "chose its pair of steps from the same grid, by the mean validation loss over "
        f"{tuned_over} steps on the worse of {len(TUNING_SEEDS)} seeds of their own. "
        "MB (1e6 bytes) per worker, exact, median over the seeds, interpolated between "
        f"evaluations every {EVERY} steps; factor: against the best uncompressed, for "
        "methods that end at the target. Methods with 2 x draw batches twice as large "
        "on half of the steps. The factor cannot exceed the ratio of the kB per step "
        "unless a method needs fewer steps: 10 % of the entries can hardly give "
        "ten-fold.",
    ]
    raw = []
    for (kind, histories), split in itertools.product(found.items(), SPLITS):
        target, rows, ratios = rows_of(histories, split, options.seeds)
        raw += [{"task": kind, "split": split, **row} for row in rows]
        lines += ["", f"### Hyper-{kind}, {split}: target {target:.4f}", ""]
        lines += [*table(rows), "", verdict(split, ratios, rows)]
    write_csv(options.out / "tenfold.csv", raw)
    picture(found, options.seeds, options.out / "tenfold.png")
    return lines
