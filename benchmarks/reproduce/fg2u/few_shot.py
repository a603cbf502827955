"""Few-shot learning from a shared start, y_0 = x: MAML, iMAML and (FG)²U.

    python benchmarks/reproduce/fg2u/few_shot.py                     # both parts
    python benchmarks/reproduce/fg2u/few_shot.py --only digits
    python benchmarks/reproduce/fg2u/few_shot.py --seconds 60 --directions 64

Sinusoids follow Finn, Abbeel and Levine (2017), arXiv:1703.03400; the tasks made of
digits are ours. Neither appears in the paper on (FG)²U, arXiv:2406.14095.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["tasks", "plots"])

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from fg2u_meta import (
    Method,
    at_steps,
    best_rate,
    best_snapshot,
    clock_of,
    common_steps,
    learner,
    mebibytes,
    on_the_clock,
    row,
    spread,
)
from report import header, table, write_csv

import dbojax as dbo
from dbojax import hypergradients as hg

TESTED = 200  # held-out tasks
DEEP = 10  # how many times deeper the second memory column is


class Family(NamedTuple):
    """A distribution of tasks, and what learns them."""

    title: str
    about: str
    sizes: tuple  # of the layers
    draw: Callable  # (key, tasks) -> dbo.Batch(upper=queries, lower=shots), stacked
    judged: tuple  # tasks to choose rates by, tasks to test on
    loss: Callable  # (outputs, targets) -> scalar
    score: Callable  # the same, for the tables
    score_name: str
    tasks: int  # of one outer step
    depth: int  # T
    step_size: float
    strength: float  # lambda of iMAML
    damping: float  # of its linear system
    rates: tuple


def network(y, inputs):
    for weights, bias in y[:-1]:
        inputs = jax.nn.relu(inputs @ weights + bias)
    return inputs @ y[-1][0] + y[-1][1]


def start(key, sizes):
    """Glorot's variances, no bias; larger ones let inner steps diverge."""
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [
        (jax.random.normal(k, (m, n)) * jnp.sqrt(2 / (m + n)), jnp.zeros(n))
        for k, m, n in shapes
    ]


def sinusoids():
    shots, queries = 10, 10

    def draw(key, tasks, queries=queries):
        keys = jax.random.split(key, 3)
        amplitude = jax.random.uniform(keys[0], (tasks, 1, 1), minval=0.1, maxval=5.0)
        phase = jax.random.uniform(keys[1], (tasks, 1, 1), maxval=jnp.pi)
        shape = (tasks, shots + queries, 1)
        inputs = jax.random.uniform(keys[2], shape, minval=-5.0, maxval=5.0)
        samples = inputs, amplitude * jnp.sin(inputs - phase)
        return dbo.Batch(*(tuple(a[:, s] for a in samples) for s in cut(shots)))

    def mse(outputs, targets):
        return jnp.mean((outputs - targets) ** 2)

    held_out = (draw(jax.random.key(n), TESTED, 50) for n in (100, 101))
    about = (
        f"a sin(s - p) with a ~ U[0.1, 5], p ~ U[0, pi], s ~ U[-5, 5]; {shots} shots, "
        f"{queries} queries, squared error; validation and test are {TESTED} new tasks "
        "each, judged on 50 queries"
    )
    return Family(
        title="Sinusoids",
        about=about,
        sizes=(1, 40, 40, 1),
        draw=draw,
        judged=tuple(held_out),
        loss=mse,
        score=mse,
        score_name="squared error",
        tasks=10,
        depth=10,
        step_size=0.01,
        strength=1.0,
        damping=10.0,
        rates=(3e-4, 1e-3, 3e-3),
    )


