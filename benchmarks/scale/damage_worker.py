"""One process of runs that find the newer of two checkpoints damaged."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
from fault_run import runner, whole

import dbojax as dbo


def damage(folder, step, rng):
    """Cut a file of the checkpoint at a step, or flip a bit of it."""
    files = [folder / "run.npz", *sorted(folder.glob(f"run.npz.{step}.part-*"))]
    number, flip = int(rng.integers(len(files))), rng.random() < 0.5
    content = bytearray(files[number].read_bytes())
    place = int(rng.integers(len(content)))
    if flip:
        content[place] ^= 1 << int(rng.integers(8))
    files[number].write_bytes(content if flip else content[:place])
    return ["main file", "part"][number > 0], ["truncated", "bit flipped"][flip]


def refusal(go, steps, path):
    """The sentence that a run without resume="auto" stops with."""
    try:
        go(steps, checkpoint=path)
    except ValueError as error:
        return str(error)
    return ""


def warned(go, steps, path):
    """How a run ends that may take the older checkpoint, and what it says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ended = go(steps, checkpoint=path, resume="auto")
    told = [str(found.message) for found in caught]
    return whole(ended), next((text for text in told if "is damaged" in text), "")


def main(case):
    from jax.experimental.multihost_utils import process_allgather, sync_global_devices

    go, every, root = runner(case), case["every"], Path(case["folder"])
    good, folder = root / "good", root / "now"
    good.mkdir(exist_ok=True)
    sync_global_devices("folder")
    go(2 * every, checkpoint=good / "run.npz")
    expected, rng = whole(go(3 * every)), np.random.default_rng(case["seed"])
    for _ in range(case["damages"]):
        kinds = ()
        sync_global_devices("before")
        if dbo.devices.is_first():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good, folder)
            kinds = damage(folder, 2 * every, rng)
        sync_global_devices("damaged")
        refused = refusal(go, 3 * every, folder / "run.npz")
        found, sentence = warned(go, 3 * every, folder / "run.npz")
        same = all(found[k].tobytes() == expected[k].tobytes() for k in expected)
        facts = process_allgather(np.array(["is damaged" in refused, same]))
        older = f"the older one, at step {every}, which" in sentence
        yield [*kinds, *facts.all(0).tolist(), older, refused, sentence]


if __name__ == "__main__":
    dbo.devices.start()
    rows = list(main(json.loads(sys.argv[1])))
    if dbo.devices.is_first():
        print(json.dumps(rows))
