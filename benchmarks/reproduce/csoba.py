"""Compressed bilevel methods with a server: floors, bytes to a target, speed-up, cost.

    python benchmarks/reproduce/csoba.py                          # all four parts
    python benchmarks/reproduce/csoba.py --only quadratic step    # some of them
    python benchmarks/reproduce/csoba.py --only tenfold --tune    # the grids of steps
    python benchmarks/reproduce/csoba.py --only tenfold --fashion PATH

The methods are our formulation of C-SOBA / CM-SOBA / EF-SOBA (arXiv:2405.18858), and so
are the problems and settings here: nothing in this folder repeats a table of the paper.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure(["tasks", "plots"])

import argparse
import time

import csoba_quadratic
import csoba_speedup
import csoba_step
import csoba_tenfold
from report import header

PARTS = {
    "quadratic": csoba_quadratic.report,
    "tenfold": csoba_tenfold.report,
    "speedup": csoba_speedup.report,
    "step": csoba_step.report,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("results/csoba"))
    parser.add_argument("--seeds", type=int, default=5, help="of the ten-fold tables")
    parser.add_argument("--steps", type=int, help="of the ten-fold runs")
    parser.add_argument("--tune", action="store_true", help="print the grids and stop")
    parser.add_argument("--fashion", type=Path, help="folder with the four IDX files")
    parser.add_argument("--dim", type=int, default=1_000_000, help="of the step part")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tune:
        return csoba_tenfold.tune(options)
    lines = ["# C-SOBA, CM-SOBA and EF-SOBA, our formulation", "", f"{header()}."]
    print(*lines, sep="\n", flush=True)
    for name in options.only:
        begin = time.perf_counter()
        found = PARTS[name](options)
        seconds = time.perf_counter() - begin
        part = [
            "",
            *found,
            "",
            f"This part took {seconds:.0f} s, compilation included.",
        ]
        print(*part, sep="\n", flush=True)
        lines += part
    (options.out / "csoba.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"\nTables, CSV files and pictures are in {options.out}/.")
    return None


if __name__ == "__main__":
    main()
