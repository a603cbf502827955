"""A language model that reads new documents with learnt token weights, by (FG)²U.

    python benchmarks/reproduce/fg2u/language.py
    python benchmarks/reproduce/fg2u/language.py --seconds 30 --directions 32
    python benchmarks/reproduce/fg2u/language.py --kl initial-adapted

The problem of CaMeLS as in section 4 of arXiv:2406.14095 (equations 43 to 45), with a
model and texts of our own that are some ten thousand times smaller.
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

# Tokens: fillers, names, values, and three words of their own.
FILLERS, NAMES, VALUES = 16, 64, 16
IS, WAS, ASK = range(FILLERS + NAMES + VALUES, FILLERS + NAMES + VALUES + 3)
TOKENS = ASK + 1
KINDS = ("filler", "name", "value after IS", "value after WAS", "IS", "WAS")
LENGTH, WINDOW, WIDTH, HIDDEN = 24, 3, 24, 64
SHORT, DEPTHS = 6, (24, 48)
RATES, SCALES = (3e-3, 1e-2, 3e-2), (0.5, 1.0, 2.0, 4.0)
STREAMS, VALIDATED, TESTED = 4, 16, 32  # of one outer step, to choose, to judge
STEP_SIZE, LOCALITY = 0.1, 0.1
UNIFORM = float(np.log(2) / 3)  # softplus with beta = 3 at zero


class Text(NamedTuple):
    """Documents, (..., LENGTH), and what each position holds, as in KINDS."""

    tokens: np.ndarray
    kinds: np.ndarray


class Probes(NamedTuple):
    """What the adapted model is asked, and text on which it should not change."""

    questions: np.ndarray  # (facts, WINDOW)
    answers: np.ndarray  # (facts,)
    elsewhere: np.ndarray  # (documents, LENGTH)


def documents(rng, names, values, drift):
    """One fact per document, `name IS value`, and one rumour, `name WAS value`.

    The rumour is about the same name and tells another value. Fillers follow each
    other around a circle, the faster the larger ``drift`` is.
    """
    shape = names.shape
    steps = rng.integers(0, 4, (*shape, LENGTH)) + drift
    steps[..., 0] = rng.integers(0, FILLERS, shape)
    text = np.cumsum(steps, -1) % FILLERS
    kinds = np.zeros_like(text)
    other = (values + rng.integers(1, VALUES, shape)) % VALUES
    half, fact_last = LENGTH // 2, rng.integers(0, 2, shape)
    for verb, told, kind, late in (
        (IS, values, 2, fact_last),
        (WAS, other, 3, 1 - fact_last),
    ):
        at = rng.integers(0, half - 2, shape) + half * late
        words = FILLERS + names, np.full(shape, verb), FILLERS + NAMES + told
        for i, (word, label) in enumerate(zip(words, (1, kind + 2, kind), strict=True)):
            np.put_along_axis(text, (at + i)[..., None], word[..., None], -1)
            np.put_along_axis(kinds, (at + i)[..., None], label, -1)
    return Text(text, kinds)


def asked(names):
    ask, verb = np.full(names.shape, ASK), np.full(names.shape, IS)
    return np.stack([ask, FILLERS + names, verb], -1)


def old_values(rng, names):
    """What the world was like: half of the time each name has one value of its own."""
    other = rng.integers(0, VALUES, names.shape)
    return np.where(rng.random(names.shape) < 0.5, names % VALUES, other)


def old_text(rng, *shape):
    """Documents as the model knows them: other fillers, facts as they were."""
    names = rng.integers(0, NAMES, shape)
    return documents(rng, names, old_values(rng, names), drift=0)


def streams(seed, depth, count):
    """Stacked batches, one document per inner step, and the kinds of their tokens.

    Each document of a stream brings a new fact about another name.
    """
    rng = np.random.default_rng(seed)
    names = rng.permuted(np.tile(np.arange(NAMES), (count, 1)), axis=1)[:, :depth]
    values = rng.integers(0, VALUES, (count, depth))
    text = documents(rng, names, values, drift=3)
    elsewhere = old_text(rng, count, 8).tokens
    probes = Probes(asked(names), FILLERS + NAMES + values, elsewhere)
    batches = dbo.Rounds(outer=probes, inner=text.tokens)
    return jax.tree.map(jnp.asarray, batches), text.kinds


def windows(tokens):
    """The words before each word but the first ones, (..., places, WINDOW)."""
    places = tokens.shape[-1] - WINDOW
    return jnp.stack([tokens[..., i : i + places] for i in range(WINDOW)], -1)


def start_of_model(key):
    keys = jax.random.split(key, 4)
    shapes = {
        "embedding": (TOKENS, WIDTH),
        "last": (WIDTH, HIDDEN),
        "earlier": ((WINDOW - 1) * WIDTH, HIDDEN),
        "output": (HIDDEN, TOKENS),
    }
    y = {
        name: jax.random.normal(k, shape) / jnp.sqrt(shape[0])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return y | {
        "embedding": y["embedding"] * jnp.sqrt(TOKENS),
        "bias": jnp.zeros(TOKENS),
    }


def log_p(y, contexts):
    """Log-probabilities of the next word, (..., WINDOW) -> (..., TOKENS).

    The last word gates what the earlier ones say: contexts with different names are
    then nearly orthogonal, and one step of SGD can write a fact without wiping others.
    """
    # Products with indicators: gathers are slow under many tangents on a CPU.
    seen = jax.nn.one_hot(contexts, TOKENS) @ y["embedding"]
    earlier = seen[..., :-1, :].reshape(*contexts.shape[:-1], -1)
    hidden = (seen[..., -1, :] @ y["last"]) * jnp.tanh(earlier @ y["earlier"])
    return jax.nn.log_softmax(hidden @ y["output"] + y["bias"])


def entropies(y, contexts, words):
    """``-log p(word)`` at each place."""
    return -jnp.sum(log_p(y, contexts) * jax.nn.one_hot(words, TOKENS), -1)


def pretrained(key, steps=1000, batch=32):
    """A model that knows the old fillers, and the form of facts and questions."""
    rng = np.random.default_rng(0)
    text = jnp.asarray(old_text(rng, 4096).tokens)
    names = rng.integers(0, NAMES, 4096)
    questions, answers = asked(names), FILLERS + NAMES + old_values(rng, names)
    samples = text, jnp.asarray(questions), jnp.asarray(answers)
    key_start, key_learn = jax.random.split(key)
    y, tx = start_of_model(key_start), optax.adam(3e-3)

    def loss(y, chosen):
        text, questions, answers = (a[chosen] for a in samples)
        told = entropies(y, windows(text), text[:, WINDOW:])
        return told.mean() + 0.1 * entropies(y, questions, answers).mean()

    def step(carry, chosen):
        y, memory = carry
        value, gradient = jax.value_and_grad(loss)(y, chosen)
        updates, memory = tx.update(gradient, memory)
        return (optax.apply_updates(y, updates), memory), value

    chosen = jax.random.randint(key_learn, (steps, batch), 0, len(text))
    (y, _), losses = jax.lax.scan(step, (y, tx.init(y)), chosen)
    return y, losses[-50:].mean()


def weigher(y):
    """``(x, tokens) -> weights`` from fixed embeddings of a word and its context."""

    def weights(x, tokens):
        seen = jnp.concatenate([windows(tokens), tokens[..., WINDOW:, None]], -1)
        features = jax.nn.one_hot(seen, TOKENS) @ y["embedding"]
        features = features.reshape(*seen.shape[:-1], -1)
        hidden = jax.nn.gelu(features @ x["hidden"][0] + x["hidden"][1])
        return jax.nn.softplus(3 * (hidden @ x["output"][0] + x["output"][1])) / 3

    return weights


def start_of_weights(key, wide=8):
    """The last layer is zero: every token weighs ln 2 / 3."""
    fan = (WINDOW + 1) * WIDTH
    hidden = jax.random.normal(key, (fan, wide)) / jnp.sqrt(fan)
    return {
        "hidden": (hidden, jnp.zeros(wide)),
        "output": (jnp.zeros(wide), jnp.zeros(())),
    }


def uniform_weights(x, scale):
    """The same for every token, ``scale`` times the initial weight."""
    bias = jnp.log(jnp.expm1(scale * jnp.log(2.0))) / 3
    return {"hidden": x["hidden"], "output": (x["output"][0] * 0, bias)}


def only_facts(scale, tokens):
    """What an oracle would weigh: the value that follows IS, and nothing else."""
    return scale * UNIFORM * (tokens[..., WINDOW - 1 : -1] == IS)


def adapted_initial(now, before):
    """KL(adapted || initial), as equation 44 is printed."""
    return jnp.sum(jnp.exp(now) * (now - before), -1)


def initial_adapted(now, before):
    """KL(initial || adapted), as in the authors' code."""
    return adapted_initial(before, now)


