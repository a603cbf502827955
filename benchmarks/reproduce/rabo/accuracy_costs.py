"""What one local step costs the largest and the smallest client, by XLA's account."""

import jax
import numpy as np
from accuracy_methods import BATCH

import dbojax as dbo


def local_step(entry, runs):
    """(kFLOP, KiB of temporary memory) of the directions, largest client first."""
    fleet = entry.fleet_of(runs)
    layout = fleet.layout
    exact = "exact" in entry.method or entry.method in ("SimFBO", "FedNest")
    make = dbo.oracles.soba if exact else dbo.oracles.finite_difference
    oracle = make(runs.problem)
    cut = dbo.submodels.take
    draw, key = dbo.tasks.samplers.local(BATCH), jax.random.key(0)
    x, y = (dbo.trees.one_node(v) for v in (runs.x0, runs.y0))
    data = dbo.trees.one_node(dbo.trees.one_node(runs.batch))
    found = []
    for level in (fleet.levels[0], fleet.levels[-1]):
        kept = {name: np.arange(k) for name, k in level.kept.items()}

        def held(x, y, data, kept=kept):
            batch = draw(key, data)
            if layout.batch is not None:
                batch = cut(layout.batch, layout.units, batch, kept)
            own = [
                cut(labels, layout.units, tree, kept)
                for labels, tree in ((layout.x, x), (layout.y, y))
            ]
            return *own, batch

        def directions(x, y, z, batch):
            return oracle.directions(key, x, y, z, (), batch)[0]

        x_own, y_own, batch = jax.eval_shape(held, x, y, data)
        z, _ = jax.eval_shape(oracle.init, x_own, y_own)
        program = jax.jit(directions).lower(x_own, y_own, z, batch).compile()
        flops = program.cost_analysis()["flops"]
        found.append((flops / 1e3, program.memory_analysis().temp_size_in_bytes / 1024))
    return found
