"""What a smaller sub-model saves: operations, bytes, memory and time, measured.

    python benchmarks/reproduce/rabo/modes.py
    python benchmarks/reproduce/rabo/modes.py --width 2048 --repeats 15

A perceptron with three hidden layers and a convolutional network, x all hidden layers
and y the head, on random images of 28 x 28 pixels. Every client has the same capacity,
so that a row tells of that capacity alone. Operations are those of all products of
matrices in the compiled program, memory is what it sets aside for temporaries, bytes
follow from shapes; times are medians of calls that take turns, blocked on the device,
compilation apart.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["tasks"])

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from modes_programs import (
    BATCH,
    between,
    client_step,
    convolutional,
    layout_of,
    perceptron,
    whole_round,
)
from report import header, quartiles, table, write_csv

import dbojax as dbo

CAPACITIES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
CLIENTS = 10


def timed(programs, repeats):
    """Seconds of each call, in turns; the first of each does not count."""
    times = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program.call(*program.args))
            times[name].append(time.perf_counter() - begin)
    return {name: np.array(values[1:]) for name, values in times.items()}


def two_rounds(program):
    """How far x has moved after the second round, and the second round's metrics.

    In the first z is zero and the differences have nothing to say.
    """
    key, start, batch = program.args
    middle, _ = program.call(*program.args)
    end, metrics = program.call(key, middle, batch)
    return jax.tree.map(jnp.subtract, end.x, start.x), metrics


def difference(found, wanted):
    """Largest difference of two trees, over the largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    gaps = [(float(abs(a - b).max()), float(abs(b).max())) for a, b in pairs]
    return max(gap for gap, _ in gaps) / max(size for _, size in gaps)


def share(capacity):
    return "1" if capacity == 1 else f"1/{round(1 / capacity)}"


def cases():
    """(capacity, mode): at capacity 1 the two modes are one."""
    yield 1.0, "extracted"
    for capacity in CAPACITIES[1:]:
        yield capacity, "masked"
        yield capacity, "extracted"


def costs(name, what, programs, repeats):
    """Rows with operations, temporary memory and seconds, and shares of full size."""
    times = timed(programs, repeats)
    full = programs[1.0, "extracted"]
    base = np.median(times[1.0, "extracted"])
    for (capacity, mode), program in programs.items():
        seconds = times[capacity, mode]
        yield {
            "network": name,
            "what": what,
            "capacity": share(capacity),
            "mode": mode if capacity < 1 else "full size",
            "GFLOP": f"{program.flops() / 1e9:.3f}",
            "of full": f"{program.flops() / full.flops():.3f}",
            "MiB": f"{program.temporary() / 2**20:.1f}",
            "of full ": f"{program.temporary() / full.temporary():.3f}",
            "ms": quartiles(1e3 * seconds, 1),
            "of full  ": f"{np.median(seconds) / base:.3f}",
        }


def between_rows(name, network, layout):
    full, kernels = between(network, layout, 1.0)
    for capacity in CAPACITIES:
        program, size = between(network, layout, capacity)
        yield {
            "network": name,
            "capacity": share(capacity),
            "MFLOP": f"{program.flops() / 1e6:.2f}",
            "of full": f"{program.flops() / full.flops():.4f}",
            "kB of kernels": f"{size / 1e3:.1f}",
            "of full ": f"{size / kernels:.4f}",
        }


def rounds(network, layout):
    """Programs of rounds by (capacity, mode), bytes up, and how far modes differ."""
    programs, ends = {}, {}
    for capacity, mode in cases():
        fleet = dbo.submodels.fleet(layout, [capacity] * CLIENTS, minimum=0)
        program = whole_round(network, fleet, CLIENTS, extracted=mode == "extracted")
        programs[capacity, mode] = program
        ends[capacity, mode] = two_rounds(program)
    sent = {case: metrics.traffic.message / 1e6 for case, (_, metrics) in ends.items()}
    gaps = {
        capacity: difference(
            ends[capacity, "extracted"][0], ends[capacity, "masked"][0]
        )
        for capacity in CAPACITIES[1:]
    }
    return programs, sent, gaps


def absent_rows(network, layout, repeats):
    """Ten clients of ten against ten of a hundred: one full, nine of a quarter."""
    for personal in (False, True):
        programs = {}
        for clients in (10, 100):
            capacities = [1.0] * (clients // 10) + [0.25] * (clients - clients // 10)
            fleet = dbo.submodels.fleet(
                layout, capacities, participants={1.0: 1, 0.25: 9}
            )
            programs[clients] = whole_round(network, fleet, clients, personal=personal)
        times = timed(programs, repeats)
        for clients, program in programs.items():
            yield {
                "y and z": "personal" if personal else "global",
                "clients": clients,
                "present": 10,
                "GFLOP": f"{program.flops() / 1e9:.4f}",
                "of 10 clients'": f"{program.flops() / programs[10].flops():.4f}",
                "MiB": f"{program.temporary() / 2**20:.1f}",
                "ms": quartiles(1e3 * times[clients], 1),
            }


def report(options):
    """Lines of the report, and all rows of costs."""
    networks = {
        f"MLP 784-{'-'.join([str(options.width)] * 3)}-10": perceptron(options.width),
        "CNN 32-64-128, dense 256": convolutional(),
    }
    layers, steps, sizes = [], [], []
    for name, network in networks.items():
        layout = layout_of(network)
        layers += between_rows(name, network, layout)
        local = {case: client_step(network, layout, *case) for case in cases()}
        steps += costs(name, "local step of a client", local, options.repeats)
        programs, sent, gaps = rounds(network, layout)
        found = list(costs(name, f"round of {CLIENTS}", programs, options.repeats))
        for row, case in zip(found, programs, strict=True):
            row["MB up per client"] = f"{sent[case]:.3f}"
            gap = gaps.get(case[0]) if case[1] == "extracted" else None
            row["from masked"] = "" if gap is None else f"{gap:.0e}"
        sizes += found
    mlp = next(iter(networks.values()))
    missing = list(absent_rows(mlp, layout_of(mlp), options.repeats))
    lines = [
        "# What extracted sub-models save",
        "",
        f"{header()}; batches of {BATCH}, {options.repeats} repeats. `of full` is the "
        "share of what full size needs; MiB are temporaries of the compiled program.",
        "",
        "## Between hidden layers, one gradient",
        "",
        *table(layers, 2),
        "",
        "## Local step of a client",
        "",
        *table(without(steps, "what"), 3),
        "",
        f"## Round of {CLIENTS} clients of one capacity",
        "",
        "`from masked` compares how far the two modes have moved the server's x in two "
        "rounds: the largest difference over the largest move.",
        "",
        *table(without(sizes, "what"), 3),
        "",
        "## Clients that are absent",
        "",
        *table(missing),
    ]
    return lines, steps + without(sizes, "MB up per client", "from masked")


def without(rows, *names):
    return [{k: v for k, v in row.items() if k not in names} for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/rabo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines, rows = report(options)
    print(*lines, sep="\n")
    (options.out / "modes.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    write_csv(options.out / "modes.csv", rows)


if __name__ == "__main__":
    main()
