"""Run all tests from a bare checkout: `python3 tests/run.py [pytest's options]`.

Brings its own environment, see `benchmarks/environment.py`. Tests, and doctests of the
package and of the README, run with `pytest`, notebooks with `nbmake`.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A file's tests share compiled programs, cached tasks and fixtures: on one worker.
# Files go out in the order of pyproject.toml, notebooks first; else those of few tests
# come last, long as they may take, and one worker idles.
TOGETHER = ["--dist", "loadfile", "--no-loadscope-reorder"]


def main(options):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from environment import ensure

    ensure(["test"])
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "2", *TOGETHER]
    return subprocess.call([*pytest, *(options or ["--nbmake"])], cwd=ROOT)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
