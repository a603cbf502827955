"""Single loops on the closed-form quadratic: speed without noise, floors with it."""

import jax
import jax.numpy as jnp
import numpy as np
from report import table, write_csv

import dbojax as dbo

NODES, DX, DY, PROBLEM = 16, 5, 10, 0
STEPS, TARGET, AVERAGE = 2000, 1e-6, 0.3
UPPER = 3.2 * 2.0 ** -np.arange(6)
LOWER = 0.64 * 2.0 ** (-0.5 * np.arange(13))
SIGMA, SEEDS, NOISY_STEPS = 1.0, 8, 4000
COMMON = (0.1, 0.03)  # steps of the runs with noise, stable for all

_s = dbo.strategies
RULES = {
    "GT": _s.gradient_tracking,
    "GT, ATC": _s.gradient_tracking_atc,
    "EXTRA": _s.extra,
    "ED": _s.exact_diffusion,
}
# Label: (rule above, rule below).
METHODS = {
    "SPARKLE-GT": ("GT", "GT"),
    "SPARKLE-GT (ATC)": ("GT, ATC", "GT, ATC"),
    "SPARKLE-EXTRA": ("EXTRA", "EXTRA"),
    "SPARKLE-ED": ("ED", "ED"),
    "GT above, ED below": ("GT", "ED"),
    "ED above, GT below": ("ED", "GT"),
    "D-SOBA": None,
}
_t = dbo.topology
RING, COMPLETE = _t.metropolis(_t.ring(NODES)), np.full((NODES, NODES), 1 / NODES)
# Label: (graph above, graph below).
GRAPHS = {
    "ring, ring": (RING, RING),
    "ring, complete": (RING, COMPLETE),
    "complete, ring": (COMPLETE, RING),
    "complete, complete": (COMPLETE, COMPLETE),
}


def method(label, problem, row):
    """One method over the graphs, and with the steps, of a row of settings."""
    above, below = (dbo.channels.exact(dbo.mixing.dense(row[w])) for w in ("w", "v"))
    steps = {"upper_step": row["upper"], "lower_step": row["lower"], "average": AVERAGE}
    if METHODS[label] is None:
        return dbo.algorithms.d_soba(
            problem, channel=above, lower_channel=below, **steps
        )
    upper, lower = (RULES[name] for name in METHODS[label])
    return dbo.algorithms.sparkle(
        problem,
        upper=upper,
        lower=lower,
        upper_channel=above,
        lower_channel=below,
        **steps,
    )


def paths(label, task, rows, steps, draw=None):
    """(true norm at the mean of x, disagreement of x and y) per step and row."""
    clean = task

    def build(row):
        own = method(label, task.problem, row)

        def step(key, state, _):
            key, key_batch = jax.random.split(key)
            batch = task.batch if draw is None else draw(key_batch, 0)
            state, metrics = own.step(key, state, batch)
            slope = clean.exact.hypergradient(dbo.node_mean(state.x))
            norm = jnp.linalg.norm(slope)
            return state, (norm, metrics.consensus.x, metrics.consensus.y)

        return own._replace(step=step)

    runs = len(rows["upper"])
    swept = dbo.sweep(build, rows, batch_axis=None)
    start = [dbo.replicate(dbo.replicate(v, NODES), runs) for v in (task.x0, task.y0)]

    @jax.jit
    def run(start, key):
        def body(state, step):
            return swept.step(jax.random.fold_in(key, step), state, ())

        return jax.lax.scan(body, swept.init(*start), jnp.arange(steps))[1]

    return [np.asarray(part) for part in run(start, jax.random.key(1))]


def settings(graphs, pairs, seeds=1):
    """Every graph pair with every pair of steps, ``seeds`` times."""
    found = {"w": [], "v": [], "upper": [], "lower": []}
    for w, v in graphs:
        for upper, lower in pairs:
            for _ in range(seeds):
                for name, value in zip(found, (w, v, upper, lower), strict=True):
                    found[name].append(value)
    return {name: jnp.asarray(np.array(values)) for name, values in found.items()}


def hitting(norm):
    """First step from which on the norm stays at the target, or infinity."""
    missed = np.flatnonzero(~(norm <= TARGET))
    first = missed[-1] + 2 if missed.size else 1
    return first if first <= len(norm) else np.inf


def floats(label):
    """Numbers that a node hands to a link in a step."""
    rules = METHODS[label] or ("ATC", "ATC")
    above, below = (2 if rule.startswith("GT") else 1 for rule in rules)
    return above * DX + below * 2 * DY


