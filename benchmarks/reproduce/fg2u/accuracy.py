"""How far each family of hypergradients is from the exact one, at equal time.

    python benchmarks/reproduce/fg2u/accuracy.py
    python benchmarks/reproduce/fg2u/accuracy.py --per-class 50 --depth 100 --seeds 10

Small data condensation: x is some 8x8 images per class, y a network trained on them by
momentum SGD, the upper loss is that on scikit-learn's digits. Cosine to the gradient of
checkpointed reverse mode, which is exact, and squared error over its squared norm, at
random images and at real ones; then the best of each family within multiples of the
exact one's own time.
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
HIDDEN = 64
BUDGETS = (0.5, 1, 2, 4, 16, 64)  # times that of the exact gradient


def loss(y, samples):
    images, labels = samples
    scores = jax.nn.relu(images @ y["in"]) @ y["out"]
    return optax.losses.softmax_cross_entropy(scores, labels).mean()


def random_network(key, x, y):
    del x, y
    key_in, key_out = jax.random.split(key)
    return {
        "in": jax.random.normal(key_in, (64, HIDDEN)) / 8,
        "out": jax.random.normal(key_out, (HIDDEN, 10)) / HIDDEN**0.5,
    }


def images_and_labels():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), labels


def bilevel(per_class):
    targets = jnp.repeat(jnp.eye(10), per_class, axis=0)
    return dbo.Problem(
        upper=lambda x, y, samples: loss(y, samples),
        lower=lambda x, y, samples: (
            loss(y, (x, targets)) + 1e-4 * optax.tree.norm(y, squared=True)
        ),
    )


def points(per_class):
    """Where the estimates are compared: random images, and real ones."""
    images, labels = images_and_labels()
    real = [images[np.flatnonzero(labels == c)[:per_class]] for c in range(10)]
    noise = jax.random.uniform(jax.random.key(1), (10 * per_class, 64))
    return {"random images": noise, "real images": jnp.concatenate(real)}


def families(problem, inner):
    """Family -> {setting: estimator}."""
    guided = h.truncated(problem, inner, inner.steps // 2)
    draws = (1, 4, 16, 64, 256)
    return {
        "forward gradient": {
            f"b = {b}": h.forward_gradient(problem, inner, b, chunk=min(b, 16))
            for b in draws
        },
        "forward gradient, guided by truncated s = T / 2": {
            f"b = {b}": h.forward_gradient(
                problem, inner, b, chunk=min(b, 16), guide=guided
            )
            for b in draws
        },
        "truncated": {
            f"s = {s}": h.truncated(problem, inner, s)
            for s in (5, 10, 25, 50, 75)
            if s < inner.steps
        },
        "Hessian-free": {"": h.hessian_free(problem, inner=inner)},
        "Neumann": {
            f"K = {k}, alpha = {a}": h.neumann(problem, k, a, inner=inner)
            for k in (5, 20, 100)
            for a in (0.03, 0.1)
        },
        "CG": {
            f"K = {k}": h.cg(problem, k, damping=0.01, inner=inner)
            for k in (5, 20, 100)
        },
    }


def distance(estimate, exact):
    """Cosine, and squared error over the squared norm."""
    cosine = jnp.vdot(estimate, exact) / jnp.maximum(
        jnp.linalg.norm(estimate) * jnp.linalg.norm(exact), 1e-30
    )
    return cosine, jnp.sum((estimate - exact) ** 2) / jnp.sum(exact**2)


def measured(hyper, exact, x, samples, seeds):
    """Mean cosine and error over seeds, and the median seconds of one estimate."""
    y = random_network(jax.random.key(0), None, None)
    state = hyper.init(x, y)

    def once(key):
        return hyper.estimate(key, x, y, state, samples)[0]

    program = jax.jit(once).lower(jax.random.key(0)).compile()
    keys = jax.random.split(jax.random.key(2), seeds)
    found, seconds = [], []
    for key, truth in zip(keys, exact, strict=True):
        jax.block_until_ready(program(key))
        begin = time.perf_counter()
        estimate = jax.block_until_ready(program(key))
        seconds.append(time.perf_counter() - begin)
        found.append(distance(estimate.ravel(), truth.ravel()))
    cosine, error = np.mean(found, axis=0)
    return float(cosine), float(error), float(np.median(seconds))


def compare(options):
    """Rows (point, family, setting, cosine, error, seconds over the exact one's)."""
    problem = bilevel(options.per_class)
    schedule = optax.cosine_decay_schedule(options.rate, options.depth)
    inner = h.descent(
        problem, optax.sgd(schedule, momentum=0.9), options.depth, random_network
    )
    images, labels = images_and_labels()
    samples = images, jnp.eye(10)[labels]
    exact = h.checkpointed(problem, inner)
    for point, x in points(options.per_class).items():
        y = random_network(jax.random.key(0), None, None)
        keys = jax.random.split(jax.random.key(2), options.seeds)
        reference = jax.jit(
            lambda key, x=x, y=y: exact.estimate(key, x, y, (), samples)
        )
        truths = [reference(key)[0] for key in keys]
        *_, unit = measured(exact, truths, x, samples, options.seeds)
        for family, settings in families(problem, inner).items():
            for setting, hyper in settings.items():
                cosine, error, seconds = measured(
                    hyper, truths, x, samples, options.seeds
                )
                yield point, family, setting, cosine, error, seconds / unit


def within_budgets(found):
    """The largest cosine of each family within each time budget."""
    for point in dict.fromkeys(row[0] for row in found):
        for family in dict.fromkeys(row[1] for row in found):
            mine = [row for row in found if row[:2] == (point, family)]
            row = {"at": point, "family": family}
            for budget in BUDGETS:
                inside = [r for r in mine if r[5] <= budget]
                best = max(inside, key=lambda r: r[3], default=None)
                row[f"{budget}x"] = f"{best[3]:.2f} ({best[2]})" if best else "-"
            yield row


def draw(found, path):
    points = list(dict.fromkeys(row[0] for row in found))
    figure, axes = plt.subplots(1, len(points), figsize=(11, 4), layout="constrained")
    for axis, point in zip(axes, points, strict=True):
        for family in dict.fromkeys(row[1] for row in found):
            mine = sorted(row[5:2:-1] for row in found if row[:2] == (point, family))
            seconds, _, cosines = zip(*mine, strict=True)
            axis.semilogx(seconds, cosines, marker="o", label=family)
        axis.axvline(1, color="grey", linestyle=":")
        axis.set(xlabel="time / exact reverse mode", ylabel="cosine", title=point)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--rate", type=float, default=0.1, help="of the inner solver")
    parser.add_argument("--seeds", type=int, default=5, help="networks per estimate")
    parser.add_argument("--out", type=Path, default=Path("results/fg2u"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = list(compare(options))
    names = ("at", "family", "setting", "cosine", "squared error", "time")
    records = [dict(zip(names, row, strict=True)) for row in found]
    write_csv(options.out / "accuracy.csv", records)
    shown = [
        record
        | {
            "cosine": f"{record['cosine']:.3f}",
            "squared error": f"{record['squared error']:.3g}",
            "time": f"{record['time']:.2f}",
        }
        for record in records
    ]
    lines = [
        "# Hypergradients against the exact one",
        "",
        f"{header()}; {10 * options.per_class} images, T = {options.depth}, means over "
        f"{options.seeds} networks. Time in units of checkpointed reverse mode, which "
        "is exact.",
        "",
        *table(shown),
        "",
        "The largest cosine of each family within a time budget:",
        "",
        *table(list(within_budgets(found))),
    ]
    print(*lines, sep="\n")
    (options.out / "accuracy.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    draw(found, options.out / "accuracy.png")


if __name__ == "__main__":
    main()
