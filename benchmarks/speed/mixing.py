"""Mixing: one, two and three rounds of ``W v`` on six graphs, against copying ``v``.

    python benchmarks/speed/mixing.py

A round is v <- W v, so a product that cannot be done in place counts the copy that the
compiler makes of v; "beside" writes the result into another array. Rounds in a row are
against their sum.
"""

import start

start.ready()

import functools
import math

import floors
import jax
import jax.numpy as jnp
import numpy as np
from records import copy_row, normal, power

import dbojax as dbo

t = dbo.topology
SMALL = [(8, 1000), (8, 100_000), (64, 1000), (64, 100_000)]
MORE = [(512, 1000), (512, 10_000), (4096, 1000)]
LARGE = [(8, 10_000_000), (64, 1_000_000), (4096, 10_000)]
SHORT = [(8, 1000), (64, 100_000)]
WIDE = 1.6e7  # entries beyond which fewer graphs and rounds are measured
BOUNDED = {"ring": 2, "torus": 3, "16 neighbours": 5}  # graph -> most floors


def weights():
    """Name -> number of nodes -> W."""

    def torus(n):
        rows = 2 ** (int(math.log2(n)) // 2)
        return t.torus(rows, n // rows)

    graphs = {
        "ring": t.ring,
        "torus": torus,
        "hypercube": t.hypercube,
        "16 neighbours": lambda n: t.ring(n, 8),
        "Erdős–Rényi": lambda n: t.erdos_renyi(n, min(1, 2 * math.log(n) / n), seed=1),
        "complete": t.complete,
    }
    return {
        name: functools.partial(lambda graph, n: t.metropolis(graph(n)), graph)
        for name, graph in graphs.items()
    }


def form(mix, v):
    """Which form the mixer chose, read off the program it makes."""
    if mix.averages:
        return "averaging"
    program = str(jax.make_jaxpr(mix.apply)(v))
    if "dynamic_update_slice" in program:
        return "neighbours, in blocks"
    if "gather" in program:
        return "neighbours"
    return "dense" if "dot_general" in program else "shifts"


def in_a_row(mix, count):
    def rounds(v, i):
        del i
        for _ in range(count):
            v = mix.apply(v)
        return v

    return rounds


def steps(mix, v, wide):
    """Label -> (step, carry)."""
    found = {
        f"{count} round{'s' if count > 1 else ''}": (in_a_row(mix, count), v)
        for count in ((1, 2) if wide else (1, 2, 3))
    }
    beside = floors.elsewhere(mix.apply), (v, jnp.zeros_like(v))
    return {**found, "beside": beside}


def measure(name, mix, v, options):
    """The lines of one graph and size."""
    n, d = v.shape
    wide = v.size > WIDE
    budget = options.budget(6 if wide else 1)
    found = floors.against_floor(steps(mix, v, wide), v, options.turns, budget)
    more = {"nodes": n, "length": d, "graph": name, "form": form(mix, v)}
    more["slots"] = mix.weights.shape[1]
    one = found["1 round"][2]
    for label, (_, _, seconds) in found.items():
        if label in ("floor", "other floor"):
            continue
        case = f"{name}, n={n}, d={power(d)}, {label}"
        line = copy_row("mixing", case, found, label, rounds=label, **more)
        if label[0] in "23":
            share = seconds / (int(label[0]) * one)
            line["of their sum"] = float(np.median(share))
            line["of their sum, low"] = float(np.quantile(share, 0.25))
        yield line


def cases(options):
    """(graph, n, d) in the order in which they are measured."""
    graphs = weights()
    for n, d in SHORT if options.short else SMALL + MORE + LARGE:
        for name in graphs:
            fits = name != "16 neighbours" or n >= 32
            if fits and (name in BOUNDED or (n * d <= WIDE and not options.short)):
                yield name, n, d


def rows(options):
    found, mixes = [], functools.lru_cache(lambda name, n: mixer(graphs[name](n)))
    graphs, mixer = weights(), dbo.mixing.mixer
    for name, n, d in cases(options):
        found += measure(name, mixes(name, n), normal(n, d), options)
    return found


if __name__ == "__main__":
    import run

    raise SystemExit(run.alone("mixing"))