def digits():
    ways, shots, queries = 5, 5, 5
    data = dbo.tasks.data.digits()
    images = data.inputs.reshape(-1, 8, 8) / 16
    # Least count of images of one digit is 174: 130 to learn from, 44 to validate.
    learnt, kept = 130, 174
    per_digit = [images[data.labels == digit][:kept] for digit in range(10)]
    turned = [np.rot90(a, turns, (1, 2)) for a in per_digit for turns in (0, 1)]
    pool = jnp.asarray(np.stack(turned).reshape(20, kept, 64), jnp.float32)
    train, valid, test = pool[:12, :learnt], pool[:12, learnt:], pool[12:]

    def task(key, pool):
        key_class, key_image = jax.random.split(key)
        classes = some(key_class, (len(pool),), ways)
        order = some(key_image, (ways, pool.shape[1]), shots + queries)
        images = pool[classes[:, None], order]  # (ways, shots + queries, 64)
        labels = jnp.broadcast_to(jnp.arange(ways)[:, None], order.shape)
        return dbo.Batch(
            *(
                (images[:, s].reshape(-1, 64), labels[:, s].reshape(-1))
                for s in cut(shots)
            )
        )

    def draw(key, tasks, pool=train):
        return jax.vmap(task, (0, None))(jax.random.split(key, tasks), pool)

    def entropy(outputs, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return jnp.mean(losses)

    def accuracy(outputs, labels):
        return jnp.mean(outputs.argmax(-1) == labels)

    held_out = (
        draw(jax.random.key(n), TESTED, p) for n, p in ((100, valid), (101, test))
    )
    about = (
        f"scikit-learn's 8 x 8 digits; a class is a digit, upright or turned by a "
        f"quarter; a task is {ways} classes in random order, {shots} shots and "
        f"{queries} queries of each, cross-entropy. Digits 0 to 5 (12 classes, "
        f"{learnt} images each) teach, {kept - learnt} other images of the same "
        "classes validate, digits 6 to 9 (8 classes that were never seen) test"
    )
    return Family(
        title="Digits",
        about=about,
        sizes=(64, 40, ways),
        draw=draw,
        judged=tuple(held_out),
        loss=entropy,
        score=accuracy,
        score_name="accuracy",
        tasks=10,
        depth=5,
        step_size=0.1,
        strength=0.5,
        damping=10.0,
        rates=(3e-4, 1e-3, 3e-3),
    )


def some(key, shape, count):
    """Different numbers below the last length, in random order."""
    return jax.lax.top_k(jax.random.uniform(key, shape), count)[1]


def cut(shots):
    """Queries for the upper level, shots for the lower one."""
    return slice(shots, None), slice(0, shots)


def solvers(family, depth):
    """Problem and inner solver of MAML, of its first-order form, and of iMAML."""

    def upper(x, y, batch):
        return family.loss(network(y, batch[0]), batch[1])

    def lower(x, y, batch):
        return upper(x, y, batch)

    def near(x, y, batch):
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), x, y)
        return upper(x, y, batch) + family.strength / 2 * sum(jax.tree.leaves(squares))

    def inner(problem, optimizer):
        return problem, hg.descent(problem, optimizer, depth, lambda key, x, y: x)

    sgd = optax.sgd(family.step_size)
    # The same steps with constant updates, so that dy_T/dx = 1.
    blind = optax.chain(sgd, optax.stateless(lambda u, _: jax.lax.stop_gradient(u)))
    plain = dbo.Problem(upper, lower)
    proximal = dbo.Problem(upper, near)
    return inner(plain, sgd), inner(plain, blind), inner(proximal, sgd)


def methods(family, options, depth=None):
    """Label -> method."""
    (plain, inner), (_, blind), (proximal, pulled) = solvers(
        family, depth or family.depth
    )
    first_order = hg.reverse(plain, blind)
    many = {"directions": options.directions, "chunk": options.chunk}

    def made(hyper, inner=inner):
        return Method(hyper, inner, lambda key: family.draw(key, family.tasks))

    return {
        "MAML, reverse": made(hg.reverse(plain, inner)),
        "MAML, checkpointed": made(hg.checkpointed(plain, inner)),
        "first-order MAML": made(first_order),
        "iMAML": made(
            hg.cg(proximal, max_steps=5, damping=family.damping, inner=pulled), pulled
        ),
        "(FG)²U": made(hg.forward_gradient(plain, inner, **many)),
        "(FG)²U, guided": made(
            hg.forward_gradient(plain, inner, **many, guide=first_order)
        ),
    }