def speed(task):
    """Per method and graph pair: fewest steps to the target over the whole grid."""
    pairs = [(upper, lower) for upper in UPPER for lower in LOWER]
    rows, found = settings(GRAPHS.values(), pairs), []
    for label in METHODS:
        norms, *_ = paths(label, task, rows, STEPS)
        norms = norms.reshape(STEPS, len(GRAPHS), len(pairs))
        for g, graph in enumerate(GRAPHS):
            hits = [hitting(norms[:, g, p]) for p in range(len(pairs))]
            best = int(np.argmin(hits))
            least = np.nanmin(norms[-1, g])
            row = {"method": label, "graphs": graph, "steps": hits[best]}
            reached = np.isfinite(hits[best])
            row["upper step"] = pairs[best][0] if reached else np.nan
            row["lower step"] = pairs[best][1] if reached else np.nan
            row["floats"] = hits[best] * floats(label)
            row["end"] = norms[-1, g, best] if reached else least
            found.append(row)
            print("  ", row, flush=True)
    return found


def floors(task):
    """Per method and graph pair: root mean squares of the second half, with noise."""
    noisy = dbo.tasks.with_gradient_noise(task, SIGMA)
    rows, found = settings(GRAPHS.values(), [COMMON], SEEDS), []
    for label in METHODS:
        parts = paths(label, noisy, rows, NOISY_STEPS, noisy.sampler(1))
        half = [part[NOISY_STEPS // 2 :] for part in parts]
        half = [part.reshape(len(part), len(GRAPHS), SEEDS) for part in half]
        for g, graph in enumerate(GRAPHS):
            per_seed = [np.sqrt((part[:, g] ** 2).mean(0)) for part in half]
            row = {"method": label, "graphs": graph}
            for name, values in zip(("norm", "x", "y"), per_seed, strict=True):
                row[name] = np.sqrt((values**2).mean())
                row[f"{name} spread"] = values.std(ddof=1) / SEEDS**0.5
            found.append(row)
            print("  ", row, flush=True)
    return found


def _wide(found, cell):
    """One line per method, one column per graph pair."""
    lines = []
    for label in METHODS:
        own = {row["graphs"]: row for row in found if row["method"] == label}
        lines.append({"method": label} | {g: cell(own[g]) for g in GRAPHS})
    return lines


def _speed_cell(row):
    if not np.isfinite(row["steps"]):
        return f"ends at {row['end']:.1e}"
    return f"{row['steps']:.0f} ({8 * row['floats'] / 1e3:.0f} kB)"


def report(options):
    """Run, write CSV, and return the lines of this part."""
    with jax.enable_x64(True):
        task = dbo.tasks.quadratic(n=NODES, dx=DX, dy=DY, seed=PROBLEM)
        fast, noisy = speed(task), floors(task)
    write_csv(options.out / "speed.csv", fast)
    write_csv(options.out / "floors.csv", noisy)
    return [
        "## Speed without noise",
        "",
        f"`quadratic(n={NODES}, dx={DX}, dy={DY}, seed={PROBLEM})`, float64, full "
        f"batches, moving average of x with weight {AVERAGE:g}. Fewest steps until the "
        f"norm of the true hypergradient stays at or below {TARGET:g}, within {STEPS} "
        f"steps, over one grid for all: {len(UPPER)} upper steps {UPPER[-1]:.3g} to "
        f"{UPPER[0]:g} by factors of 2, {len(LOWER)} lower ones {LOWER[-1]:.2g} to "
        f"{LOWER[0]:g} by factors of 1.41. In brackets: bytes that one node hands to "
        "one link. Columns: graph above, graph below.",
        "",
        *table(_wide(fast, _speed_cell)),
        "",
        "The steps that were best on both rings (upper, lower):",
        "",
        *table(
            [
                {
                    "method": row["method"],
                    "upper": f"{row['upper step']:.3g}",
                    "lower": f"{row['lower step']:.3g}",
                }
                for row in fast
                if row["graphs"] == "ring, ring"
            ]
        ),
        "",
        "## Floors with noise",
        "",
        f"Gaussian noise of standard deviation {SIGMA:g} on every entry of every "
        f"direction, steps {COMMON[0]:g} (x) and {COMMON[1]:g} (y, z) for all. Norm of "
        "the true hypergradient at the mean of x, root mean square over the second "
        f"half of {NOISY_STEPS} steps and {SEEDS} seeds (standard error of the seeds); "
        "then the same of the disagreement of y.",
        "",
        *table(_wide(noisy, lambda r: f"{r['norm']:.4f} ({r['norm spread']:.4f})")),
        "",
        *table(_wide(noisy, lambda r: f"{r['y']:.3f}")),
    ]
