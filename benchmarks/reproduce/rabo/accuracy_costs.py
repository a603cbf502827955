"""What one local step costs the largest and the smallest client, by XLA's account."""

import jax
import jax.numpy as jnp
from accuracy_methods import BATCH

import dbojax as dbo


def local_step(entry, runs):
    """(kFLOP, KiB of temporary memory) of the directions, largest client first."""
    fleet = entry.fleet_of(runs)
    layout = fleet.layout
    exact = "exact" in entry.method or entry.method in ("SimFBO", "FedNest")
    make = dbo.oracles.soba if exact else dbo.oracles.finite_difference
    oracle = make(runs.problem)
    x, y = (dbo.trees.one_node(v) for v in (runs.x0, runs.y0))
    data = dbo.trees.one_node(dbo.trees.one_node(runs.batch))
    batch = dbo.tasks.samplers.local(BATCH)(jax.random.key(0), data)
    found = []
    for level in (fleet.levels[0], fleet.levels[-1]):
        kept = {name: jnp.arange(k) for name, k in level.kept.items()}

        def cut(labels, tree, kept=kept):
            return dbo.submodels.take(labels, layout.units, tree, kept)

        own = cut(layout.x, x), cut(layout.y, y)
        part = batch if layout.batch is None else cut(layout.batch, batch)
        z, memory = oracle.init(*own)

        def directions(x, y, z, batch, memory=memory):
            return oracle.directions(jax.random.key(0), x, y, z, memory, batch)[0]

        program = jax.jit(directions).lower(*own, z, part).compile()
        flops = program.cost_analysis()["flops"]
        memory_used = program.memory_analysis().temp_size_in_bytes
        found.append((flops / 1e3, memory_used / 1024))
    return found
