"""Memory and time of every family of hypergradients against the depth of the unroll.

    python benchmarks/reproduce/fg2u/depth.py
    python benchmarks/reproduce/fg2u/depth.py --depths 16 64 256 1024

x is 200 synthetic 8x8 images (12 800 entries), y a network of 18 910 parameters trained
on them by momentum SGD, the upper loss is that on scikit-learn's digits. Memory is what
the compiled program sets aside for temporaries; times are medians of calls that take
turns, blocked on the device, compilation apart.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["tasks", "plots"])

import argparse
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import header, table, write_csv

import dbojax as dbo

h = dbo.hypergradients
SAMPLES, HIDDEN = 200, 252


def network(y, images):
    hidden = jax.nn.relu(images @ y["in"] + y["in_bias"])
    return hidden @ y["out"] + y["out_bias"]


def loss(y, samples):
    images, labels = samples
    return optax.losses.softmax_cross_entropy(network(y, images), labels).mean()


def start():
    """Random images, and a random network."""
    keys = jax.random.split(jax.random.key(0), 3)
    y = {
        "in": jax.random.normal(keys[0], (64, HIDDEN)) / 8,
        "in_bias": jnp.zeros((1, HIDDEN)),
        "out": jax.random.normal(keys[1], (HIDDEN, 10)) / HIDDEN**0.5,
        "out_bias": jnp.zeros((1, 10)),
    }
    return jax.random.uniform(keys[2], (SAMPLES, 64)), y


LABELS = np.eye(10, dtype=np.float32)[np.arange(SAMPLES) % 10]
problem = dbo.Problem(
    upper=lambda x, y, samples: loss(y, samples),
    lower=lambda x, y, samples: loss(y, (x, LABELS)),
)


def families(inner):
    """Name -> estimator, or the inner solver alone."""
    solve = h.solver(inner)

    def alone(key, x, y, state, batch):
        return solve(key, x, y, batch)

    return {
        "inner solver alone": dbo.Hypergradient(lambda x, y: (), alone),
        "forward gradient, b = 1": h.forward_gradient(problem, inner, 1, chunk=1),
        "forward gradient, b = 8": h.forward_gradient(problem, inner, 8, chunk=8),
        "forward gradient, b = 8, one at a time": h.forward_gradient(
            problem, inner, 8, chunk=1
        ),
        "zeroth order, b = 8": h.zeroth_order(problem, inner, 8, step=1e-3),
        "reverse": h.reverse(problem, inner),
        "checkpointed": h.checkpointed(problem, inner),
        "nested": h.nested(problem, inner),
        "truncated, s = 8": h.truncated(problem, inner, 8),
        "CG, 20 steps": h.cg(problem, 20, damping=0.1, inner=inner),
        "Neumann, 20 terms": h.neumann(problem, 20, 0.1, inner=inner),
        "Hessian-free": h.hessian_free(problem, inner=inner),
    }


def samples():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images[:500] / 16, jnp.float32), jnp.eye(10)[labels[:500]]


def measure(depth, repeats):
    """Rows (family, depth, temporary bytes, median seconds)."""
    x, y = start()
    inner = h.descent(problem, optax.sgd(0.01, momentum=0.9), depth)
    programs = {}
    for name, hyper in families(inner).items():
        args = jax.random.key(0), x, y, hyper.init(x, y), samples()
        programs[name] = jax.jit(hyper.estimate).lower(*args).compile(), args
    times = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, (program, args) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*args))
            times[name].append(time.perf_counter() - begin)
    for name, (program, _) in programs.items():
        used = program.memory_analysis().temp_size_in_bytes
        yield name, depth, used, float(np.median(times[name][1:]))


def rows(found, depths):
    """One row per family: MiB at each depth, and time over that of the solver alone."""
    kept = {(name, depth): (used, seconds) for name, depth, used, seconds in found}
    for name in dict.fromkeys(name for name, *_ in found):
        row = {"family": name}
        for depth in depths:
            row[f"MiB, T = {depth}"] = f"{kept[name, depth][0] / 2**20:.2f}"
        for depth in depths:
            floor = kept["inner solver alone", depth][1]
            row[f"time, T = {depth}"] = f"{kept[name, depth][1] / floor:.1f}"
        yield row


def draw(found, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in dict.fromkeys(name for name, *_ in found):
        _, depths, used, seconds = zip(*(r for r in found if r[0] == name), strict=True)
        axes[0].loglog(depths, np.divide(used, 2**20), marker="o", label=name)
        axes[1].loglog(depths, seconds, marker="o")
    axes[0].set(xlabel="inner steps T", ylabel="temporary memory, MiB")
    axes[1].set(xlabel="inner steps T", ylabel="seconds per estimate")
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/fg2u"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = [row for T in options.depths for row in measure(T, options.repeats)]
    lines = [
        "# Memory and time against depth",
        "",
        f"{header()}; {options.repeats} repeats. Times are multiples of the inner "
        "solver alone.",
        "",
        *table(list(rows(found, options.depths))),
    ]
    print(*lines, sep="\n")
    (options.out / "depth.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    names = ("family", "depth", "temporary bytes", "seconds")
    write_csv(
        options.out / "depth.csv", [dict(zip(names, r, strict=True)) for r in found]
    )
    draw(found, options.out / "depth.png")


if __name__ == "__main__":
    main()