def adapted(family, method):
    """``(x, tasks) -> (mean loss, mean score)`` on the queries, after adaptation."""
    solve = hg.solver(method.inner)

    def one(x, batch):
        y = solve(jax.random.key(0), x, x, batch)
        outputs = network(y, batch.upper[0])
        return tuple(
            measure(outputs, batch.upper[1]) for measure in (family.loss, family.score)
        )

    def judge(x, tasks):
        return jax.tree.map(jnp.mean, jax.vmap(one, (None, 0))(x, tasks))

    return jax.jit(judge)


class Found(NamedTuple):
    """What is known of one method."""

    rate: float
    runs: list  # one per seed
    losses: list  # (snapshots,) per seed, on test tasks
    scores: list
    memory: tuple  # MiB at T and DEEP T
    best: tuple  # per seed, the snapshot with the least validation loss


def learn(family, label, method, options):
    validation, test = family.judged
    first = start(jax.random.key(50), family.sizes)
    advance = learner(method, first, lambda x: x)
    deep = methods(family, options, DEEP * family.depth)[label]
    judge = adapted(family, method)
    rate = best_rate(
        advance,
        jax.random.key(51),
        family.rates,
        first,
        options.seconds / 4,
        lambda x: judge(x, validation)[0],
        clock_of(options)[0],
    )
    runs, losses, scores, best = [], [], [], []
    for seed in range(options.seeds):
        key_start, key = jax.random.split(jax.random.key(seed))
        x = start(key_start, family.sizes)
        run = on_the_clock(advance, key, rate, x, options.seconds, clock_of(options)[0])
        judged = [judge(row(run.x, i), test) for i in range(len(run.steps))]
        loss, score = np.array(judged).T
        best.append(best_snapshot(run, lambda x: judge(x, validation)[0]))
        runs.append(run)
        losses.append(loss)
        scores.append(score)
    memory = tuple(
        mebibytes(program) for program in (advance, learner(deep, first, lambda x: x))
    )
    return Found(rate, runs, losses, scores, memory, tuple(best))


def rows_of(family, found):
    same = common_steps([run for one in found.values() for run in one.runs])
    for label, one in found.items():
        pace = [run.seconds[-1] / run.steps[-1] for run in one.runs]
        at = [run.steps[i] for run, i in zip(one.runs, one.best, strict=True)]
        levels = [
            scores[at_steps(run, same)]
            for run, scores in zip(one.runs, one.scores, strict=True)
        ]
        yield {
            "method": label,
            "rate": f"{one.rate:g}",
            f"after {same} steps": spread(levels),
            "best": spread([s[i] for s, i in zip(one.scores, one.best, strict=True)]),
            "its loss": spread(
                [v[i] for v, i in zip(one.losses, one.best, strict=True)]
            ),
            "at step": int(np.median(at)),
            "steps": int(np.median([run.steps[-1] for run in one.runs])),
            "ms per step": f"{1e3 * np.median(pace):.2f}",
            "MiB": f"{one.memory[0]:.2f}",
            f"MiB at {DEEP} T": f"{one.memory[1]:.2f}",
            "flagged": sum(run.bad for run in one.runs),
        }


