"""Growth: how the cost of a step depends on n, d, the degree and the unroll's depth.

    python benchmarks/speed/growth.py

Exponents are slopes of a least-squares fit of log seconds over log size, one for each
turn. Small programs wait for the dispatch of operations and not for arithmetic, those
after them fit into a cache, and arrays that leave it on the way make even a copy grow
faster than its size: n and d are fitted over the ``FITTED`` largest sizes, which are
all beyond it; all are drawn. A step is also held against a copy of all that it
remembers.
"""

import start

start.ready()

import estimators
import floors
import hypergradients as study
import jax
import jax.numpy as jnp
import numpy as np
from channels import exchange
from records import exponents, normal, power, row
from steps import floats, stepping

import dbojax as dbo

FITTED = 3
# The state of those that are fitted is several times a cache of 32 MB.
NODES, WIDTH = [8, 64, 512, 2048, 4096, 6144], 4000
LENGTHS = [1000, 10_000, 100_000, 1_000_000, 2_000_000, 3_000_000]  # at n = 8
MANY = 4096  # nodes of which it is checked that the method works
DEGREES = [2, 4, 8, 16, 32]  # at n = 64, d = 1e5
DEPTHS = [10, 30, 100, 300, 1000]
STEP = 1e-3
UNIT = "unit"  # a copy of one stacked array; one gradient where T grows
COPY = "copy of the state of"
UNIT_OF = {"T": "one gradient"}


def upper(x, y, target):
    return 0.5 * jnp.sum((y - target) ** 2) + 0.05 * jnp.sum(x**2)


def lower(x, y, curvature):
    return 0.5 * jnp.sum(curvature * (y - x) ** 2)


PROBLEM = dbo.Problem(upper, lower)


