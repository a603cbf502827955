"""Weak scaling: the work and the bytes of a process as processes are added.

    python benchmarks/scale/weak.py

Every process has one device and two nodes of a million entries. On a graph of fixed
degree nothing that a process does depends on how many there are; where there are more
processes than cores, seconds grow because cores are shared, so those that a process is
busy for are shown as well.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure([])

import argparse

import numpy as np
from hosts import launched
from report import header, quartiles, table, write_csv

NODES = 2  # of a process


def row(name, graph, processes, options):
    case = {
        "compressor": name,
        "graph": graph,
        "nodes": NODES * processes,
        "entries": options.entries,
        "trips": 5,
        "repeats": 9,
    }
    found = launched(case, processes)
    return {
        "message": name,
        "graph": graph,
        "processes": processes,
        "nodes": found["nodes"],
        "kB out of a process": f"{found['compiled'] / processes / 1e3:.1f}",
        "busy s a process": f"{np.mean(found['busy']):.4f}",
        "s": quartiles(found["seconds"], digits=4),
    }


def main(options):
    found = [
        row(name, graph, processes, options)
        for graph in ("ring", "exponential")
        for name in ("dense", "block top-k 1 %", "sign")
        for processes in options.processes
    ]
    print("\n".join([header(), "", *table(found, left=2)]))
    write_csv(options.out / "scale_weak.csv", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[2, 4, 8])
    add("--entries", type=int, default=1_000_000)
    add("--out", type=Path, default=Path("results"))
    main(parser.parse_args())