DIVERGENCES = {
    "adapted-initial": adapted_initial,
    "initial-adapted": initial_adapted,
}


def problem_of(y_0, divergence, weights):
    """Upper: probes and locality (44); lower: weighted text (45)."""

    def upper(x, y, probes):
        asked = entropies(y, probes.questions, probes.answers).mean()
        places = windows(probes.elsewhere)
        moved = divergence(log_p(y, places), log_p(y_0, places)).mean()
        return asked + LOCALITY * moved

    def lower(x, y, tokens):
        told = entropies(y, windows(tokens), tokens[WINDOW:])
        return jnp.sum(weights(x, tokens) * told)

    return dbo.Problem(upper, lower)


def drawn(depth, count):
    """``key -> batches``, some of a thousand streams."""
    batches, _ = streams(1, depth, 1000)

    def draw(key):
        chosen = jax.random.randint(key, (count,), 0, 1000)
        return jax.tree.map(lambda leaf: leaf[chosen], batches)

    return draw


def methods(problem, options):
    """Label -> method."""
    budget = {"directions": options.directions, "chunk": options.chunk}

    def inner(depth):
        return hg.descent(problem, optax.sgd(STEP_SIZE), depth)

    def made(make, depth):
        solver = inner(depth)
        return Method(
            make(problem, solver),
            solver,
            drawn(depth, STREAMS),
        )

    def short(problem, inner):
        return hg.truncated(problem, inner, last=SHORT)

    def forward(problem, inner):
        return hg.forward_gradient(problem, inner, **budget)

    def guided(problem, inner):
        guide = short(problem, inner)
        return hg.forward_gradient(problem, inner, **budget, guide=guide)

    few, many = DEPTHS
    return {
        f"exact, {SHORT} documents": made(hg.nested, SHORT),
        f"truncated to {SHORT}, {few} documents": made(short, few),
        f"exact, {few} documents": made(hg.nested, few),
        f"(FG)²U, {few} documents": made(forward, few),
        f"(FG)²U guided, {few} documents": made(guided, few),
        f"exact, {many} documents": made(hg.nested, many),
        f"(FG)²U, {many} documents": made(forward, many),
    }