def mixes(n, degree=2):
    t = dbo.topology
    return dbo.mixing.mixer(t.metropolis(t.ring(n, degree // 2)))


def compressed(mix, share=0.01):
    part = dbo.compressors.block_top_k(share)
    return dbo.channels.reference_point(mix, part, 0.1)


def methods(n):
    """Label -> method on a ring of n nodes."""
    mix = mixes(n)
    wire, both = dbo.channels.exact(mix), {"upper_step": STEP, "lower_step": STEP}
    return {
        "C2DFB, block top-k 1 %": dbo.algorithms.c2dfb(
            PROBLEM, outer=wire, inner=compressed(mix), inner_steps=3, **both
        ),
        "D-SOBA": dbo.algorithms.d_soba(PROBLEM, channel=wire, **both),
    }


def started(method, n, d):
    """A carry of `stepping`: state and data."""
    start = jnp.zeros((n, d))
    batch = dbo.Batch(normal(n, d, 1), 1 + 0.5 * jnp.tanh(normal(n, d, 2)))
    return method.init(start, start), batch


def sized(n, d):
    """Label -> (step, carry) at one size: steps, and copies beside them."""
    found = {UNIT: (floors.copy_step, normal(n, d))}
    for label, method in methods(n).items():
        carry = started(method, n, d)
        found[label] = stepping(method), carry
        found[f"{COPY} {label}"] = floors.copy_step, floats(carry[0])
    return found


def by_degree(degree):
    n, d = 64, 100_000
    mix, v, key = mixes(n, degree), normal(n, d), jax.random.key(1)
    channels = {
        "reference_point, block top-k 0.1 %": compressed(mix, 0.001),
        "reference_point, block top-k 1 %": compressed(mix),
        "exact, dense messages": dbo.channels.exact(mix),
    }
    found = {
        label: (exchange(channel, key), (v, jax.jit(channel.init)(0 * v)))
        for label, channel in channels.items()
    }
    return {UNIT: (floors.copy_step, v), **found}


def by_depth(depth):
    x, y, batch = study.arguments(jnp.float32)
    carry = x, y, batch, jnp.zeros_like(x)
    found = {UNIT: (estimators.gradient, carry)}
    for name in ("reverse", "checkpointed", "forward_gradient"):
        found[name] = estimators.estimate(study.ours(name, depth)), carry
    return found


def sweeps(options):
    """Sweep -> (sizes, size -> programs, the sizes that are fitted)."""
    nodes, lengths, degrees, depths = NODES, LENGTHS, DEGREES, DEPTHS
    if options.short:
        nodes, lengths = nodes[1:4], lengths[2:5]
        degrees, depths = degrees[::2], []
    found = {
        "n": (nodes, lambda n: sized(n, WIDTH), nodes[-FITTED:]),
        "d": (lengths, lambda d: sized(8, d), lengths[-FITTED:]),
        "degree": (degrees, by_degree, degrees),
        "T": (depths, by_depth, depths),
    }
    return {sweep: parts for sweep, parts in found.items() if parts[0]}


def named(label, sweep):
    """What a line of a sweep is called."""
    return UNIT_OF.get(sweep, "copy of an array") if label == UNIT else label


def measure(sweep, sizes, programs, fitted, options):
    """The lines of one sweep, sizes first, exponents last; all sizes take turns."""
    steps = {
        (label, size): parts
        for size in sizes
        for label, parts in programs(size).items()
    }
    labels = dict.fromkeys(label for label, _ in steps)
    alike = [[(label, size) for size in fitted] for label in labels]
    found = floors.measured(steps, options.turns, options.budget(15), alike)
    unit, lines = "gradient" if sweep == "T" else "copy", []
    for (label, size), (program, seconds) in found.items():
        base = found[UNIT, size][1]
        case = f"{named(label, sweep)}, {sweep}={power(size)}"
        line = row("growth", case, unit, program, seconds / base, seconds)
        line |= {"sweep": sweep, "size": size, "what": label}
        lines.append(line)
    times = {label: [found[label, size][1] for size in fitted] for label in labels}
    slopes = {label: exponents(fitted, times[label]) for label in labels}
    for label in labels:
        case = f"{named(label, sweep)}, exponent in {sweep}"
        line = row("exponents", case, "fit", None, slopes[label], times[label][-1])
        line |= {"sweep": sweep, "what": label}
        line["fitted"] = f"{power(fitted[0])} to {power(fitted[-1])}"
        copy = slopes.get(f"{COPY} {label}")
        if copy is not None:
            line["beyond its copy"] = float(np.median(slopes[label] - copy))
        lines.append(line)
    return lines


def many_nodes():
    """C2DFB on many nodes: a step on a problem whose losses stay finite."""
    n, d = MANY, WIDTH
    method = methods(n)["C2DFB, block top-k 1 %"]
    state, batch = started(method, n, d)
    step = jax.jit(method.step, donate_argnums=1)
    losses = []
    for i in range(5):
        state, metrics = step(jax.random.key(i), state, batch)
        losses.append(float(metrics.upper))
    return losses


def rows(options):
    lines = []
    for sweep, parts in sweeps(options).items():
        lines += measure(sweep, *parts, options)
    if not options.short:
        losses = many_nodes()
        falls = bool(np.isfinite(losses).all() and losses[-1] < losses[0])
        for line in lines:
            if line["case"] == f"C2DFB, block top-k 1 %, n={power(MANY)}":
                line["loss falls"] = falls
    return lines


def plot(lines, path):
    """Seconds against size, one panel per sweep, with the fitted exponents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = dict.fromkeys(x["sweep"] for x in lines if x["group"] == "growth")
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4))
    for ax, sweep in zip(np.atleast_1d(axes), panels, strict=True):
        here = [line for line in lines if line.get("sweep") == sweep]
        slopes = {x["what"]: x["ratio"] for x in here if x["group"] == "exponents"}
        for label, slope in slopes.items():
            points = [
                (x["size"], x["ms"])
                for x in here
                if x["group"] == "growth" and x["what"] == label
            ]
            text = f"{named(label, sweep)}: {slope:.2f}"
            ax.loglog(*zip(*points, strict=True), "o-", label=text)
        ax.minorticks_off()
        sizes = sorted({x["size"] for x in here if x["group"] == "growth"})
        ax.set_xticks(sizes, [power(size) for size in sizes], fontsize="x-small")
        ax.set(xlabel=sweep, ylabel="ms per step" if sweep == "n" else "")
        ax.legend(fontsize="x-small", title="exponent", title_fontsize="x-small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    import run

    raise SystemExit(run.alone("growth"))
