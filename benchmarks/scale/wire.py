"""Bytes of an exchange: the meter, the compiled program, the operating system.

    python benchmarks/scale/wire.py            # some minutes on two cores
    python benchmarks/scale/wire.py --short    # a minute

The meter counts a message per directed link. Of those, the compiled program sends what
crosses between devices: each message once to each device that asks for it. Both are
compared on 8 virtual devices for every compressor, graph and number of nodes per
device. The operating system's counters are those of the loopback in a network namespace
of its own, with 4 processes of one device and an MTU of 1500; they hold headers and
acknowledgements as well. Linux, as a user who may make namespaces.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure([])

import argparse
import itertools

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
from exchanges import COMPRESSORS, GRAPHS, program
from hosts import can_isolate, launched
from report import header, table, write_csv

import dbojax as dbo

ENTRIES, TRIPS = 4000, 3
NODES = (8, 16, 32)


def in_program(compressor, graph, n):
    compiled, _, traffic, crossings, mix = program(compressor, graph, n, ENTRIES, TRIPS)
    sent = dbo.devices.wire(compiled)
    expected = traffic.message * crossings * TRIPS
    if sum(sent.values()) != expected:
        raise SystemExit(f"{compressor}, {graph}, {n}: {sent}, not {expected}.")
    return {
        "compressor": compressor,
        "graph": graph,
        "nodes": n,
        "links": mix.links,
        "cross": crossings,
        "message B": traffic.message,
        "meter B": traffic.total,
        "program B": sum(sent.values()) // TRIPS,
        "by": ", ".join(sent),
    }


def in_kernel(compressor, graph, entries):
    case = {"compressor": compressor, "graph": graph, "nodes": 4, "entries": entries}
    found = launched(case | {"trips": 20, "repeats": 5}, 4, namespace=True)
    sent = float(np.median(found["sent"]))
    return {
        "compressor": compressor,
        "graph": graph,
        "entries": entries,
        "messages": found["crossings"],
        "program B": found["compiled"],
        "kernel B": f"{sent:.0f}",
        "over, %": f"{100 * (sent / found['compiled'] - 1):.1f}",
        "over, B a message": f"{(sent - found['compiled']) / found['crossings']:.0f}",
    }


def main(options):
    nodes = NODES[:2] if options.short else NODES
    product = itertools.product(COMPRESSORS, GRAPHS, nodes)
    programs = [in_program(*case) for case in product]
    print("\n".join([header(), "", *table(programs, left=2)]))
    write_csv(options.out / "scale_wire_program.csv", programs)
    if not can_isolate():
        print(
            "\nNo network namespace for this user: the kernel's counters are left out."
        )
        return
    sizes = (100_000,) if options.short else (10_000, 100_000, 1_000_000)
    counted = [
        in_kernel(name, graph, entries)
        for entries in sizes
        for name in ("dense", "top-k 1 %", "sign", "QSGD, 4 bits", "bfloat16")
        for graph in ("ring", "exponential")
    ]
    print("\n".join(["", *table(counted, left=2)]))
    write_csv(options.out / "scale_wire_kernel.csv", counted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="small, in a minute")
    parser.add_argument("--out", type=Path, default=Path("results"))
    main(parser.parse_args())