class Judged(NamedTuple):
    """Means over test streams, after adaptation."""

    loss: jax.Array  # upper objective
    entropy: jax.Array  # of the answers
    exact: jax.Array  # share of answers that are the likeliest word
    moved: jax.Array  # divergence elsewhere


def judge_of(problem, y_0, divergence, depth):
    """``(x, batches) -> Judged`` for streams of some depth."""
    solve = hg.solver(hg.descent(problem, optax.sgd(STEP_SIZE), depth))

    def one(x, batch):
        y, probes = solve(jax.random.key(0), x, y_0, batch), batch.outer
        answers = log_p(y, probes.questions)
        places = windows(probes.elsewhere)
        return Judged(
            problem.upper(x, y, probes),
            entropies(y, probes.questions, probes.answers).mean(),
            jnp.mean(answers.argmax(-1) == probes.answers),
            divergence(log_p(y, places), log_p(y_0, places)).mean(),
        )

    def judge(x, batches):
        return jax.tree.map(jnp.mean, jax.vmap(one, (None, 0))(x, batches))

    return jax.jit(judge)


class Found(NamedTuple):
    """What is known of one way to weigh."""

    rate: str
    x: list  # one per seed
    judged: dict  # depth -> Judged, of (seeds,)
    runs: tuple = ()
    same: dict | None = None  # the same after equally many outer steps
    memory: float = 0.0


