"""Memory and time of first-order directions beside those of exact products.

    python benchmarks/reproduce/rabo/memory.py
    python benchmarks/reproduce/rabo/memory.py --only head --width 64 --batch 32768

Every program is one client's step on one sub-model whose activations outweigh its
weights by far. Memory is what the compiled program sets aside for temporaries; times
are medians and quartiles of calls that take turns, blocked on the device, compilation
apart. Inputs are noise: neither figure depends on them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["tasks"])

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from memory_problems import PROBLEMS
from report import header, quartiles, table, write_csv

import dbojax as dbo

RADII = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
STEPS = 4  # of an inner solver, for reverse mode
PLAIN = "gradient of g in x and y, alone"
BOTH = "finite difference, both sides at once"
ONE = "finite difference, one pass at a time"
SOBA = "exact products, `oracles.soba`"
FORWARD = "exact products, forward over reverse, f after g"
COMPARED = BOTH, ONE, f"{ONE}, reused", SOBA, FORWARD


def forward_over_reverse(problem):
    """Directions of soba from one `jax.jvp`, the pass of f after it as in dbojax."""

    def directions(x, y, z, batch):
        zero = jax.tree.map(jnp.zeros_like, (x, y, y))

        def lower(_):
            slopes = jax.grad(problem.lower, (0, 1))
            (_, d_y), products = jax.jvp(
                lambda y: slopes(x, y, batch.lower), (y,), (z,)
            )
            return products[0], d_y, products[1]

        def upper(found):
            f_x, f_y = jax.grad(problem.upper, (0, 1))(x, y, batch.upper)
            d_x, d_z = (
                jax.tree.map(jnp.subtract, *pair)
                for pair in ((f_x, found[0]), (found[2], f_y))
            )
            return d_x, found[1], d_z

        def step(found, index):
            return jax.lax.switch(index, [lower, upper], found), None

        return jax.lax.scan(step, zero, jnp.arange(2))[0]

    return directions


def programs(problem):
    """Name -> function of (x, y, z, batch)."""
    o, h = dbo.oracles, dbo.hypergradients

    def of(oracle):
        return lambda x, y, z, batch: oracle.directions(None, x, y, z, (), batch)[0]

    def plain(x, y, z, batch):
        return jax.grad(problem.lower, (0, 1))(x, y, batch.lower)

    def one_step(x, y, z, batch):
        oracle = o.one_step_difference(problem, 0.1)
        return oracle.directions(None, x, y, jnp.zeros(()), (), batch)[0]

    def unrolled(x, y, z, batch):
        hyper = h.checkpointed(problem, h.descent(problem, optax.sgd(0.1), STEPS))
        return hyper.estimate(jax.random.key(0), x, y, hyper.init(x, y), batch)[:2]

    return {
        PLAIN: plain,
        BOTH: of(o.finite_difference(problem)),
        f"{BOTH}, reused": of(o.finite_difference(problem, reuse=True)),
        ONE: of(o.finite_difference(problem, at_once=False)),
        f"{ONE}, reused": of(o.finite_difference(problem, reuse=True, at_once=False)),
        "one-step difference": one_step,
        "perturbed lower level": of(o.perturbed(problem, 0.01)),
        SOBA: of(o.soba(problem)),
        FORWARD: forward_over_reverse(problem),
        f"reverse through {STEPS} inner steps, checkpointed": unrolled,
    }


def measure(problem, x, y, batch, repeats):
    """Name -> (temporary bytes, seconds of each call)."""
    args = x, y, jax.grad(problem.upper, 1)(x, y, batch.upper), batch
    compiled = {
        name: jax.jit(program).lower(*args).compile()
        for name, program in programs(problem).items()
    }
    times = {name: [] for name in compiled}
    for _ in range(repeats + 1):  # the first is not counted
        for name, program in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*args))
            times[name].append(time.perf_counter() - begin)
    return {
        name: (program.memory_analysis().temp_size_in_bytes, times[name][1:])
        for name, program in compiled.items()
    }


def ratios(found):
    """Name -> memory and median time over those of a plain gradient."""
    used, seconds = found[PLAIN]
    return {
        name: (bytes_ / used, np.median(times) / np.median(seconds))
        for name, (bytes_, times) in found.items()
    }


def rows(found):
    for name, (used, times) in found.items():
        memory, slower = ratios(found)[name]
        yield {
            "program": name,
            "MiB": f"{used / 2**20:.1f}",
            "times plain memory": f"{memory:.2f}",
            "milliseconds": quartiles(np.multiply(times, 1e3), 0),
            "times plain time": f"{slower:.2f}",
        }


def errors(problem, x, y, batch):
    """Radius -> relative errors of both products in float32; None is exact there."""
    products = dbo.Problem(lambda x, y, b: 0.0, problem.lower)
    z = jax.grad(problem.upper, 1)(x, y, batch.upper)

    def found(oracle, *point):
        d_x, _, d_z = jax.jit(oracle.directions)(None, *point, (), batch)[0]
        return [np.asarray(dbo.trees.ravel(d), float) for d in (d_z, d_x)]

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (x, y, z))
        exact = found(dbo.oracles.soba(products), *wide)
    makers = {r: dbo.oracles.finite_difference(products, r) for r in RADII}
    makers[None] = dbo.oracles.soba(products)
    return {
        radius: [
            np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
            for got, wanted in zip(found(oracle, x, y, z), exact, strict=True)
        ]
        for radius, oracle in makers.items()
    }


def error_rows(found):
    for radius in [*RADII, None]:
        row = {"r": "exact products in float32" if radius is None else f"{radius:g}"}
        for name, per_radius in found.items():
            for kind, error in zip(("yy", "xy"), per_radius[radius], strict=True):
                row[f"{name}: {kind}"] = f"{error:.1e}"
        yield row


def reading(measured, wrong):
    """What the tables say, in the figures of this run."""
    found = [ratios(each) for each in measured.values()]

    def of(name, index=0):
        return " / ".join(f"{each[name][index]:.2f}" for each in found)

    def off(radius):
        return " / ".join(f"{max(each[radius]):.0e}" for each in wrong.values())

    held = max(each[BOTH][0] for each in found)
    return [
        f"What to read off it, for {' / '.join(measured)}, in multiples of one plain",
        "gradient of g in x and y:",
        "",
        "| | memory | time |",
        "| --- | --- | --- |",
        *(f"| {name} | {of(name)} | {of(name, 1)} |" for name in COMPARED),
        "",
        "A finite difference with both sides at once stays below 2.2 times the memory:",
        f"{'yes' if held <= 2.2 else 'NO'}. Its error at r = 0.01 is {off(0.01)}.",
        "",
        "An exact product needs no radius and is right to the last digits, in about",
        "the time of the two gradients of a difference. So a difference must be",
        "justified: by the memory of a single pass, which counts where y is the",
        "network and hardly where y is a head, or by a g that can be differentiated",
        "once only. It wants a g that is smooth in y: behind layers of y, rectifiers",
        "leave an error at every radius, since a shorter step crosses fewer kinks but",
        "is divided by less.",
    ]


def busy(*loads):
    """How far the times are to be trusted."""
    before, after = (f"{load:.1f}" for load in loads)
    told = f"Load average {before} at the start and {after} at the end"
    if max(loads) > 1.5 * (os.cpu_count() or 1):
        return f"{told}: the machine had other work too, so times are rough."
    return f"{told}."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--width", type=int, default=128, help="of dense layers")
    parser.add_argument("--batch", type=int, default=16384, help="of dense networks")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--images", type=int, default=256, help="of convolutions")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/rabo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    before, measured, wrong, lines = os.getloadavg()[0], {}, {}, []
    for name in options.only:
        title, make = PROBLEMS[name]
        args = make(options)
        measured[name] = measure(*args, options.repeats)
        wrong[name] = errors(*args)
        size = len(args[-1].lower[1])
        lines += ["", f"## {name}", "", f"{title}; batch {size}.", ""]
        lines += table(list(rows(measured[name])))
        print(*lines[-len(measured[name]) - 6 :], sep="\n", flush=True)
    lines = [
        "# Memory and time of first-order directions",
        "",
        "`python benchmarks/reproduce/rabo/memory.py` writes this page.",
        "",
        *reading(measured, wrong),
        "",
        f"{header()}; {options.repeats} repeats, median and quartiles.",
        busy(before, os.getloadavg()[0]),
        *lines,
        "",
        "## Relative error of the products by radius",
        "",
        "float32 against exact products in float64, by block of second derivatives;",
        "y moves by r in the direction of the upper gradient, weights are as drawn.",
        "",
        *table(list(error_rows(wrong))),
    ]
    (options.out / "memory.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    write_csv(
        options.out / "memory.csv",
        [
            {
                "problem": problem,
                "program": program,
                "temporary bytes": used,
                "seconds": float(np.median(times)),
            }
            for problem, found in measured.items()
            for program, (used, times) in found.items()
        ],
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
