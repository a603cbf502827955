"""How fast RABO and RAFBO are: the true hypergradient against rounds and coverage.

    python benchmarks/reproduce/rabo/rate.py
    python benchmarks/reproduce/rabo/rate.py --rounds 250 500 1000 --copies 1 2 4

The theory says 1 / sqrt(C_x* Q), plus a floor that is set by the sub-models. To change
the coverage and nothing else, the same four clients of capacity 1, 3/4, 1/2 and 1/4 are
copied: copies hold the same entries in each round and draw noise of their own. All have
the same objectives, so that clients differ by their sub-models alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["tasks", "plots"])

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from report import header, table, write_csv
from toy_common import CAPACITIES, squared_hypergradient

import dbojax as dbo
from dbojax.tasks.noise import Noisy

s = dbo.submodels
SIGMA, WIDTH, EVERY = 1.0, 1e-2, 10
# Steps base * sqrt(C / Q) for x and RATIO times that for y and z.
BASE, RATIO = 0.25, 4.0
QUIET = 0.05  # constant step of x in the runs without noise
KINDS = {"full": s.static(), "static": s.static(), "staggered": s.staggered()}
METHODS = {"RAFBO": dbo.algorithms.rafbo, "RABO": dbo.algorithms.rabo}


def copied(rule):
    """Every client of a group of four, counted on, holds what its original holds."""
    n = len(CAPACITIES)

    def keep(turn, client, group, scores):
        return rule.keep(turn, client % n, group._replace(clients=n), scores)

    return rule._replace(keep=keep)


def fleet_of(kind, copies, task):
    capacities = np.ones(4) if kind == "full" else np.array(CAPACITIES)
    layout = s.coordinates(task.x0, task.y0)
    return s.fleet(layout, np.tile(capacities, copies), copied(KINDS[kind]))


def noisy(task):
    """Tilt all gradients of one client, for each local step anew."""

    def sample(key, data):
        shapes = (task.x0, task.y0, task.y0)
        x, y, lower = (
            SIGMA * jax.random.normal(k, v.shape, v.dtype)
            for k, v in zip(jax.random.split(key, 3), shapes, strict=True)
        )
        return dbo.Batch(Noisy(data.upper, x, y), Noisy(data.lower, (), lower))

    return {
        "problem": dbo.tasks.with_gradient_noise(task, SIGMA).problem,
        "sample": sample,
    }


@functools.cache
def runner(name, kind, copies, noise):
    """A compiled ``(key, step of x, rounds) -> squares``: mean of all, and of the last.

    The number of rounds is not static, so one program serves all.
    """
    task = dbo.tasks.federated_toy(n=4 * copies, identical=True)
    fleet = fleet_of(kind, copies, task)
    parts = noisy(task) if noise else {"problem": task.problem}

    @jax.jit
    def one(key, step, rounds):
        method = METHODS[name](
            fleet=fleet,
            upper_step=step,
            lower_step=RATIO * step,
            perturbation=WIDTH,
            extracted=False,
            **parts,
        )

        def turn(number, carry):
            state, total, last, least = carry
            square = jax.lax.cond(
                number % EVERY == 0,
                lambda x: squared_hypergradient(name == "RABO", task.batch, x),
                lambda x: jnp.zeros((), x.dtype),
                state.x,
            )
            late = number >= rounds - rounds // 3
            state, metrics = method.step(
                jax.random.fold_in(key, number), state, task.batch
            )
            least = jnp.minimum(least, metrics.coverage.x)
            return state, total + square, last + late * square, least

        state = method.init(task.x0[None], task.y0[None])
        carry = state, 0.0, 0.0, jnp.asarray(4 * copies, jnp.int32)
        _, total, last, least = jax.lax.fori_loop(0, rounds, turn, carry)
        return total * EVERY / rounds, last * EVERY / (rounds // 3), least

    return jax.jit(jax.vmap(one, (0, None, None)))


def coverage_of(kind):
    """C_x* of one copy: the fewest of the four that hold an entry in any round."""
    task = dbo.tasks.federated_toy(n=4, identical=True)
    fleet = fleet_of(kind, 1, task)

    def least(turn):
        drawn = s.draw(fleet, jax.random.key(0), turn)
        layout = fleet.layout
        return s.smallest(s.counts(layout.x, layout.units, drawn, task.x0))

    return int(jnp.min(jax.lax.map(least, jnp.arange(48))))


def measure(options):
    """Squares per (method, kind): (copies, rounds, seeds), and floors without noise."""
    keys = jax.random.split(jax.random.key(1), options.seeds)
    cells, quiet = {}, {}
    for name in METHODS:
        for kind in KINDS:
            unit, begin = coverage_of(kind), time.perf_counter()
            _, floor, _ = runner(name, kind, 1, False)(keys[:1], QUIET, 6000)
            quiet[name, kind] = float(floor[0])
            grid = np.zeros((len(options.copies), len(options.rounds), options.seeds))
            for i, copies in enumerate(options.copies):
                for j, rounds in enumerate(options.rounds):
                    step = BASE * (unit * copies / rounds) ** 0.5
                    found = runner(name, kind, copies, True)(keys, step, rounds)
                    grid[i, j] = found[0]
                    assert (np.asarray(found[2]) == unit * copies).all()
            cells[name, kind] = unit, grid
            seconds = time.perf_counter() - begin
            print(f"  {name}, {kind}: {seconds:.0f} s", flush=True)
    return cells, quiet


def slopes(unit, means, options, floor=0.0):
    """Exponents of C and of Q in ``means - floor``, and how much is left unexplained.

    Cells in which C Q is below four times its least are still on their way from the
    start and are left out.
    """
    c = unit * np.asarray(options.copies, float)[:, None] + 0 * means
    q = np.asarray(options.rounds, float)[None] + 0 * means
    late = c * q >= 4 * (c * q).min()
    columns = [np.ones(late.sum()), np.log(c[late]), np.log(q[late])]
    logs = np.log(means[late] - floor)
    found, *_ = np.linalg.lstsq(np.stack(columns, 1), logs, rcond=None)
    rest = logs - np.stack(columns, 1) @ found
    return found[1:], float(np.sqrt(np.mean(rest**2)))


def fitted(unit, means, options):
    """The floor between zero and the least mean that explains the most."""
    floors = np.linspace(0, 0.98, 99) * means.min()
    scored = [slopes(unit, means, options, floor)[1] for floor in floors]
    floor = floors[int(np.argmin(scored))]
    return floor, *slopes(unit, means, options, floor)


def summary(cells, quiet, options):
    for (name, kind), (unit, grid) in cells.items():
        means = grid.mean(-1)
        (raw_c, raw_q), _ = slopes(unit, means, options)
        floor, (c, q), rest = fitted(unit, means, options)
        if kind == "full":  # nothing is masked: no floor to fit
            floor, ((c, q), rest) = 0.0, slopes(unit, means, options)
        draws = np.random.default_rng(0).integers(
            options.seeds, size=(200, options.seeds)
        )
        again = [slopes(unit, grid[..., d].mean(-1), options, floor)[0] for d in draws]
        spread_c, spread_q = np.std(again, 0)
        yield {
            "method": name,
            "sub-models": kind,
            "C_x* per copy": unit,
            "exponent of C": f"{raw_c:.2f}",
            "of Q": f"{raw_q:.2f}",
            "floor, no noise": f"{quiet[name, kind]:.1e}",
            "floor, fitted": f"{floor:.2g}",
            "exponent of C above it": f"{c:.2f} ± {spread_c:.2f}",
            "of Q above it": f"{q:.2f} ± {spread_q:.2f}",
            "misfit": f"{rest:.2f}",
        }


def values(cells, options):
    for (name, kind), (unit, grid) in cells.items():
        for copies, row in zip(options.copies, grid, strict=True):
            cell = {"method": name, "sub-models": kind, "C_x*": unit * copies}
            for rounds, found in zip(options.rounds, row, strict=True):
                cell[f"Q = {rounds}"] = f"{found.mean():.3g}"
            yield cell


def picture(cells, quiet, options, path):
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    for ax, ((name, kind), (unit, grid)) in zip(axes.flat, cells.items(), strict=True):
        for copies, row in zip(options.copies, grid, strict=True):
            c = unit * copies
            at = c * np.asarray(options.rounds)
            ax.loglog(at, row.mean(-1), "o-", label=f"C_x* = {c}")
        products = np.array(ax.get_xlim())
        ax.loglog(products, 25 / products**0.5, "k--", alpha=0.5, label="slope -1/2")
        if kind != "full":
            ax.axhline(quiet[name, kind], color="k", lw=1, label="floor without noise")
        ax.set(title=f"{name}, {kind}", xlabel="C_x* Q")
        ax.set_ylabel("mean squared true hypergradient")
        ax.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[500, 1000, 2000, 4000]
    )
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/rabo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    cells, quiet = measure(options)
    rows, fits = list(values(cells, options)), list(summary(cells, quiet, options))
    write_csv(options.out / "rate.csv", rows)
    write_csv(options.out / "rate_fits.csv", fits)
    picture(cells, quiet, options, options.out / "rate.png")
    lines = [
        "# The rate of RABO and RAFBO on the toy, our formulation",
        "",
        f"{header()}.",
        "",
        "`federated_toy(identical=True)`, dx = 24, dy = 18, float32, r = "
        f"{WIDTH:g}, no projection; noise of standard deviation {SIGMA:g} on every "
        f"gradient; steps {BASE:g} sqrt(C_x* / Q) for x and {RATIO:g} times that for y "
        f"and z, one local step. Mean over all rounds of the squared norm of the true "
        f"hypergradient (every {EVERY}th round), mean of {options.seeds} seeds. The "
        "same sub-models are held by more and more copies of four clients; C_x* is "
        "what was observed. Floor without noise: one copy, last third of 6000 rounds "
        f"of {QUIET:g}. Fits are least squares on logarithms over all cells but those "
        "still on their way from the start (C_x* Q below four times its least); ± is "
        "one bootstrap standard deviation over the seeds, the fitted floor held fixed; "
        "misfit: root mean square of what is left, in logarithms.",
        "",
        *table(rows, left=2),
        "",
        "## Fitted exponents; the theory says -0.5 above a floor",
        "",
        *table(fits, left=2),
        "",
        f"Took {time.perf_counter() - begin:.0f} s, compilation included.",
    ]
    (options.out / "rate.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