class World(NamedTuple):
    """What all methods share."""

    y_0: dict
    entropy: float  # of old text, under the model
    divergence: Callable
    valid: dict  # depth -> (batches, kinds)
    test: dict


def world(options):
    y_0, entropy = jax.jit(pretrained)(jax.random.key(0))
    valid, test = (
        {d: streams(n + d, d, count) for d in DEPTHS}
        for n, count in ((1000, VALIDATED), (2000, TESTED))
    )
    return World(y_0, float(entropy), DIVERGENCES[options.kl], valid, test)


def judges_of(world, weights):
    """``validated(x) -> loss`` and ``tested(xs) -> {depth: Judged}``."""
    problem = problem_of(world.y_0, world.divergence, weights)
    judges = {d: judge_of(problem, world.y_0, world.divergence, d) for d in DEPTHS}

    def validated(x):
        return np.mean([judges[d](x, world.valid[d][0]).loss for d in DEPTHS])

    def tested(xs):
        judged = {d: [judges[d](x, world.test[d][0]) for x in xs] for d in DEPTHS}
        return {d: Judged(*np.array(rows).T) for d, rows in judged.items()}

    return validated, tested


def best_scale(world, weights, at):
    """The best of a few scales of fixed weights, ``at(scale) -> x``."""
    validated, tested = judges_of(world, weights)
    scale = min(SCALES, key=lambda scale: validated(at(scale)))
    return Found(f"{scale:g} x", [at(scale)], tested([at(scale)]))


def learn(method, world, judges, options):
    validated, tested = judges
    x, clock = start_of_weights(jax.random.key(50)), clock_of(options)[0]
    advance = learner(method, x, lambda x: world.y_0)
    tuning = options.seconds / 4
    rate = best_rate(advance, jax.random.key(51), RATES, x, tuning, validated, clock)
    runs = []
    for seed in range(options.seeds):
        key_start, key = jax.random.split(jax.random.key(seed))
        x = start_of_weights(key_start)
        runs.append(on_the_clock(advance, key, rate, x, options.seconds, clock))
    xs = [row(run.x, -1) for run in runs]
    return Found(f"{rate:g}", xs, tested(xs), tuple(runs), None, mebibytes(advance))


def learn_all(world, options):
    """Label -> what was found; the greatest number of steps that all have taken."""
    weights, x = weigher(world.y_0), start_of_weights(jax.random.key(50))
    judges = judges_of(world, weights)
    none = uniform_weights(x, 1e-6)
    found = {
        "no adaptation": Found("", [none], judges[1]([none])),
        "uniform weights": best_scale(
            world, weights, lambda scale: uniform_weights(x, scale)
        ),
        "oracle: facts alone": best_scale(world, only_facts, jnp.float32),
    }
    for label, method in methods(
        problem_of(world.y_0, world.divergence, weights), options
    ).items():
        begun = time.perf_counter()
        found[label] = learn(method, world, judges, options)
        print(f"    {label}: {time.perf_counter() - begun:.1f} s", flush=True)
    same = common_steps([run for one in found.values() for run in one.runs])
    for label, one in found.items():
        if one.runs:
            xs = [row(run.x, at_steps(run, same)) for run in one.runs]
            found[label] = one._replace(same=judges[1](xs))
    return found, same


