"""Seconds of an exchange against the bandwidth of its link, dense and compressed.

    python benchmarks/scale/bandwidth.py                 # a few minutes on two cores
    python benchmarks/scale/bandwidth.py --rates 200     # one bandwidth

Two processes of one node each, in a network namespace whose loopback a token bucket
shapes; both directions share it. A whole exchange is timed, encoding and decoding
included, in loops of some exchanges. The model adds the time that the bytes take on the
link to what an exchange takes where nothing is shaped. Linux, as a user who may make
namespaces, with `tc` (Debian's iproute2).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure([])

import argparse

import numpy as np
from hosts import can_shape, launched
from report import header, quartiles, table, write_csv

NAMES = ("dense", "top-k 1 %", "block top-k 1 %", "sign", "QSGD, 4 bits")


def timed(name, entries, rate, options):
    trips = max(2, min(20, 2_000_000 // entries))
    case = {
        "compressor": name,
        "graph": "ring",
        "nodes": 2,
        "entries": entries,
        "trips": trips,
        "repeats": options.repeats,
    }
    return launched(case, 2, namespace=True, rate=rate or None)


def rows(found, rate):
    """One size and bandwidth; what the model predicts comes from no limit at all."""
    dense = np.median(found["dense", rate]["seconds"])
    for name in NAMES:
        case = found[name, rate]
        seconds = np.array(case["seconds"])
        free = np.median(found[name, 0]["seconds"])
        wire = case["compiled"] * 8 / (rate * 1e6) if rate else 0.0
        yield {
            "Mbit/s": rate or "no limit",
            "entries": case["entries"],
            "message": name,
            "bytes": case["message"],
            "ms": quartiles(1e3 * seconds, digits=2),
            "model, ms": f"{1e3 * (free + wire):.2f}",
            "measured / model": f"{np.median(seconds) / (free + wire):.2f}",
            "times faster": f"{dense / np.median(seconds):.1f}",
        }


def main(options):
    if not can_shape():
        raise SystemExit("No network namespace, or no `tc`, for this user.")
    rates, shown = sorted({0, *options.rates}), []
    for entries in options.entries:
        found = {
            (name, rate): timed(name, entries, rate, options)
            for rate in rates
            for name in NAMES
        }
        shown += [row for rate in rates for row in rows(found, rate)]
    print("\n".join([header(), "", *table(shown, left=3)]))
    write_csv(options.out / "scale_bandwidth.csv", shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rates", type=int, nargs="+", default=[50, 200, 1000])
    add("--entries", type=int, nargs="+", default=[100_000, 1_000_000])
    add("--repeats", type=int, default=9)
    add("--out", type=Path, default=Path("results"))
    main(parser.parse_args())
