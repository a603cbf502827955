"""Speed against the floor: every kernel and step, in one command.

    python benchmarks/speed/run.py                    # some twelve minutes on two cores
    python benchmarks/speed/run.py --short            # about a minute
    python benchmarks/speed/run.py --only mixing steps --against BASELINE
    python benchmarks/speed/run.py --save-baseline    # into baselines/, by device

Ratios are to a copy of the same array in the same kind of loop, or to what the column
`against` names; see `floors.py`. `--against` alone takes the baseline of this kind of
device, and exits with 1 where something is worse by a fifth beyond noise.
"""

import start

start.ready()

import argparse
import os
import sys
import time
from pathlib import Path

import baseline
import channels
import compressors
import estimators
import growth
import jax
import mixing
import steps
import summary
from records import Options
from report import header, write_csv

import dbojax as dbo

PARTS = {
    "mixing": mixing,
    "compressors": compressors,
    "channels": channels,
    "hypergradients": estimators,
    "steps": steps,
    "growth": growth,
}
GIVEN = Path()  # `--against` without a file


def stamped(lines):
    """All lines with the same columns, and with where they were measured."""
    device = jax.devices()[0]
    where = {
        "platform": device.platform,
        "device": device.device_kind,
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "dbojax": dbo.__version__,
    }
    names = dict.fromkeys(name for line in lines for name in line)
    return [{**dict.fromkeys(names, ""), **line, **where} for line in lines]


def measure(names, options):
    lines = []
    for name in names:
        begin = time.perf_counter()
        own = PARTS[name].rows(options)
        lines += own
        seconds = time.perf_counter() - begin
        print(f"{name}: {len(own)} lines in {seconds:.0f} s", flush=True)
    return stamped(lines)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/speed.csv"))
    parser.add_argument("--markdown", type=Path, help="puts the tables into a page")
    parser.add_argument("--against", type=Path, nargs="?", const=GIVEN)
    parser.add_argument("--save-baseline", action="store_true")
    return parser.parse_args(arguments)


def main(arguments=None):
    given = parse(arguments)
    options = Options(given.short, min(given.turns, 7) if given.short else given.turns)
    print(header(), flush=True)
    lines = measure(given.only, options)
    write_csv(given.out, lines)
    if "growth" in given.only:
        growth.plot(lines, given.out.with_name(f"{given.out.stem}_growth.png"))
    print("", *summary.short(lines), sep="\n")
    if given.markdown:
        summary.insert(given.markdown, header(), lines)
    own = baseline.FOLDER / f"{baseline.device_name(jax.devices()[0])}.csv"
    failed = 0
    if given.against is not None:
        failed = against(own if given.against == GIVEN else given.against, lines)
    if given.save_baseline:
        baseline.save(own, lines)
        print(f"Baseline: {own.name}")
    return failed


def alone(name):
    """What a part does that is started as a script."""
    return main(["--only", name, *sys.argv[1:]])


def against(path, lines):
    """Print what is worse than a baseline; 1 if something is."""
    before = baseline.load(path)
    if not before:
        print(
            f"Nothing to compare with at {path}; `--save-baseline` writes a baseline."
        )
        return 2
    worse = baseline.compare(lines, before)
    known = {(line["group"], line["case"]) for line in before}
    new = sum((line["group"], line["case"]) not in known for line in lines)
    print(f"\nAgainst {path.name}: {len(worse)} worse, {new} not in it.")
    print(*worse, sep="\n")
    return int(bool(worse))


if __name__ == "__main__":
    raise SystemExit(main())
