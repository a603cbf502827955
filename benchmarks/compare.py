"""Who needs least to the same accuracy? Methods, graphs and data at equal effort.

    python benchmarks/compare.py --short      # two minutes
    python benchmarks/compare.py              # all of it, about an hour on one core
    python benchmarks/compare.py --speed      # one program against one run at a time

The same as `dbojax compare`, in an environment of its own; `--help` lists the options.
"""

from environment import ensure

ensure(["tasks", "run", "plots"])

import sys

import matplotlib

matplotlib.use("Agg")

from compare_speed import speed

from dbojax.cli import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["--speed"]:
        raise SystemExit(speed(sys.argv[2:]))
    raise SystemExit(main(["compare", *sys.argv[1:]]))
