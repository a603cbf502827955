"""The coefficient of Burgers, Allen-Cahn and KdV from 64 values of the solution.

    python benchmarks/reproduce/fg2u/pde.py                        # 600 steps, minutes
    python benchmarks/reproduce/fg2u/pde.py --only burgers kdv
    python benchmarks/reproduce/fg2u/pde.py --full                 # 5000 steps

Our formulation of the numerical part of section 4 in Shen et al. (2024),
arXiv:2406.14095: (FG)²U with zeroth-order differences through a spectral solver that is
taken as a black box, beside what is cheaper where the solver can be derived.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["plots"])

import argparse
import time
from typing import NamedTuple

import jax

jax.config.update("jax_enable_x64", True)

import matplotlib

matplotlib.use("Agg")

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from report import header, table, write_csv

import dbojax as dbo

DIFFERENCE = 1e-4  # the published step of the quotients
FLOOR = 2 * DIFFERENCE  # so that no quotient meets a coefficient below zero


class Case(NamedTuple):
    """An equation, the published rate of Adam, starts, and the published errors."""

    equation: dbo.tasks.spectral.Equation
    rate: float
    starts: tuple
    widest: float  # published starts lie between 0 and this
    eps_nu: str  # in 1e-2
    eps_u: str  # in 1e-3


SPECTRAL = dbo.tasks.spectral
CASES = {
    "burgers": Case(
        SPECTRAL.burgers(), 1e-2, (0.05, 0.01, 0.2), 10, "0.97 ± 0.45", "0.63 ± 0.33"
    ),
    "allen_cahn": Case(
        SPECTRAL.allen_cahn(),
        1e-2,
        (0.01, 0.003, 0.1),
        0.1,
        "2.34 ± 0.64",
        "0.97 ± 0.54",
    ),
    "kdv": Case(
        SPECTRAL.kdv(), 1e-3, (0.005, 0.0015, 0.01), 0.01, "0.72 ± 0.57", "2.72 ± 1.55"
    ),
}


def adam(hyper, task, rate, steps, widest):
    """``(key, start) -> coefficients after each step``, kept in the solvable range."""
    optimizer = optax.adam(optax.linear_schedule(rate, 0.0, steps))

    def descend(key, x):
        def step(carry, key):
            x, memory, state = carry
            slope, _, state, _ = hyper.estimate(key, x, task.y0, state, task.batch)
            updates, memory = optimizer.update(slope, memory)
            x = jnp.clip(optax.apply_updates(x, updates), FLOOR, widest)
            return (x, memory, state), x

        carry = x, optimizer.init(x), hyper.init(x, task.y0)
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[1]

    return descend


def gauss_newton(task, steps, widest):
    """Linear least squares at each step; a step changes the coefficient e-fold at most.

    It is no gradient method; it shows what derived observations are worth when there is
    one unknown.
    """

    def observed(x):
        y = task.solver(None, x, task.y0, task.batch)
        return dbo.tasks.pde.observe(y) - task.batch

    def descend(key, x):
        del key

        def step(x, _):
            misfit, slope = jax.jvp(observed, (x,), (jnp.ones_like(x),))
            change = -jnp.sum(slope * misfit) / jnp.sum(slope**2)
            x = x * jnp.exp(jnp.clip(change / x, -1, 1))
            x = jnp.clip(x, FLOOR, widest)
            return x, x

        return jax.lax.scan(step, x, length=steps)[1]

    return descend


def methods(task, case, steps):
    """Label -> (path of a start, solves, tangents)."""
    grads = dbo.hypergradients
    settings = task, case.rate, steps, case.widest
    quotients = grads.zeroth_order(
        task.problem, task.solver, 1, DIFFERENCE, grads.one_sided, chunk=1
    )
    exact = grads.forward(task.problem, task.solver)
    return {
        "(FG)²U-ZO": (adam(quotients, *settings), 2 * steps, 0),
        "forward mode": (adam(exact, *settings), steps, steps),
        "Gauss-Newton": (gauss_newton(task, 20, case.widest), 20, 20),
    }


def timed(path, starts, seed):
    """Coefficients, (starts, steps), and the seconds to compile and to run."""
    keys = jax.random.split(jax.random.key(seed), len(starts))
    begin = time.perf_counter()
    program = jax.jit(jax.vmap(path)).lower(keys, starts).compile()
    compiled = time.perf_counter()
    found = np.asarray(program(keys, starts))
    return found, compiled - begin, time.perf_counter() - compiled


def judged(task, found):
    """Both errors of each start at the end of its path."""

    def evaluate(x):
        return task.evaluate(x, task.solver(None, x, task.y0, task.batch))

    errors = jax.jit(jax.vmap(evaluate))(jnp.asarray(found[:, -1]))
    return np.asarray(errors["eps_nu"]), np.asarray(errors["eps_u"])


def spread(values, unit):
    mean, deviation = np.mean(values) / unit, np.std(values) / unit
    # Paths that end at one point differ by rounding alone.
    return f"{mean:.2g}" + (f" ± {deviation:.1g}" if deviation > mean / 100 else "")


def report(name, case, options):
    """Rows of the table, and the errors of the coefficients on the way, by method."""
    task = dbo.tasks.pde_coefficient(case.equation)
    starts = jnp.asarray(case.starts)
    if options.full:
        rng = np.random.default_rng(options.seed)
        starts = jnp.asarray(case.widest * (1 - rng.random(options.starts)))
    rows, paths = [], {}
    for label, (path, solves, tangents) in methods(task, case, options.steps).items():
        found, compiling, running = timed(path, starts, options.seed)
        eps_nu, eps_u = judged(task, found)
        paths[label] = np.abs(found / task.nu - 1)
        rows.append(
            {
                "equation": name,
                "method": label,
                "eps_nu, 1e-2": spread(eps_nu, 1e-2),
                "worst": f"{eps_nu.max() / 1e-2:.2g}",
                "eps_u, 1e-3": spread(eps_u, 1e-3),
                "solves": solves,
                "tangents": tangents,
                "compile, s": f"{compiling:.1f}",
                "run, s": f"{running / len(starts):.2f}",
            }
        )
    blank = dict.fromkeys(rows[0], "")
    published = {"eps_nu, 1e-2": case.eps_nu, "eps_u, 1e-3": case.eps_u}
    rows.append(blank | {"equation": name, "method": "published ZO"} | published)
    error = f"{name}: {case.equation.points} points, {case.equation.steps} steps, "
    error += f"eps_u {float(task.solver_error):.1e}; starts "
    return rows, paths, error + ", ".join(f"{start:.3g}" for start in starts)


def draw(paths, file):
    figure, axes = plt.subplots(
        1, len(paths), figsize=(4 * len(paths), 3.2), sharey=True, squeeze=False
    )
    for ax, (name, curves) in zip(axes[0], paths.items(), strict=True):
        for label, errors in curves.items():
            steps = 1 + np.arange(errors.shape[1])
            ax.loglog(steps, np.median(errors, 0), label=label)
        ax.set(title=name, xlabel="outer step")
    axes[0, 0].set_ylabel("median error of the coefficient")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("results/fg2u"))
    parser.add_argument("--full", action="store_true", help="published sizes")
    parser.add_argument("--steps", type=int, help="600, or 5000 with --full")
    parser.add_argument("--starts", type=int, default=5, help="drawn, with --full")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.steps = options.steps or (5000 if options.full else 600)
    options.out.mkdir(parents=True, exist_ok=True)
    begin, rows, paths, grids = time.perf_counter(), [], {}, []
    for name in options.only:
        found, paths[name], grid = report(name, CASES[name], options)
        rows += found
        grids.append(f"- {grid}.")
        print(*table(found, left=2), "", sep="\n", flush=True)
    write_csv(options.out / "pde.csv", rows)
    draw(paths, options.out / "pde.png")
    lines = [
        "# The coefficient of an equation from 64 values of its solution",
        "",
        f"{header()}.",
        "",
        f"Adam with the published rates, falling linearly over {options.steps} steps; "
        "one-sided quotients of step 1e-4 along one Rademacher direction, which is a "
        "sign here. Mean ± standard deviation over starts and keys; run time of one "
        "start, all run side by side in one program. Below, grids, the error of the "
        "solver at the true coefficient, and starts; the data come from twice as many "
        "points and steps.",
        "",
        *grids,
        "",
        *table(rows, left=2),
        "",
        f"All of it took {time.perf_counter() - begin:.0f} s.",
        "",
    ]
    (options.out / "pde.md").write_text("\n".join(lines), encoding="utf-8")
    print(*lines, sep="\n")
    print(f"Table, CSV file and picture are in {options.out}/.")


if __name__ == "__main__":
    main()
