"""One process of a few steps of the named algorithms, or of all of them.

dbojax launch -n 2 --devices 4 tests/everywhere_worker.py OUT.npz [NAMES]
"""

import sys

import everywhere
import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

import dbojax as dbo


def ends(names):
    """State and metrics of each, gathered, by name and number of the leaf."""
    mesh = dbo.devices.mesh(everywhere.N)
    methods = everywhere.methods(lambda part: dbo.devices.spread(part, mesh))
    found = {}
    for name in names or methods:
        end = everywhere.end(*methods[name], everywhere.batch(name), mesh)
        leaves = jax.tree.leaves(process_allgather(end, tiled=True))
        found |= {f"{name} {i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    dbo.devices.start()
    out, *names = sys.argv[1:]
    found = ends(names)
    if dbo.devices.is_first():
        np.savez(out, **found)
