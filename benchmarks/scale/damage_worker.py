"""One process of runs that find the newer of two checkpoints damaged."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
from fault_run import runner, whole
from jax.experimental.multihost_utils import process_allgather, sync_global_devices

import dbojax as dbo


def state(ended):
    """Bits of all leaves; sums over nodes in the history depend on the layout."""
    leaves = whole(ended).items()
    return [np.frombuffer(v.tobytes(), "u1") for k, v in leaves if k[:4] == "leaf"]


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
    return state(ended), next((text for text in told if "is damaged" in text), "")


def main(case):
    go, every, root = runner(case), case["every"], Path(case["folder"])
    good, folder = Path(case["good"]), root / "now"
    expected, rng = state(go(3 * every)), np.random.default_rng(case["seed"])
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
        same = all(map(np.array_equal, found, expected))
        facts = process_allgather(
            np.array(["is damaged" in refused, same]), tiled=False
        )
        older = f"the older one, at step {every}, which" in sentence
        yield [*kinds, *facts.all(0).tolist(), older, refused, sentence]


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    # All runs have the same program, and nearly all their time goes into compiling it.
    jax.config.update("jax_compilation_cache_dir", case["folder"] + "/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    dbo.devices.start()
    rows = list(main(case))
    if dbo.devices.is_first():
        print(json.dumps(rows))
