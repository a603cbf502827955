"""Seconds of an exchange against the bandwidth of its link, dense and compressed.

    python benchmarks/scale/bandwidth.py                 # a few minutes on two cores
    python benchmarks/scale/bandwidth.py --rates 200     # one bandwidth

Two processes of one node each, in a network namespace whose loopback a token bucket
shapes; both directions share it. A whole exchange is timed, encoding and decoding
included, on the device, in loops of some exchanges. Linux, as a user who may make
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
    return launched(case, 2, namespace=True, rate=rate)


def rows(entries, rate, options):
    found = {name: timed(name, entries, rate, options) for name in NAMES}
    dense = np.median(found["dense"]["seconds"])
    for name, case in found.items():
        seconds = np.array(case["seconds"])
        wire = case["compiled"] * 8 / (rate * 1e6) if rate else 0.0
        yield {
            "Mbit/s": rate or "not shaped",
            "entries": entries,
            "message": name,
            "bytes": case["message"],
            "ms": quartiles(1e3 * seconds, digits=2),
            "link alone, ms": f"{1e3 * wire:.2f}",
            "times faster": f"{dense / np.median(seconds):.1f}",
        }


def main(options):
    if not can_shape():
        raise SystemExit("No network namespace, or no `tc`, for this user.")
    found = [
        row
        for entries in options.entries
        for rate in options.rates
        for row in rows(entries, rate, options)
    ]
    print("\n".join([header(), "", *table(found, left=3)]))
    write_csv(options.out / "scale_bandwidth.csv", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rates", type=int, nargs="+", default=[50, 200, 1000, 0], help="0: no limit")
    add("--entries", type=int, nargs="+", default=[100_000, 1_000_000])
    add("--repeats", type=int, default=9)
    add("--out", type=Path, default=Path("results"))
    main(parser.parse_args())
