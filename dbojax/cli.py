"""The command line: ``dbojax compare`` and ``dbojax launch``.

Names become values here and nowhere else.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import dbojax as dbo
from dbojax import comparison, topology
from dbojax import launch as launcher
from dbojax.comparison import tables
from dbojax.comparison.drive import Plan

# `argparse` would take a `--` of the script's for its own; no argument has this byte.
_DASHES = "\0"
# Number of nodes -> mixing matrix.
GRAPHS: dict[str, Callable[[int], np.ndarray]] = {
    "ring": lambda n: topology.metropolis(topology.ring(n)),
    "two_hop": lambda n: topology.metropolis(topology.ring(n, hops=2)),
    "erdos_renyi": lambda n: topology.metropolis(topology.erdos_renyi(n, 0.4, seed=0)),
    "star": lambda n: topology.metropolis(topology.star(n)),
    "complete": lambda n: topology.metropolis(topology.complete(n)),
}
NODES = 10
SHORT: dict[str, Any] = {
    "graphs": ["ring", "erdos_renyi"],
    "h": [0.8],
    "seeds": 2,
    "steps": 40,
    "methods": ["c2dfb", "c2dfb-qsgd4", "ma-dsbo"],
    "task": ["coefficient_tuning"],
}
USUAL: dict[str, Any] = {
    "graphs": ["ring", "two_hop", "erdos_renyi"],
    "h": [0.0, 0.8],
    "seeds": 5,
    "steps": 100,
    "methods": None,
    "task": None,
}


def chosen(names: Sequence[str], known: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Values by name, in the order asked for.

    Raises:
        ValueError: if a name is unknown or comes twice; it lists those that are known.

    Examples:
        >>> chosen(["b"], {"a": 1, "b": 2}, "letter")
        {'b': 2}
    """
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise ValueError(
            f"No {what} is named {', '.join(map(repr, unknown))}; write some of "
            f"{', '.join(known)}."
            if unknown
            else f"Name each {what} once, got {', '.join(names)}."
        )
    return {name: known[name] for name in names}


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    top = argparse.ArgumentParser(prog="dbojax", description=dbo.__doc__)
    top.add_argument("--version", action="version", version=dbo.__version__)
    commands = top.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "compare", help="methods, graphs and data at equal tuning effort"
    ).add_argument
    add("--task", nargs="+", metavar="NAME", help=", ".join(comparison.studies()))
    add("--fashion", type=Path, help="folder of Fashion-MNIST, for one task more")
    add("--methods", nargs="+", metavar="NAME", help=", ".join(comparison.roster()))
    add("--graphs", nargs="+", metavar="NAME", help=", ".join(GRAPHS))
    add("--h", nargs="+", type=float, help="heterogeneities in [0, 1]")
    add("--seeds", type=int, help="number of seeds in the table")
    add("--tuning-seeds", type=int, default=2, help="further seeds, for tuning alone")
    add("--steps", type=int, help="of a method with ten inner rounds per step")
    add("--every", type=int, default=2, help="steps from evaluation to evaluation")
    add("--rounds", type=int, default=2, help="rounds of tuning, 9 settings each")
    add("--key", type=int, default=0, help="seed of all randomness but the data's")
    add("--short", action="store_true", help="a small comparison in about two minutes")
    add("--out", type=Path, default=Path("results/compare"), help="folder to write to")
    add("--resume", action="store_true", help="keep what the folder holds, add to it")
    add("--no-plots", action="store_true", help="write tables alone")
    add = commands.add_parser(
        "launch",
        usage="dbojax launch -n N [options] {script.py | -m module} [its arguments]",
        help="one script as several processes on this host",
    ).add_argument
    add("-n", type=int, required=True, metavar="N", help="number of processes")
    add("--devices", type=int, metavar="K", help="virtual CPU devices of each")
    add("--restarts", type=int, default=0, metavar="R", help="after one has failed")
    add("--timeout", type=float, metavar="S", help="seconds to wait for a process")
    add("--logs", type=Path, metavar="DIR", help="folder for the output of 1, 2, ...")
    add("-m", action="store_true", dest="module", help="run a module, not a script")
    add("script", help="run by every process, with what follows as its arguments")
    add("arguments", nargs=argparse.REMAINDER)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status.

    Args:
        arguments: of the command line; None takes this process's.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["launch"]:
        given = [_DASHES if word == "--" else word for word in given]
    options = parser().parse_args(given)
    try:
        if options.command == "launch":
            return launch(options)
        compare(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"dbojax {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def launch(options: argparse.Namespace) -> int:
    """Run a script as several processes; the exit status."""
    words = [options.script, *options.arguments]
    words = ["--" if word == _DASHES else word for word in words]
    command = ["-m"] * options.module + words[words[0] == "--" :]
    return launcher.launch(
        command,
        options.n,
        devices=options.devices,
        restarts=options.restarts,
        timeout=options.timeout,
        logs=options.logs,
    )


def compare(options: argparse.Namespace) -> list[comparison.Cell]:
    """Run all that the options name, and write tables, CSV files and pictures."""
    for name, usual in (SHORT if options.short else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    studies, plan = _planned(options)
    if not options.no_plots:
        dbo.plots.check()  # not at the end of an hour
    options.out.mkdir(parents=True, exist_ok=True)
    cells, tuned, clock = _before(options, _settings(options, plan))
    done = {(cell.task, cell.label) for cell in cells}
    for who, outcome, seconds in _outcomes(studies, plan, options, done):
        print(f"{who['task']}, {who['method']}: {seconds:.0f} s", flush=True)
        clock.append({**who, "seconds": f"{seconds:.0f}"})
        for h, record in zip(plan.hs, outcome.tuned, strict=True):
            tuned += [{**who, "h": h, **row} for row in tables.tried(record)]
        cells += outcome.cells
        # Written anew each time, so that what is done survives an interruption.
        comparison.to_csv(cells, options.out / "cells.csv")
        _write_csv(options.out / "tuning.csv", tuned)
        _write_csv(options.out / "clock.csv", clock)
    lines = [*_head(plan), "", *tables.report(cells), ""]
    lines += ["## Wall clock", "", "Tuning and table of all runs of a method.", ""]
    lines += tables.markdown(clock)
    (options.out / "compare.md").write_text("\n".join(lines) + "\n", "utf-8")
    if not options.no_plots:
        _pictures(cells, options.out)
    print("\n".join(lines) + f"\n\nAll of it is in {options.out}/.")
    return cells


def _settings(options, plan: Plan) -> dict[str, Any]:
    """All that decides about a cell, as it is read back from a file."""
    found = plan._asdict() | {"graphs": list(plan.graphs), "grid": list(plan.grid)}
    found |= {"key": options.key, "fashion": options.fashion and str(options.fashion)}
    return json.loads(json.dumps(found | {"version": dbo.__version__}))


def _before(options, settings):
    """Cells, tuning and clock of an earlier command with the same settings."""
    path = options.out / "plan.json"
    if not (options.resume and path.exists()):
        path.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
        if (cells := options.out / "cells.csv").exists():
            cells.replace(options.out / "cells.before.csv")
        return [], [], []
    earlier = json.loads(path.read_text("utf-8"))
    unlike = {k for k in settings if earlier.get(k) != settings[k]}
    if unlike:
        told = ", ".join(f"{k} = {earlier.get(k)!r}" for k in sorted(unlike))
        raise ValueError(
            f"{path} tells of another plan, with {told}. Repeat its options, or choose "
            "another --out."
        )
    if not (options.out / "cells.csv").exists():
        return [], [], []
    cells = comparison.read_csv(options.out / "cells.csv")
    return cells, *(_read_csv(options.out / f"{n}.csv") for n in ("tuning", "clock"))


def _outcomes(studies, plan, options, done):
    """(task and method, outcome, seconds) of all that the options name."""
    key, begin = jax.random.key(options.key), time.perf_counter()
    for study in studies.values():
        roster = comparison.roster(study.scales)
        roster = chosen(options.methods or [*roster], roster, "method")
        left = {k: e for k, e in roster.items() if (study.name, e.label) not in done}
        for name, outcome in comparison.outcomes(study, left, plan, key):
            seconds = time.perf_counter() - begin
            yield {"task": study.name, "method": name}, outcome, seconds
            begin = time.perf_counter()


def _planned(options):
    """Studies and plan, all names and numbers checked before anything runs."""
    known = comparison.studies(options.fashion)
    studies = chosen(options.task or [*known], known, "task")
    if options.methods:
        chosen(options.methods, comparison.roster(), "method")
    graphs = chosen(options.graphs, GRAPHS, "graph")
    hs = [f"{h:g}" for h in options.h]
    chosen(hs, dict.fromkeys(hs), "h")
    for name in ("seeds", "tuning_seeds", "steps", "every", "rounds"):
        if (value := getattr(options, name)) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {value}.")
    if options.steps % options.every:
        raise ValueError(
            f"--steps must be a multiple of --every, got {options.steps} and "
            f"{options.every}."
        )
    plan = Plan(
        {name: make(NODES) for name, make in graphs.items()},
        hs=tuple(options.h),
        seeds=tuple(range(options.seeds)),
        tuning_seeds=tuple(range(1000, 1000 + options.tuning_seeds)),
        steps=options.steps,
        every=options.every,
        grid=comparison.Grid(rounds=options.rounds),
    )
    return studies, plan


def _head(plan: Plan) -> list[str]:
    device = jax.devices()[0].device_kind
    first = next(iter(plan.graphs))
    gaps = (
        f"{name} (gap {topology.spectral_gap(w):.2f}, {comparison.links(w)} links)"
        for name, w in plan.graphs.items()
    )
    return [
        "# Who needs least?",
        "",
        f"dbojax {dbo.__version__}, jax {jax.__version__}, optax {optax.__version__}, "
        f"Python {platform.python_version()}; {device} ({os.cpu_count()} cores)",
        "",
        f"{NODES} nodes, full batches; graphs: "
        f"{', '.join(gaps)}; h = {', '.join(f'{h:g}' for h in plan.hs)}; "
        f"{len(plan.seeds)} seeds; {plan.steps} steps of a method with ten inner "
        f"rounds, {plan.steps} times its pace of a method without, judged every "
        f"{plan.every} steps times pace. Every method has {plan.grid.runs} runs with "
        f"pairs of steps around a centre, on each of {len(plan.tuning_seeds)} other "
        "ways to deal the samples out, as long as those of the table, apart for each "
        f"task and h, on the graph {first!r} alone; the least validation loss, mean "
        "over the run and the seeds, is chosen. All graphs use those steps.",
    ]


def _read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _pictures(cells: Sequence[comparison.Cell], folder: Path) -> None:
    """One picture for each task, graph and h."""
    import matplotlib.pyplot as plt

    goals = comparison.targets(cells)
    for task, graph, h in goals:
        histories = comparison.select(cells, task, graph, h)
        axes = dbo.plots.panels(histories, target=goals[task, graph, h], limits=(0, 1))
        axes[0].figure.suptitle(f"{task}, {graph}, h = {h:g}")
        axes[0].figure.savefig(folder / f"{task}_{graph}_h{h:g}.png", dpi=120)
        plt.close(axes[0].figure)
