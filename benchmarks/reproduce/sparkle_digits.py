"""Single loops on coefficient tuning with minibatches and unlike nodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from report import table, write_csv
from sparkle_quadratic import METHODS, RULES

import dbojax as dbo

NODES, HETEROGENEITY, BATCH, STEPS, EVERY = 10, 0.8, 32, 500, 10
UPPER = (10.0, 30.0, 100.0, 300.0)
LOWER = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
PAIRS = [(upper, lower) for upper in UPPER for lower in LOWER]
SEEDS, TUNING_SEEDS, SHARE = 5, (100, 101), 0.98
DX, DY = 64, 640


def task_of(seed):
    data = dbo.tasks.data
    deal = functools.partial(data.split_by_label, h=HETEROGENEITY)
    shards = data.distribute(data.digits(), n=NODES, deal=deal, seed=seed)
    return dbo.tasks.coefficient_tuning(shards)


def method(label, problem, row):
    """One method over a ring with the steps of a row of settings."""
    w = dbo.topology.metropolis(dbo.topology.ring(NODES))
    wire = dbo.channels.exact(dbo.mixing.mixer(w))
    steps = {"upper_step": row[0], "lower_step": row[1]}
    if METHODS[label] is None:
        return dbo.algorithms.d_soba(problem, channel=wire, **steps)
    upper, lower = (RULES[name] for name in METHODS[label])
    wires = {"upper_channel": wire, "lower_channel": wire}
    return dbo.algorithms.sparkle(problem, upper=upper, lower=lower, **wires, **steps)


def curves(label, task, pairs, seed):
    """Scores, (evaluations, runs), of every pair of steps at once."""
    build = functools.partial(method, label, task.problem)
    swept = dbo.sweep(build, jnp.asarray(pairs, jnp.float32), batch_axis=None)
    start = [
        dbo.replicate(dbo.replicate(v, NODES), len(pairs)) for v in (task.x0, task.y0)
    ]
    draw = task.sampler(BATCH)

    @jax.jit
    def run(start, key):
        def body(state, step):
            # All runs see the same batches.
            batch = draw(jax.random.fold_in(key, 2 * step), step)
            state, _ = swept.step(jax.random.fold_in(key, 2 * step + 1), state, batch)
            return state, None

        def chunk(state, first):
            state, _ = jax.lax.scan(body, state, first + jnp.arange(EVERY))
            return state, jax.vmap(task.evaluate)(state)

        chunks = jnp.arange(0, STEPS, EVERY)
        return jax.lax.scan(chunk, swept.init(*start), chunks)[1]

    scores = run(start, jax.random.key(seed))
    return {name: np.asarray(values) for name, values in scores.items()}


def final(values):
    """Mean of the last tenth of the evaluations; what diverged counts as the worst."""
    last = values[-max(1, len(values) // 10) :].mean(0)
    return np.where(np.isfinite(last), last, np.inf)


def floats(label):
    rules = METHODS[label] or ("ATC", "ATC")
    above, below = (2 if rule.startswith("GT") else 1 for rule in rules)
    return above * DX + below * 2 * DY


def _spread(values):
    return f"{np.median(values):.4f} [{values.min():.4f}, {values.max():.4f}]"


def report(options):
    """Tune, run, write CSV, and return the lines of this part."""
    tasks = {seed: task_of(seed) for seed in (*range(SEEDS), *TUNING_SEEDS)}
    found = {}
    for label in METHODS:
        losses = [
            final(curves(label, tasks[seed], PAIRS, seed)["validation_loss"])
            for seed in TUNING_SEEDS
        ]
        best = PAIRS[int(np.argmin(np.max(losses, 0)))]
        runs = [curves(label, tasks[seed], [best], seed) for seed in range(SEEDS)]
        scores = {k: np.concatenate([r[k] for r in runs], 1) for k in runs[0]}
        found[label] = (best, scores)
        accuracy = final(scores["test_accuracy"])
        print(f"   {label}: {best}, accuracy {accuracy.round(4)}", flush=True)
    ends = {k: final(s["test_accuracy"]) for k, (_, s) in found.items()}
    target = SHARE * max(np.median(end) for end in ends.values())
    rows = []
    for label, (best, scores) in found.items():
        reached = scores["test_accuracy"] >= target
        hits = np.where(reached.any(0), (reached.argmax(0) + 1) * EVERY, np.inf)
        steps = np.median(hits)
        loss, end = final(scores["validation_loss"]), ends[label]
        rows.append(
            {
                "method": label,
                "steps (x, y)": f"{best[0]:g}, {best[1]:g}",
                "validation loss": _spread(loss),
                "test accuracy": _spread(end),
                "steps to target": f"{steps:.0f}",
                "kB per link to target": f"{steps * 4 * floats(label) / 1e3:.0f}",
            }
        )
    write_csv(options.out / "digits.csv", rows)
    return [
        "## Coefficient tuning, digits",
        "",
        f"{NODES} nodes on a ring, {HETEROGENEITY:.0%} of a node's samples from one "
        f"class, minibatches of {BATCH} on each level, {STEPS} steps, moving average "
        f"of x with weight 0.1. Steps by the validation loss on the worse of two other "
        "splits, one "
        f"grid of {len(PAIRS)} for all (x: {UPPER[0]:g} to {UPPER[-1]:g}; y and z: "
        f"{LOWER[0]:g} to {LOWER[-1]:g}). "
        f"Means over the last tenth, median [range] over {SEEDS} splits. Target: "
        f"{SHARE:.0%} of the best median accuracy, {target:.4f}, seen every {EVERY} "
        "steps; median over the splits.",
        "",
        *table(rows),
    ]
