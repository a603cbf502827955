"""A language model that reads new documents with learnt token weights, by (FG)²U.

    python benchmarks/reproduce/fg2u/language.py
    python benchmarks/reproduce/fg2u/language.py --seconds 30 --directions 32
    python benchmarks/reproduce/fg2u/language.py --kl initial-adapted

The problem of CaMeLS as in section 4 of arXiv:2406.14095 (equations 43 to 45), with a model
and texts of our own that are some ten thousand times smaller.
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
from fg2u_common import header, table, temporary_mib, write_csv
from fg2u_meta import (
    Method,
    at_steps,
    best_rate,
    clock_of,
    common_steps,
    learner,
    mean_estimate,
    on_the_clock,
    row,
    spread,
)

import dbojax as dbo
from dbojax import hypergradients as hg

# Tokens: fillers, names, values, and three words of their own.
FILLERS, NAMES, VALUES = 24, 96, 24
IS, WAS, ASK = range(FILLERS + NAMES + VALUES, FILLERS + NAMES + VALUES + 3)
TOKENS = ASK + 1
KINDS = ("filler", "name", "value after IS", "value after WAS", "IS", "WAS")
LENGTH, WINDOW, WIDTH, HIDDEN = 24, 3, 32, 96
SHORT, DEPTHS = 6, (24, 48)
RATES, SCALES = (3e-3, 1e-2, 3e-2), (0.5, 1.0, 2.0, 4.0)
STREAMS, TESTED = 4, 64  # of one outer step, of a test
STEP_SIZE, LOCALITY = 0.5, 0.1
UNIFORM = float(np.log(2) / 3)  # softplus with beta = 3 at zero


class Text(NamedTuple):
    """Documents, (documents, LENGTH), and what each position holds, as in KINDS."""

    tokens: jax.Array
    kinds: jax.Array


class Probes(NamedTuple):
    """What the adapted model is asked, and text on which it should not change."""

    questions: jax.Array  # (facts, WINDOW)
    answers: jax.Array  # (facts,)
    elsewhere: jax.Array  # (documents, LENGTH)


def fillers(key, shape, drift):
    """Words that tend to follow each other around a circle, at an own pace."""
    key_first, key_step = jax.random.split(key)
    first = jax.random.randint(key_first, (*shape[:-1], 1), 0, FILLERS)
    steps = jax.random.randint(key_step, shape, 0, 4) + drift
    return (first + jnp.cumsum(steps, -1)) % FILLERS


def documents(key, names, values, drift):
    """One fact per document, `name IS value`, and one rumour, `name WAS value`.

    The rumour is about the same name and tells another value.
    """
    count = len(names)
    keys = jax.random.split(key, 4)
    text = fillers(keys[0], (count, LENGTH), drift)
    other = (values + jax.random.randint(keys[1], (count,), 1, VALUES)) % VALUES
    half = LENGTH // 2
    places = jax.random.randint(keys[2], (2, count), 0, half - 2)
    swapped = jax.random.bernoulli(keys[3], shape=(count,))
    fact_at = places[0] + half * swapped
    rumour_at = places[1] + half * ~swapped
    kinds = jnp.zeros_like(text)

    def put(rows, at, words):
        return rows.at[jnp.arange(count), at].set(words)

    for at, verb, told, kind in ((fact_at, IS, values, 2), (rumour_at, WAS, other, 3)):
        words = (FILLERS + names, jnp.full(count, verb), FILLERS + NAMES + told)
        labels = (1, kind + 2, kind)
        for i in range(3):
            text = put(text, at + i, words[i])
            kinds = put(kinds, at + i, labels[i])
    return Text(text, kinds)


def stream(key, depth, drift=3):
    """``(texts, probes)`` of some documents, each with a fact about another name."""
    keys = jax.random.split(key, 5)
    names = jax.random.permutation(keys[0], NAMES)[:depth]
    values = jax.random.randint(keys[1], (depth,), 0, VALUES)
    text = documents(keys[2], names, values, drift)
    ask, verb = jnp.full(depth, ASK), jnp.full(depth, IS)
    questions = jnp.stack([ask, FILLERS + names, verb], -1)
    probes = Probes(questions, FILLERS + NAMES + values, old_text(keys[3], 8).tokens)
    return text, probes


def old_text(key, count):
    """Documents as the model knows them: other fillers, facts that mean nothing."""
    keys = jax.random.split(key, 3)
    names = jax.random.randint(keys[0], (count,), 0, NAMES)
    values = jax.random.randint(keys[1], (count,), 0, VALUES)
    return documents(keys[2], names, values, drift=0)


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
    return y | {"embedding": y["embedding"] * jnp.sqrt(TOKENS), "bias": jnp.zeros(TOKENS)}


def log_p(y, contexts):
    """Log-probabilities of the next word, (..., WINDOW) -> (..., TOKENS).

    The last word gates what the earlier ones say: contexts with different names are
    then nearly orthogonal, and one step of SGD can write a fact without wiping others.
    """
    seen = y["embedding"][contexts]
    earlier = seen[..., :-1, :].reshape(*contexts.shape[:-1], -1)
    hidden = (seen[..., -1, :] @ y["last"]) * jnp.tanh(earlier @ y["earlier"])
    return jax.nn.log_softmax(hidden @ y["output"] + y["bias"])


def entropies(y, contexts, words):
    """``-log p(word)`` at each place."""
    return -jnp.take_along_axis(log_p(y, contexts), words[..., None], -1)[..., 0]


def pretrained(key, steps=1500):
    """A model that knows the old fillers, and the form of facts and questions."""
    key_start, key_learn = jax.random.split(key)
    y, tx = start_of_model(key_start), optax.adam(3e-3)

    def loss(y, key):
        key_text, key_ask = jax.random.split(key)
        text = old_text(key_text, 64).tokens
        asked = stream(key_ask, 64)[1]
        told = entropies(y, windows(text), text[:, WINDOW:])
        return told.mean() + 0.1 * entropies(y, asked.questions, asked.answers).mean()

    def step(carry, count):
        y, memory = carry
        value, gradient = jax.value_and_grad(loss)(
            y, jax.random.fold_in(key_learn, count)
        )
        updates, memory = tx.update(gradient, memory)
        return (optax.apply_updates(y, updates), memory), value

    (y, _), losses = jax.lax.scan(step, (y, tx.init(y)), jnp.arange(steps))
    return y, losses[-50:].mean()


def weigher(y):
    """``(x, tokens) -> weights`` from fixed embeddings of a word and those before it."""
    frozen = y["embedding"]

    def weights(x, tokens):
        seen = jnp.concatenate([windows(tokens), tokens[..., WINDOW:, None]], -1)
        features = frozen[seen].reshape(*seen.shape[:-1], -1)
        hidden = jax.nn.gelu(features @ x["hidden"][0] + x["hidden"][1])
        return jax.nn.softplus(3 * (hidden @ x["output"][0] + x["output"][1])) / 3

    return weights


def start_of_weights(key, wide=16):
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


def draw_streams(key, depth, count):
    """Stacked batches, one document per inner step, and the kinds of their tokens."""
    texts, probes = jax.vmap(lambda key: stream(key, depth))(
        jax.random.split(key, count)
    )
    return dbo.Rounds(outer=probes, inner=texts.tokens), texts.kinds


def methods(problem, options):
    """Label -> method."""
    many = {"directions": options.directions, "chunk": options.chunk}

    def inner(depth):
        return hg.descent(problem, optax.sgd(STEP_SIZE), depth)

    def made(make, depth):
        solver = inner(depth)
        return Method(
            make(problem, solver),
            solver,
            lambda key: draw_streams(key, depth, STREAMS)[0],
        )

    def short(problem, inner):
        return hg.truncated(problem, inner, last=SHORT)

    def forward(problem, inner):
        return hg.forward_gradient(problem, inner, **many)

    def guided(problem, inner):
        guide = short(problem, inner)
        return hg.forward_gradient(problem, inner, **many, guide=guide)

    found = {f"exact, {SHORT} documents": made(hg.nested, SHORT)}
    for depth in DEPTHS:
        found |= {
            f"truncated to {SHORT}, {depth} documents": made(short, depth),
            f"exact, {depth} documents": made(hg.nested, depth),
            f"(FG)²U, {depth} documents": made(forward, depth),
            f"(FG)²U guided, {depth} documents": made(guided, depth),
        }
    return found


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
