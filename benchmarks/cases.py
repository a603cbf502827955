"""Cases that run in processes of their own and print what they found as JSON."""

import json
import os
import subprocess
import sys


def printed(command, case):
    """The last line of what a command prints, started with the paths of this script."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    found = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"This case ended with status {found.returncode}: {case}")
    return json.loads(found.stdout.splitlines()[-1])
