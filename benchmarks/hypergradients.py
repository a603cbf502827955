"""What dbojax's hypergradients cost beside the same mathematics written by hand.

    python benchmarks/hypergradients.py              # all families, 100 inner steps
    python benchmarks/hypergradients.py --depth 1000 --only reverse checkpointed nested

The problem is that of `digits.py`, regularisation weights of a regression on digits.
jaxopt and optimistix take part where they are installed (`pip install jaxopt
optimistix`). All take turns, each call is blocked on the device, compile time is apart.
Operations and bytes are the compiled program's own count, which counts the body of a
loop once, on all sides alike. The error is the distance to our estimate in float64.
"""

from environment import ensure

ensure(["tasks"])

import argparse
import functools
import importlib.metadata
import importlib.util
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import DIRECTIONS, HAND, STEP, TERMS, arguments, lower, upper, with_aux
from report import header, quartiles, table, write_csv

import dbojax as dbo

h = dbo.hypergradients


def ours(name, steps):
    problem = dbo.Problem(upper, lower)
    inner = h.descent(problem, optax.sgd(STEP), steps)
    hyper = {
        "reverse": lambda: h.reverse(problem, inner),
        "checkpointed": lambda: h.checkpointed(problem, inner),
        "nested": lambda: h.nested(problem, inner),
        "truncated": lambda: h.truncated(problem, inner, TERMS),
        "forward_gradient": lambda: h.forward_gradient(
            problem, inner, DIRECTIONS, chunk=DIRECTIONS
        ),
        "cg": lambda: h.cg(problem, TERMS, inner=inner),
        "neumann": lambda: h.neumann(problem, TERMS, STEP, inner=inner),
        "hessian_free": lambda: h.hessian_free(problem, inner=inner),
    }[name]()

    def estimate(x, y, batch):
        grad, y, _, info = hyper.estimate(
            jax.random.key(0), x, y, hyper.init(x, y), batch
        )
        return grad, y, info

    return estimate


# The libraries that a user might take instead.


def jaxopt_peer(steps, **settings):
    import jaxopt

    solver = jaxopt.GradientDescent(
        lambda y, x, samples: lower(x, y, samples),
        stepsize=STEP,
        maxiter=steps,
        tol=0.0,
        acceleration=False,
        **settings,
    )
    return with_aux(lambda x, y, batch: solver.run(y, x, batch.lower).params)


def jaxopt_reverse(steps):
    return jaxopt_peer(steps, implicit_diff=False, unroll=True)


def jaxopt_cg(steps):
    from jaxopt import linear_solve

    solve = functools.partial(linear_solve.solve_cg, maxiter=TERMS, tol=0.0)
    return jaxopt_peer(steps, implicit_diff=True, implicit_diff_solve=solve)


def optimistix_peer(steps, adjoint):
    import lineax
    import optimistix

    solver = optimistix.GradientDescent(STEP, rtol=0.0, atol=0.0)

    def unroll(x, y, batch):
        return optimistix.minimise(
            lambda y, x: lower(x, y, batch.lower),
            solver,
            y,
            x,
            max_steps=steps + 1,  # its first one evaluates, and does not move
            throw=False,
            adjoint=adjoint,
            tags=frozenset({lineax.positive_semidefinite_tag}),
        ).value

    return with_aux(unroll)


def optimistix_checkpointed(steps):
    import optimistix

    return optimistix_peer(steps, optimistix.RecursiveCheckpointAdjoint())


def optimistix_cg(steps):
    import lineax
    import optimistix

    solve = lineax.CG(rtol=0.0, atol=0.0, max_steps=TERMS)
    return optimistix_peer(steps, optimistix.ImplicitAdjoint(linear_solver=solve))


PEERS = {
    "reverse": {"jaxopt": jaxopt_reverse},
    "checkpointed": {"optimistix": optimistix_checkpointed},
    "cg": {"jaxopt": jaxopt_cg, "optimistix": optimistix_cg},
}
OURS = (
    "reverse",
    "checkpointed",
    "nested",
    "truncated",
    "forward_gradient",
    "cg",
    "neumann",
    "hessian_free",
)


def contenders(names, steps):
    """(family, who) -> function of (x, y, batch)."""
    found = {}
    for name in names:
        found[name, "dbojax"] = ours(name, steps)
        if name in HAND:
            found[name, "by hand"] = functools.partial(HAND[name], steps=steps)
        for peer, make in PEERS.get(name, {}).items():
            if importlib.util.find_spec(peer) is None:
                print(f"{peer} is not installed and left out of {name}.")
            else:
                found[name, peer] = make(steps)
    return found


def compiled(functions, args):
    programs, seconds = {}, {}
    for label, function in functions.items():
        start = time.perf_counter()
        programs[label] = jax.jit(function).lower(*args).compile()
        seconds[label] = time.perf_counter() - start
    return programs, seconds


def taken_in_turns(programs, args, repeats):
    times = {label: [] for label in programs}
    for repeat in range(repeats + 1):
        for label, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if repeat:  # the first round warms up
                times[label].append(time.perf_counter() - start)
    return times


def errors(functions, args):
    """Relative distance of each hypergradient to that of ours in float64."""
    exact = {}
    with jax.enable_x64(True):
        wide = arguments(jnp.float64)
        for name in {name for name, _ in functions}:
            exact[name] = np.asarray(jax.jit(functions[name, "dbojax"])(*wide)[0])
    found = {}
    for (name, who), function in functions.items():
        grad = np.asarray(jax.jit(function)(*args)[0], np.float64)
        gap = np.linalg.norm(grad - exact[name]) / np.linalg.norm(exact[name])
        found[name, who] = gap
    return found


def rows(functions, repeats):
    args = arguments(jnp.float32)
    programs, compiling = compiled(functions, args)
    times = taken_in_turns(programs, args, repeats)
    gaps = errors(functions, args)
    for name, who in functions:
        base = (name, "by hand") if (name, "by hand") in functions else (name, "dbojax")
        cost, other = (programs[k].cost_analysis() for k in ((name, who), base))
        ratio = np.divide(times[name, who], np.median(times[base]))
        memory = programs[name, who].memory_analysis().temp_size_in_bytes
        yield {
            "family": name,
            "who": who,
            "ms": f"{1e3 * np.median(times[name, who]):.2f}",
            "time / by hand": quartiles(ratio, 2),
            "operations / by hand": f"{cost['flops'] / other['flops']:.3f}",
            "bytes / by hand": (
                f"{cost['bytes accessed'] / other['bytes accessed']:.3f}"
            ),
            "temporary MB": f"{memory / 1e6:.2f}",
            "compile s": f"{compiling[name, who]:.2f}",
            "error to float64": f"{gaps[name, who]:.0e}",
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=100, help="inner steps")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--out", type=Path, default=Path("results/hypergradients.csv"))
    options = parser.parse_args()
    peers = [
        f"{peer} {importlib.metadata.version(peer)}"
        for peer in ("jaxopt", "optimistix")
        if importlib.util.find_spec(peer)
    ]
    print(
        f"{', '.join([header(), *peers])}; {options.depth} inner steps, {TERMS} of the "
        f"linear solver, {DIRECTIONS} directions, {options.repeats} repeats, float32.\n"
    )
    found = list(rows(contenders(options.only, options.depth), options.repeats))
    print(*table(found, left=2), sep="\n")
    write_csv(options.out, found)


if __name__ == "__main__":
    main()
