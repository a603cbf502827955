"""The same small grid of steps for every entry, on deals that the tables never see."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
from accuracy_methods import entries
from accuracy_problems import SPLITS, dataset, kind_of, runs_of
from accuracy_runs import outcome

UPPER_STEPS = {
    "mlp": (0.03, 0.1, 0.3),
    "cnn": (0.01, 0.03, 0.1),
    "tuning": (0.3, 1.0, 3.0),
}
LOWER_STEPS = {"mlp": (0.1, 0.3, 1.0), "cnn": (0.03, 0.1), "tuning": (0.1, 0.3)}
SEEDS = (100, 101)
TWINS = {"RAFBO, exact": "RAFBO", "RABO, exact": "RABO", "SimFBO": "RAFBO"}
CHOSEN = Path(__file__).with_name("accuracy_steps.json")


def grid_of(name):
    return list(itertools.product(UPPER_STEPS[name], LOWER_STEPS[name]))


def chosen():
    return json.loads(CHOSEN.read_text()) if CHOSEN.exists() else {}


def steps_of(name, entry, split):
    """The pair that was chosen for an entry on a split.

    With exact products a method has the steps of the same method with differences.
    """
    twin = entry._replace(method=TWINS.get(entry.method, entry.method))
    found = chosen().get(name, {})
    if twin.label not in found:
        raise SystemExit(f"No steps are chosen for {twin.label!r}: `--tune` first.")
    return tuple(found[twin.label][split])


def best_of(entry, name, source, rounds):
    """Split -> pair of the highest accuracy with one head over the second half."""
    grid = grid_of(name)
    cases = [(alpha, seed) for alpha in SPLITS.values() for seed in SEEDS]
    d = source[0].inputs.shape[1]
    runs = runs_of(kind_of(name, d, entry.capacity), source, cases)
    copies = np.repeat(np.arange(len(cases)), len(grid))
    many = runs._replace(
        **{
            field: jax.tree.map(lambda leaf: leaf[copies], getattr(runs, field))
            for field in ("x0", "y0", "batch", "pool", "test", "shares")
        }
    )
    found = outcome(entry, many, grid * len(cases), rounds, seed=7, final=False)
    # A setting that diverged has 0.1 by chance, or is not a number.
    late = np.nan_to_num(found.watched[len(found.watched) // 2 :]).mean(0)
    # The worst seed decides, or a setting that may collapse would win.
    scores = late.reshape(len(SPLITS), len(SEEDS), len(grid)).min(1)
    best = {
        split: grid[int(np.argmax(row))]
        for split, row in zip(SPLITS, scores, strict=True)
    }
    print(f"  {entry.label}: {best} of", np.round(scores, 3).tolist(), flush=True)
    return best


def tune(options):
    """Choose what is not in the file beside this one: remove it to start anew."""
    source = dataset(options)
    for part in options.only:
        name, fleet = part.split("-")
        print(part, flush=True)
        for entry in entries(name, fleet):
            if entry.method in TWINS or entry.label in chosen().get(name, {}):
                continue
            best = best_of(entry, name, source, options.rounds)
            found = chosen()  # another process may have added to it
            found.setdefault(name, {})[entry.label] = best
            CHOSEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
