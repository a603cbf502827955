"""Peak memory of each process of one problem, against the number of processes.

    python benchmarks/scale/memory.py --gib 8    # some minutes; needs 12 GiB in all
    python benchmarks/scale/memory.py --short    # 1/16 of that

Data and state of 32 nodes, seven parts to one. Each process reads its own nodes' data
(`dbo.devices.load`), starts C²DFB with top-k messages on a ring (`dbo.devices.init`),
takes some steps on minibatches (`dbo.run`) and writes its part of a checkpoint. Shown
is the largest peak of a process, which the kernel calls VmHWM. Linux only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure([])

import argparse
import tempfile

from hosts import launched
from report import header, table, write_csv

NODES, ROWS, STEPS = 32, 96, 2
STATE = 26  # vectors of a node in the state of C²DFB


def measured(gib, processes, folder):
    """Sizes in GiB and peaks in MiB, after each stage."""
    entries = int(gib * 2**30 / 4 / NODES / (2 * ROWS + STATE))
    case = {"nodes": NODES if gib else 0, "entries": entries, "rows": ROWS}
    case |= {"steps": STEPS, "checkpoint": str(folder / f"{gib} {processes}.npz")}
    return launched(case, processes, worker="memory_worker.py")


def rows(options, folder):
    """Lines of the table; a column "x processes" is constant where memory is shared."""
    idle, small = measured(0, 1, folder), measured(options.gib / 1000, 1, folder)
    floors = idle["idle"], small["ran"]
    yield line("JAX imported, nothing else", 1, {"ran": idle["idle"]}, floors)
    yield line("1/1000 of the entries", 1, small, floors)
    for processes in options.processes:
        case = measured(options.gib, processes, folder)
        name = f"{case['data'] + case['state']:.2f} GiB of data and state"
        yield line(name, processes, case, floors)


def line(name, processes, case, floors):
    over = [processes * (case["ran"] - floor) for floor in floors]
    return {
        "problem": name,
        "processes": processes,
        "MiB after loading": f"{case['loaded']:.0f}" if "loaded" in case else "",
        "MiB at the end": f"{case['ran']:.0f}",
        "over JAX alone, x processes": f"{over[0]:.0f}",
        "over 1/1000, x processes": f"{over[1]:.0f}" if over[1] > 0 else "",
    }


def main(options):
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        lines = list(rows(options, Path(name)))
    print("\n".join([header(), "", *table(lines)]))
    write_csv(options.out / "scale_memory.csv", lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gib", type=float, default=8)
    add("--processes", type=int, nargs="+", default=[1, 2, 4])
    add("--short", action="store_true")
    add("--folder", type=Path, help="where checkpoints go; by default a temporary one")
    add("--out", type=Path, default=Path("results"))
    found = parser.parse_args()
    if found.short:
        found.gib = 0.5
    main(found)