def memory_rows(world, options):
    """Temporary memory of one outer step, one stream, against the depth."""
    weights, x = weigher(world.y_0), start_of_weights(jax.random.key(50))
    problem = problem_of(world.y_0, world.divergence, weights)
    makers = {
        "plain reverse": hg.reverse,
        "nested reverse": hg.nested,
        f"truncated to {SHORT}": lambda p, i: hg.truncated(p, i, SHORT),
        "(FG)²U, one at a time": lambda p, i: hg.forward_gradient(p, i, 1, chunk=1),
        f"(FG)²U, {options.chunk} at a time": lambda p, i: hg.forward_gradient(
            p, i, options.chunk, chunk=options.chunk
        ),
    }
    for label, make in makers.items():
        cells = {"MiB, one stream": label}
        for depth in (SHORT, DEPTHS[-1]):
            inner = hg.descent(problem, optax.sgd(STEP_SIZE), depth)
            method = Method(make(problem, inner), inner, drawn(depth, 1))
            program = learner(method, x, lambda x: world.y_0)
            cells[f"T = {depth}"] = f"{mebibytes(program):.2f}"
        yield cells


def weights_of(world, one):
    """Mean weight of each kind of token on the shorter test streams."""
    batches, kinds = world.test[DEPTHS[0]]
    weigh = jax.jit(jax.vmap(weigher(world.y_0), (None, 0)))
    kinds = np.asarray(kinds[..., WINDOW:])
    found = np.mean([np.asarray(weigh(x, batches.inner)) for x in one.x], 0)
    return [found[kinds == kind].mean() for kind in range(len(KINDS))]


def rows_of(found, same):
    def cell(values, digits=3):
        return spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"

    for label, one in found.items():
        cells = {"learnt with": label, "rate": one.rate}
        for depth, judged in one.judged.items():
            cells |= {
                f"-log p, {depth}": cell(judged.entropy),
                f"exact %, {depth}": cell(100 * judged.exact, 1),
                f"KL, {depth}": cell(judged.moved, 2),
            }
        for depth in DEPTHS:
            told = cell(100 * one.same[depth].exact, 1) if one.same else ""
            cells[f"exact %, {depth}, {same} steps"] = told
        pace = [run.seconds[-1] / run.steps[-1] for run in one.runs]
        cells |= {
            "steps": int(np.median([run.steps[-1] for run in one.runs]))
            if pace
            else "",
            "ms per step": f"{1e3 * np.median(pace):.1f}" if pace else "",
            "MiB": f"{one.memory:.2f}" if pace else "",
            "flagged": sum(run.bad for run in one.runs) if pace else "",
        }
        yield cells


def picture(found, by_kind, path):
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    learnt = {label: one for label, one in found.items() if one.runs}
    for i, (label, kinds) in enumerate(by_kind.items()):
        axes[0].plot(kinds, np.arange(len(KINDS)), "o", color=f"C{i}", label=label)
    axes[0].set(xlabel="mean weight", title="what the weights single out")
    axes[0].set_yticks(range(len(KINDS)), KINDS)
    axes[0].legend(fontsize="x-small")
    places = np.arange(len(learnt))
    for shift, depth in zip((-0.2, 0.2), DEPTHS, strict=True):
        exact = [100 * one.judged[depth].exact for one in learnt.values()]
        axes[1].barh(
            places + shift,
            [e.mean() for e in exact],
            0.4,
            xerr=[e.std() for e in exact],
            label=f"{depth} documents",
        )
    axes[1].set_yticks(places, list(learnt))
    axes[1].set(xlabel="exact answers, %")
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=150)


