"""One process of a run that may be killed at any moment."""

import json
import sys
from pathlib import Path

import numpy as np
from fault_run import log, runner, whole

import dbojax as dbo

if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    folder = case["folder"]
    log(folder, "start-up")
    dbo.devices.start()
    path = Path(folder) / "run.npz"
    ended = runner(case)(case["steps"], checkpoint=path, resume="auto")
    log(folder, "end", case["steps"])
    found = whole(ended)
    if dbo.devices.is_first():
        np.savez(case["out"], **found)
