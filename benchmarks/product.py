"""Every strategy over every channel, compressor and graph, on one problem.

    python benchmarks/product.py                 # the full product
    python benchmarks/product.py --fast          # a pairwise cover of it
    python benchmarks/product.py --only extra    # the cases of some strategies

The problem is a small heterogeneous quadratic with its closed form, in float64, with
full batches and all three variables moving at once. The three compared numbers are the
true hypergradient norm at the mean of x at the end (a floor: a method without bias goes
on to zero), the disagreement of the nodes, and the bytes that one node puts on one link
per step. Step sizes come from the problem's smoothness, and each channel has one
consensus step: nothing is tuned per case.
"""

from environment import ensure

ensure([])

import argparse
import functools
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import header, write_csv

import dbojax as dbo

jax.config.update("jax_enable_x64", True)

NODES, DX, DY = 6, 3, 5
STEPS = 4000
UPPER, LOWER = 0.05, 0.3  # step sizes over 1 / smoothness of Psi and of the local g
GAMMA = {"exact": 1.0, "reference_point": 0.4, "error_feedback": 0.4}
DUAL_GAIN = 0.1  # small enough for biased compressors
SYMMETRIC_ONLY = ("extra", "exact_diffusion", "nids")  # and without a server
WITH_SERVER = ("server", "ef14", "ef21", "diana")  # all nodes hold the same after it


def strategies():
    """(channel, optimizer) -> Strategy."""
    s = dbo.strategies
    dual = {
        name: functools.partial(getattr(s, name), dual_gain=DUAL_GAIN)
        for name in SYMMETRIC_ONLY
    }
    return {
        "diffusion_cta": s.diffusion_cta,
        "diffusion_atc": s.diffusion_atc,
        "tracking": s.gradient_tracking,
        "tracking_semi_atc": s.gradient_tracking_semi_atc,
        "tracking_atc": s.gradient_tracking_atc,
        "moving_average": lambda channel, tx: s.moving_average(
            s.gradient_tracking(channel, tx), 0.5
        ),
        **dual,
        "allreduce": s.allreduce,
    }


def channels():
    """(mix, compressor) -> Channel."""
    c, gamma = dbo.channels, GAMMA
    return {
        "exact": lambda mix, compressor: c.exact(mix, gamma["exact"]),
        "reference_point": functools.partial(
            c.reference_point, gamma=gamma["reference_point"]
        ),
        "error_feedback": functools.partial(
            c.error_feedback, gamma=gamma["error_feedback"]
        ),
        "server": c.server,
        "ef14": c.ef14,
        "ef21": c.ef21,
        "diana": lambda mix, compressor: c.diana(mix, unbiased(compressor)),
    }


def compressors():
    """Those that declare a contraction."""
    c = dbo.compressors
    return {
        "identity": c.identity(),
        "top_k": c.top_k(0.4),
        "block_top_k": c.block_top_k(0.4),
        "random_k": c.scaled(c.random_k(0.4)),
        "strided_random_k": c.scaled(c.strided_random_k(0.4)),
        "qsgd": c.scaled(c.qsgd(16)),
        "sign": c.sign(),
        "float16": c.cast(jnp.float16),
        "top_k of qsgd": c.composed(c.top_k(0.6), c.scaled(c.qsgd(16))),
    }


def unbiased(compressor):
    """The unbiased form of a compressor, or None."""
    if compressor.omega is not None:
        return compressor
    try:
        return dbo.compressors.scaled(compressor)
    except ValueError:
        return None


def graphs():
    """Mixing matrices."""
    t, n = dbo.topology, NODES
    return {
        "ring": t.metropolis(t.ring(n)),
        "star": t.metropolis(t.star(n)),
        "complete": np.full((n, n), 1 / n),
        "exponential": t.uniform(t.exponential(n)),
        "erdos_renyi": t.metropolis(t.erdos_renyi(n, 0.5, seed=2)),
    }


def product():
    """All cases that can be built, as (strategy, channel, compressor, graph).

    All-reduce refuses channels after which the nodes hold different values; what has
    duals refuses a server, and weights that are not symmetric.
    """
    for strategy, channel in itertools.product(strategies(), channels()):
        averages = channel in WITH_SERVER
        if strategy == "allreduce" and not averages and channel != "exact":
            continue
        if strategy in SYMMETRIC_ONLY and averages:
            continue
        complete = averages or strategy == "allreduce"
        for compressor in ["-"] if channel == "exact" else compressors():
            if channel == "diana" and not unbiased(compressors()[compressor]):
                continue
            for graph in ["complete"] if complete else graphs():
                if strategy in SYMMETRIC_ONLY and graph == "exponential":
                    continue
                yield strategy, channel, compressor, graph


def pairs(case):
    return set(itertools.combinations(enumerate(case), 2))


def cover(cases):
    """A subset in which every pair of parts meets that meets in ``cases``; greedy."""
    cases = list(cases)
    order = np.random.default_rng(0).permutation(len(cases))
    left, kept = set().union(*map(pairs, cases)), []
    while left:
        best = max((cases[i] for i in order), key=lambda case: len(pairs(case) & left))
        kept.append(best)
        left -= pairs(best)
    return sorted(kept, key=cases.index)