ABOUT = """
Not the paper's experiment: another model, other texts, some ten thousand times smaller.
Documents of {length} tokens out of {tokens}: fillers on a circle, one fact
`name IS value`, one rumour `name WAS other value` about the same name. The model,
{model} parameters, predicts a token from the {window} before it; it was trained on
documents with other fillers, where half of the facts are fixed ones and the others
random (-log p {entropy:.2f}). A stream brings T documents with T new facts; the model
takes one step of SGD ({step_size:g}) on each, every token weighted (45). Upper loss:
-log p of the answers to all T questions + {locality:g} KL{kl}
on old text (44). x: {size} parameters of the weight model (fixed embeddings of a token
and the {window} before it, one hidden layer, softplus with beta = 3); its last layer is
zero at the start, so that every token weighs ln 2 / 3.

Budget of each method, in {clock}: {tuning:g} s for
each of three rates of Adam, one seed, the least mean upper loss on validation streams
wins; then {seconds:g} s for each of {seeds} seeds (start and streams). Fixed weights
had four scales to choose from ({scales}). {streams} streams per outer step,
{directions} directions per stream, {chunk} at a time. Judged on {tested} test streams
of 24 and of 48 documents, whatever depth was learnt with: -log p of the answers, share
of exact answers, KL; the columns with a number of steps, after as many outer steps as
all took. "Exact, 6 documents" is the paper's short RGU, an episode of 6; "truncated to
6" sees the whole stream and goes back through its last 6 steps. MiB: temporary memory
of a compiled outer step, all streams at once. ± is a standard deviation over seeds.
"""
PAPER = """
## The paper's own numbers: another model, other data

StreamingQA, GPT2-XL adapted, weights learnt with DistilGPT2 (arXiv:2406.14095, table
G.1): exact match / F1 in %. Quoted for their order alone; not reproduced here.

| | RGU, 6 documents | (FG)²U, 24 | (FG)²U, 48 |
| --- | ---: | ---: | ---: |
| paper, StreamingQA | 7.93 / 12.94 | 8.34 / 13.46 | 8.23 / 13.70 |
"""


def report(options):
    """Learn, write CSV files and a picture, and return the lines of the report."""
    shared = world(options)
    found, same = learn_all(shared, options)
    by_kind = {
        label: weights_of(shared, one)
        for label, one in found.items()
        if one.runs or label == "uniform weights"
    }
    raw = [
        {"learnt with": label, "seed": seed, "rate": one.rate, "documents": depth}
        | {name: values[seed] for name, values in judged._asdict().items()}
        for label, one in found.items()
        for depth, judged in one.judged.items()
        for seed in range(len(one.x))
    ]
    write_csv(options.out / "language.csv", raw)
    picture(found, by_kind, options.out / "language.png")
    kinds = [
        {"mean weight": label}
        | {name: f"{value:.3f}" for name, value in zip(KINDS, values, strict=True)}
        for label, values in by_kind.items()
    ]
    about = ABOUT.format(
        length=LENGTH,
        tokens=TOKENS,
        model=dbo.trees.size(shared.y_0),
        window=WINDOW,
        entropy=shared.entropy,
        step_size=STEP_SIZE,
        locality=LOCALITY,
        kl="(" + options.kl.replace("-", " || ") + ")",
        size=dbo.trees.size(found["uniform weights"].x[0]),
        clock=clock_of(options)[1],
        tuning=options.seconds / 4,
        scales=", ".join(f"{scale:g}" for scale in SCALES),
        streams=STREAMS,
        tested=TESTED,
        **{k: getattr(options, k) for k in ("seconds", "seeds", "directions", "chunk")},
    )
    return [
        *about.splitlines(),
        "",
        "## After adaptation to streams that were never seen",
        "",
        *table(list(rows_of(found, same))),
        "",
        "## What the weights single out",
        "",
        *table(kinds),
        "",
        "## Memory against depth",
        "",
        *table(list(memory_rows(shared, options))),
        *PAPER.splitlines(),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/fg2u_language"))
    parser.add_argument("--seconds", type=float, default=6.0, help="per run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--directions", type=int, default=8, help="per stream")
    parser.add_argument("--chunk", type=int, default=8, help="directions at a time")
    parser.add_argument("--kl", choices=DIVERGENCES, default="adapted-initial")
    parser.add_argument("--cpu-time", action="store_true", help="not the wall clock")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    lines = ["# A tiny language model that weighs what it reads", "", f"{header()}."]
    print(*lines, sep="\n", flush=True)
    found = report(options)
    seconds = time.perf_counter() - begun
    found += ["", f"This took {seconds:.0f} s, compilation included.", ""]
    print(*found, sep="\n", flush=True)
    text = "\n".join([*lines, *found])
    (options.out / "language.md").write_text(text, encoding="utf-8")
    print(f"Tables, CSV files and a picture are in {options.out}/.")


if __name__ == "__main__":
    main()
