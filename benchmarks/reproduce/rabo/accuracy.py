"""RABO and RAFBO on 100 clients of unlike capacity: accuracy, megabytes, seconds.

    python benchmarks/reproduce/rabo/accuracy.py                  # three parts
    python benchmarks/reproduce/rabo/accuracy.py --only mlp-skewed
    python benchmarks/reproduce/rabo/accuracy.py --only cnn-skewed --tune
    python benchmarks/reproduce/rabo/accuracy.py --only mlp-skewed --fashion PATH

The convolutional network is not among the default parts, and its steps must be chosen
first, which takes long on a CPU.

Our formulation of arXiv:2512.24667, whose listing was not checked; tasks and settings
are ours too: nothing here repeats a table of the paper.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["tasks", "plots"])

import argparse
import time

import accuracy_tables
import accuracy_tuning
from report import header

PARTS = ("mlp-skewed", "tuning-skewed", "mlp-equal")
MORE = ("cnn-skewed",)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS + MORE, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("results/rabo"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--tune", action="store_true", help="choose the steps anew")
    parser.add_argument("--fashion", type=Path, help="folder with the four IDX files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tune:
        return accuracy_tuning.tune(options)
    lines = ["# RABO and RAFBO, our formulation", "", f"{header()}."]
    lines += ["", *accuracy_tables.preface(options)]
    print(*lines, sep="\n", flush=True)
    for part in options.only:
        begin = time.perf_counter()
        found = accuracy_tables.report(part, options)
        seconds = time.perf_counter() - begin
        took = f"This part took {seconds:.0f} s, compilation included."
        print("", *found, "", took, sep="\n", flush=True)
        lines += ["", *found, "", took]
    path = options.out / "rabo_accuracy.md"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"\nTables, CSV files and pictures are in {options.out}/.")
    return None


if __name__ == "__main__":
    main()