def picture(family, found, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (label, one) in enumerate(found.items()):
        for ax, name in zip(axes, ("steps", "seconds"), strict=True):
            shared = min(len(run.steps) for run in one.runs)
            at = np.mean([getattr(run, name)[1:shared] for run in one.runs], 0)
            values = np.array([scores[1:shared] for scores in one.scores])
            ax.plot(at, values.mean(0), color=f"C{i}", marker=".", label=label)
            ax.fill_between(at, values.min(0), values.max(0), color=f"C{i}", alpha=0.15)
            ax.set(xscale="log", xlabel=f"outer {name}")
    axes[0].set(ylabel=f"test {family.score_name} after adaptation")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def report(family, options):
    """Learn, write CSV and picture, and return the lines of this part."""
    found = {}
    for label, method in methods(family, options).items():
        begun = time.perf_counter()
        found[label] = learn(family, label, method, options)
        print(f"    {label}: {time.perf_counter() - begun:.1f} s", flush=True)
    raw = [
        {"method": label, "rate": one.rate, "seed": seed, "step": run.steps[i]}
        | {"seconds": run.seconds[i], "loss": one.losses[seed][i]}
        | {"score": one.scores[seed][i]}
        for label, one in found.items()
        for seed, run in enumerate(one.runs)
        for i in range(len(run.steps))
    ]
    name = family.title.lower()
    write_csv(options.out / f"{name}.csv", raw)
    picture(family, found, options.out / f"{name}.png")
    size = dbo.trees.size(start(jax.random.key(0), family.sizes))
    untaught = [scores[0] for scores in found["MAML, reverse"].scores]
    return [
        f"## {family.title}",
        "",
        f"Tasks: {family.about}. Rectified network "
        f"{'-'.join(map(str, family.sizes))}, N = M = {size}; T = {family.depth} steps "
        f"of SGD, step size {family.step_size:g}; {family.tasks} tasks per outer step, "
        f"Adam; {options.directions} directions per task, {options.chunk} at a time; "
        f"iMAML: lambda = {family.strength:g}, 5 steps of conjugate gradients on a "
        f"Hessian damped by {family.damping:g} (it is indefinite).",
        f"Scores are the {family.score_name} after adaptation, mean and standard "
        f"deviation over {options.seeds} seeds (start and tasks); an untaught start "
        f"gives {spread(untaught)}.",
        "",
        *table(list(rows_of(family, found))),
    ]


FAMILIES = {"sinusoids": sinusoids, "digits": digits}
NOTES = """
Every method has the same budget, in {clock}: {tuning:g} s for each
of three outer rates, one seed, the least loss on validation tasks wins; then
{seconds:g} s for each seed, compilation not counted. "Best" is the test score of the
snapshot (after 10, 20, 40, ... steps and at the end) with the least validation loss;
"after ... steps" the score after as many outer steps as all methods took. iMAML adapts
to test tasks by its own proximal steps, the others by plain ones. MiB: temporary memory
of a compiled outer step, all tasks at once, by XLA's own account. Flagged: estimates
with `ok = False`, which count as zero.

In the terms of the library: MAML is `reverse` (or, with the same numbers,
`checkpointed`) through an inner solver that starts at x. First-order MAML is d_T
itself: `reverse` through the same solver whose updates are constants (`stop_gradient`
in its optax chain), so that dy_T/dx = 1. `truncated` would give zero here: g does not
depend on x, and the path through y_0 = x is cut. iMAML (arXiv:1909.04630) is `cg` on
g(y) + lambda/2 |y - x|². (FG)²U guided takes first-order MAML as its guide.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=FAMILIES, help="leave the other part out")
    parser.add_argument("--out", type=Path, default=Path("results/fg2u_few_shot"))
    parser.add_argument("--seconds", type=float, default=4.0, help="per run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--directions", type=int, default=8, help="per task")
    parser.add_argument("--chunk", type=int, default=8, help="directions at a time")
    parser.add_argument("--cpu-time", action="store_true", help="not the wall clock")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    notes = NOTES.format(
        seconds=options.seconds,
        tuning=options.seconds / 4,
        clock=clock_of(options)[1],
    )
    lines = ["# Few-shot learning from a shared start", "", f"{header()}.", notes]
    print(*lines, sep="\n", flush=True)
    for name in [options.only] if options.only else FAMILIES:
        begun = time.perf_counter()
        found = report(FAMILIES[name](), options)
        seconds = time.perf_counter() - begun
        part = [
            *found,
            "",
            f"This part took {seconds:.0f} s, compilation included.",
            "",
        ]
        print(*part, sep="\n", flush=True)
        lines += part
    (options.out / "few_shot.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"\nTables, CSV files and pictures are in {options.out}/.")


if __name__ == "__main__":
    main()
