"""dbojax beside what a user would take instead, on identical arrays in one run.

    python benchmarks/peers/run.py            # all four parts, a few minutes
    python benchmarks/peers/run.py --only hypergradients --repeats 30
    python benchmarks/peers/run.py --only solvers --benchopt PATH

`hypergradients`: jaxopt, optimistix, PyTorch alone, torchopt, betty-ml, boat-torch and
higher on the digits problem. `solvers`: SOBA, SABA, stocBiO and MRBO beside JAX by
hand, and beside those of a checkout of github.com/benchopt/benchmark_bilevel at PATH,
on logistic regression and on that benchmark's quadratics.
`loop`: CD-Adam beside a plain data-parallel loop of optax. `simulator`: decentralised
rounds beside NumPy loops over nodes. Peers that are not installed are left out with a
line; `pip install -e ".[peers]"` brings those that install together. All take turns,
each call is blocked on its device, compile time is apart.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure(["tasks"])

import argparse
import importlib
import os

PARTS = {
    "hypergradients": ("families", "Hypergradients"),
    "solvers": ("iterations", "Solvers"),
    "loop": ("loop", "Data-parallel loop"),
    "simulator": ("rounds", "Decentralised rounds"),
}
LEFT = {"solvers": 4}  # columns of words at the left of a table, where not two


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--benchopt", type=Path, help="checkout of benchmark_bilevel")
    parser.add_argument("--threads", type=int, help="cores for all contenders")
    parser.add_argument("--out", type=Path, default=Path("results"), help="for CSV")
    parser.add_argument("--markdown", type=Path, help="puts the tables into a page")
    return parser.parse_args()


def main():
    options = parsed()
    if options.threads:  # before JAX is imported, which takes the cores it finds
        cores = sorted(os.sched_getaffinity(0))[: options.threads]
        os.sched_setaffinity(0, cores)
    import turns
    from report import header, insert, table, write_csv

    most = f"at most {options.repeats} turns, fewer of slow calls"
    lines = [f"{header()}; {turns.threads()} used, {most}, float32."]
    for name in options.only:
        module, title = PARTS[name]
        part = importlib.import_module(module)
        extra = {"benchopt": options.benchopt} if name == "solvers" else {}
        found = []
        for row in part.rows(options.repeats, **extra):
            found.append(row)
            print(*row.values(), sep=", ", file=sys.stderr, flush=True)
        write_csv(
            options.out / f"peers_{name}.csv", [r | turns.machine() for r in found]
        )
        lines += ["", f"## {title}", "", *table(found, left=LEFT.get(name, 2))]
        print("\n".join(lines[-len(found) - 5 :]), flush=True)
    if options.markdown:
        insert(options.markdown, "dbojax beside what a user would take instead", lines)


if __name__ == "__main__":
    main()
