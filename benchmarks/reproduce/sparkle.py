"""Which strategy on which level: SPARKLE's claims, in shape.

    python benchmarks/reproduce/sparkle.py                   # all parts
    python benchmarks/reproduce/sparkle.py --only quadratic  # one of them

The methods are our formulation of SPARKLE and D-SOBA, and so are the problems and
settings here: nothing in this folder repeats a table of the papers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure(["tasks"])

import argparse
import time

import sparkle_digits
import sparkle_quadratic
from report import header

PARTS = {"quadratic": sparkle_quadratic.report, "digits": sparkle_digits.report}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("results/sparkle"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ["# SPARKLE and D-SOBA, our formulation", "", f"{header()}."]
    print(*lines, sep="\n", flush=True)
    for name in options.only:
        begin = time.perf_counter()
        part = ["", *PARTS[name](options), ""]
        seconds = time.perf_counter() - begin
        part.append(f"This part took {seconds:.0f} s, compilation included.")
        print(*part, sep="\n", flush=True)
        lines += part
    (options.out / "sparkle.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
