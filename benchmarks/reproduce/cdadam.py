"""CD-Adam and its rivals: bits to a small gradient, megabytes to an accuracy.

    python benchmarks/reproduce/cdadam.py                       # both parts
    python benchmarks/reproduce/cdadam.py --only logistic       # one of them
    python benchmarks/reproduce/cdadam.py --libsvm phishing mushrooms
    python benchmarks/reproduce/cdadam.py --full --fashion PATH

The main method is our formulation of CD-Adam (arXiv 2111.00705), following the authors'
public code; data, models and settings are ours as well, and no table of the paper is
repeated here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure(["tasks", "plots"])

import argparse
import time

import cdadam_cnn
import cdadam_logistic
from report import header

PARTS = {"logistic": cdadam_logistic.report, "cnn": cdadam_cnn.report}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="leave the other part out")
    parser.add_argument("--out", type=Path, default=Path("results/cdadam"))
    parser.add_argument("--steps", type=int, default=2000, help="of the logistic part")
    parser.add_argument("--starts", type=int, default=5, help="of the logistic part")
    parser.add_argument("--full", action="store_true", help="as many samples as a9a")
    parser.add_argument("--libsvm", type=Path, nargs="+", default=[], metavar="PATH")
    parser.add_argument("--cnn-steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3, help="of the cnn part")
    parser.add_argument("--fashion", type=Path, help="folder with the four IDX files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ["# Our formulation of CD-Adam beside its rivals", "", f"{header()}."]
    print(*lines, sep="\n", flush=True)
    for name in [options.only] if options.only else PARTS:
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
    (options.out / "cdadam.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"\nTables, CSV files and pictures are in {options.out}/.")


if __name__ == "__main__":
    main()