def step_sizes(task):
    """Fractions of the inverse smoothness of Psi and of the least smooth node's g."""
    psi = np.linalg.eigvalsh(jax.hessian(task.exact.value)(task.x0)).max()
    return UPPER / psi, LOWER / np.linalg.eigvalsh(task.batch.lower.a).max()


def solve(task, w, strategy, channel, compressor):
    """Rows of the table for one method on all graphs of ``w``, in one program."""
    upper, lower = step_sizes(task)

    def build(w):
        averages = strategy == "allreduce" or channel in WITH_SERVER
        mix = dbo.mixing.averaging(NODES) if averages else dbo.mixing.dense(w)
        wire = channels()[channel](mix, compressors().get(compressor))
        move = strategies()[strategy]
        below = move(wire, optax.sgd(lower))
        return dbo.algorithms.compose(
            task.problem,
            dbo.oracles.soba(task.problem),
            dbo.algorithms.Phase(x=move(wire, optax.sgd(upper)), y=below, z=below),
        )

    method = dbo.sweep(build, jnp.asarray(np.stack(list(w.values()))), batch_axis=None)
    stacked = [
        dbo.replicate(dbo.replicate(v, task.n), len(w)) for v in (task.x0, task.y0)
    ]

    def step(state, key):
        state, metrics = method.step(key, state, task.batch)
        return state, metrics.traffic

    def run(key):
        keys = jax.random.split(key, STEPS)
        state, traffic = jax.lax.scan(step, method.init(*stacked), keys)
        return state, traffic

    # Nearly all time goes into compilation, and the arrays are tiny.
    quick = {"xla_llvm_disable_expensive_passes": True}
    program = jax.jit(run, compiler_options=quick)
    state, traffic = program(jax.random.key(0))
    for index, graph in enumerate(w):
        x, y, z = (v[index] for v in (state.x, state.y, state.z))
        yield {
            "strategy": strategy,
            "channel": channel,
            "compressor": compressor,
            "graph": graph,
            "hypergrad": float(
                jnp.linalg.norm(task.exact.hypergradient(dbo.node_mean(x)))
            ),
            "consensus": float(dbo.consensus_error((x, y, z))),
            "bytes": traffic.message,
            "rounds": traffic.rounds,
        }


def solve_all(task, cases):
    """Rows of all cases; one program per method, two compiled at a time."""
    w, wanted = graphs(), {}
    for *method, graph in cases:
        wanted.setdefault(tuple(method), []).append(graph)

    def one(method):
        chosen = {graph: w[graph] for graph in wanted[method]}
        return list(solve(task, chosen, *method))

    rows = []
    with ThreadPoolExecutor(2) as pool:
        for done, found in enumerate(pool.map(one, wanted), 1):
            rows += found
            print(f"{done} of {len(wanted)} programs", flush=True)
    return rows


def summary(rows):
    """Markdown: the range of floors of each strategy over each channel."""
    yield "| strategy | " + " | ".join(channels()) + " |"
    yield "| --- |" + " ---: |" * len(channels())
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        cells = []
        for channel in channels():
            found = [
                row["hypergrad"]
                for row in rows
                if (row["strategy"], row["channel"]) == (strategy, channel)
            ]
            both = f"{min(found):.0e} to {max(found):.0e}" if found else "refused"
            cells.append(both)
        yield "| " + " | ".join([strategy, *cells]) + " |"


def table(rows):
    """Markdown: one line per method, a column of floors per graph."""
    names = [g for g in graphs() if any(row["graph"] == g for row in rows)]
    yield "| strategy | channel | compressor | bytes | " + " | ".join(names) + " |"
    yield "| --- | --- | --- | ---: |" + " ---: |" * len(names)
    for method, group in itertools.groupby(rows, lambda row: list(row.values())[:3]):
        found = {row["graph"]: row for row in group}
        size = next(iter(found.values()))["bytes"]
        cells = [
            f"{found[g]['hypergrad']:.0e} / {found[g]['consensus']:.0e}"
            if g in found
            else ""
            for g in names
        ]
        yield "| " + " | ".join([*method, f"{size}", *cells]) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a pairwise cover only")
    parser.add_argument("--only", nargs="+", choices=strategies(), help="strategies")
    parser.add_argument("--csv", type=Path, default=Path("results/product.csv"))
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    task = dbo.tasks.quadratic(n=NODES, dx=DX, dy=DY, seed=1)
    cases = [case for case in product() if case[0] in (arguments.only or strategies())]
    cases = cover(cases) if arguments.fast else cases
    rows = solve_all(task, cases)
    lines = [
        f"{header()}, float64.",
        "",
        f"{len(rows)} cases, {STEPS} steps; consensus steps {GAMMA}; dual gain "
        f"{DUAL_GAIN}; step sizes "
        f"{UPPER} / smoothness of Psi and {LOWER} / largest smoothness of a local g. "
        "Cells: true hypergradient norm at the mean of x / disagreement of x, y and z; "
        "bytes: one node, one link, one step.",
        "",
        "Range of the norm over compressors and graphs; a server's graph is complete, "
        "and `diana` takes the unbiased compressors alone:",
        "",
        *summary(rows),
        "",
        *table(rows),
    ]
    print("\n".join(["", *lines]))
    print(f"\nTotal {time.perf_counter() - begin:.0f} s, compilation included.")
    write_csv(arguments.csv, rows)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
