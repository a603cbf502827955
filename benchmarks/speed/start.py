"""Lets the scripts of this folder import `environment`, and starts them in one.

    import start

    start.ready()

Standard library only.
"""

import sys
from pathlib import Path


def ready():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from environment import ensure

    ensure(["tasks", "plots"])
