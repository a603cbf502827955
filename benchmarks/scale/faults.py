"""Killed workers, damaged checkpoints and another number of devices.

    python benchmarks/scale/faults.py            # half an hour on two cores
    python benchmarks/scale/faults.py --short    # a few minutes

C²DFB with top-k reference points, 8 nodes on a ring, run by `dbojax launch -n 4` with a
checkpoint at the end of each chunk of 10 steps.

Kills: SIGKILL of a random process, at a moment that is uniform over an undisturbed run;
in a few more trials, some milliseconds into a random checkpoint. Each process logs each
chunk that it begins: what is begun before the kill, less what the restarted run has in
its checkpoint, is what the kill has cost. Linux only.
Damage: the newer of two checkpoints loses its end, or a bit of it flips, in a random
place of a random file. Four processes wrote it; one, or two, go on from it.
Devices: a run goes on with another number of processes and devices, twice.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure([])

import argparse
import collections
import os
import tempfile

import numpy as np
from hosts import launched
from report import header, table, write_csv
from supervised import after, amid_checkpoint, counted, load, same, start, supervise

# Optimise less: most of a trial goes into compiling, in two times four processes.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PROCESSES, EVERY, ENTRIES = 4, 10, 2000
LAYOUTS = ((1, 8), (2, 2), (1, 1))  # processes, and devices of each


def case(folder, steps):
    settings = {"entries": ENTRIES, "every": EVERY, "steps": steps}
    return {**settings, "folder": str(folder), "out": str(folder / "out.npz")}


def draw(rng, number, options, seconds):
    """Which process is killed, and the wait for the moment."""
    rank = int(rng.integers(PROCESSES))
    if number < options.trials:
        return rank, after(rng.uniform(0, seconds))
    chunk = int(rng.integers(options.steps // EVERY)) + 1
    return rank, amid_checkpoint(chunk, rng.uniform(0, 0.05))


def kills(root, options):
    """Trials, undisturbed runs, and how many kills came too late."""
    rng, rows, late = np.random.default_rng(options.seed), [], 0
    plain = [supervise(case(root / "plain", options.steps), PROCESSES)]
    while len(rows) < options.trials + options.aimed:
        number = len(rows)
        if number == options.trials // 2 and len(plain) == 1:
            again = case(root / "plain again", options.steps)
            plain.append(supervise(again, PROCESSES))
        rank, wait = draw(rng, number, options, plain[0].seconds)
        trial = case(root / f"trial {number} {late}", options.steps)
        run = supervise(trial, PROCESSES, rank, wait)
        if run.killed is None:
            late += 1
            continue
        told = f"process {rank} of {PROCESSES} was killed by SIGKILL" in run.told
        row = {"trial": number + 1, "process killed": rank, "at s": f"{run.killed:.1f}"}
        row |= counted(trial, run, rank)
        row |= {"extra s": run.seconds, "named": "yes" if told else "NO"}
        row["same bits"] = "yes" if same(run.out, plain[0].out) else "NO"
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    usual = np.mean([run.seconds for run in plain])
    rows = [row | {"extra s": f"{row['extra s'] - usual:.1f}"} for row in rows]
    if not all(same(run.out, plain[0].out) for run in plain):
        raise SystemExit("Two undisturbed runs differ.")
    return rows, plain, late


def layouts(root, expected, steps):
    """One run on ever fewer devices, against one that never stopped."""
    folder = root / "layouts"
    folder.mkdir()
    for turn, (processes, devices) in enumerate(LAYOUTS, 1):
        stop = steps * turn // len(LAYOUTS) // EVERY * EVERY
        stop = steps if turn == len(LAYOUTS) else stop
        status = start(case(folder, stop), processes, devices).wait()
        if status:
            raise SystemExit((folder / "stderr").read_text("utf-8"))
        yield {
            "processes": processes,
            "devices of each": devices,
            "to step": stop,
            "history": alike(load(folder / "out.npz"), expected, stop, "history"),
            "state": alike(load(folder / "out.npz"), expected, stop, "state")
            if stop == steps
            else "",
        }


def alike(found, expected, stop, what):
    """The largest difference, relative to the largest number of each array."""
    far = [0.0]
    for name, wanted in expected.items():
        if name.startswith("leaf") != (what == "state"):
            continue
        wanted = wanted if what == "state" else wanted[:stop]
        if found[name].tobytes() != wanted.tobytes():
            far.append(np.max(np.abs(found[name] - wanted)) / np.max(np.abs(wanted)))
    return f"within {max(far):.0e}" if max(far) else "same bits"


def damages(root, processes, trials, seed):
    """Trials by what was damaged and how, and the first sentences."""
    good, folder = root / "good", root / f"damage {processes}"
    folder.mkdir()
    if not good.exists():
        good.mkdir()
        if start(case(good, 2 * EVERY), PROCESSES).wait():
            raise SystemExit((good / "stderr").read_text("utf-8"))
    more = {"good": str(good), "damages": trials, "seed": seed}
    rows = launched({**case(folder, 0), **more}, processes, worker="damage_worker.py")
    groups = collections.defaultdict(list)
    for file, kind, *facts in rows:
        groups[file, kind].append(facts[:3])
    found = []
    for (file, kind), facts in sorted(groups.items()):
        refused, same, older = np.sum(facts, 0).tolist()
        row = {
            "damaged": file,
            "how": kind,
            "read by": ["one process", "two processes"][processes - 1],
        }
        row |= {"trials": len(facts), "refused with a sentence": refused}
        found.append(row | {"older one used": older, "end as undisturbed": same})
    return found, rows


def main(options):
    os.environ.setdefault("XLA_FLAGS", QUICK)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows, plain, late = kills(root, options)
        moved = list(layouts(root, plain[0].out, options.steps))
        some = options.damages // 20
        bad, details = damages(root, 1, options.damages - some, options.seed)
        bad += damages(root, 2, some, options.seed)[0]
    said = [*{row[0]: row[-2] for row in details}.values(), details[0][-1]]
    repeated = [row["steps repeated"] for row in rows]
    seconds = ", ".join(f"{run.seconds:.1f}" for run in plain)
    lines = [header(), "", *table(rows), ""]
    lines += [
        f"{options.steps} steps, {EVERY} in a chunk; undisturbed {seconds} s; most "
        f"steps repeated: {max(repeated)}; {late} kills came after the end and were "
        "drawn again.",
        "",
        *table(moved),
        "",
        *table(bad, left=3),
        "",
        *(f"- {text.replace(name, '')}" for text in said),
    ]
    print("\n".join(lines))
    write_csv(options.out / "scale_faults.csv", rows)
    write_csv(options.out / "scale_faults_damage.csv", bad)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--trials", type=int, default=20)
    add(
        "--aimed",
        type=int,
        default=5,
        help="further ones, while a checkpoint is written",
    )
    add("--damages", type=int, default=200)
    add("--steps", type=int, default=120)
    add("--seed", type=int, default=0)
    add("--short", action="store_true")
    add("--out", type=Path, default=Path("results"))
    found = parser.parse_args()
    if found.short:
        found.trials, found.aimed, found.damages, found.steps = 2, 1, 20, 30
    main(found)
