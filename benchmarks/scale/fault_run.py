"""C²DFB with top-k reference points on a ring, and a log of what each process does."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

import dbojax as dbo

NODES, ROWS = 8, 16


def log(folder, event, step=-1):
    """Add a line that is there whatever happens next."""
    name = f"log_{os.environ['DBOJAX_PROCESS']}"
    with open(os.path.join(folder, name), "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {event} {step} {time.monotonic()}\n")


def problem():
    """Least squares under a ridge that the upper level learns, entry by entry."""

    def upper(x, y, batch):
        del x
        rows, targets = batch
        return 0.5 * jnp.mean((rows @ y - targets) ** 2)

    def lower(x, y, batch):
        return upper(x, y, batch) + 0.5 * jnp.mean(jnp.exp(x) * y**2)

    return dbo.Problem(upper, lower)


def draws(node, step, entries):
    """What one node sees in one step."""
    rng = np.random.default_rng((node, step))
    rows = rng.standard_normal((2, ROWS, entries), np.float32)
    rows /= np.sqrt(np.float32(entries))
    targets = rng.standard_normal((2, ROWS), np.float32)
    return dbo.Batch(*zip(rows, targets, strict=True))


def runner(case):
    """``go(steps, checkpoint=..., resume=...)`` on all devices of all processes."""
    entries, every, folder = (case[name] for name in ("entries", "every", "folder"))
    mesh = dbo.devices.mesh(NODES)
    weights = dbo.topology.metropolis(dbo.topology.ring(NODES))
    mix = dbo.devices.spread(dbo.mixing.mixer(weights), mesh)
    top = dbo.compressors.top_k(0.01)
    method = dbo.algorithms.c2dfb(
        problem(),
        outer=dbo.channels.exact(mix),
        inner=dbo.channels.reference_point(mix, top, 0.3),
        upper_step=0.1,
        lower_step=0.1,
        inner_steps=3,
    )
    method = method._replace(step=jax.jit(method.step))  # traced once for all runs
    zeros = jnp.zeros(entries, jnp.float32)
    start = dbo.devices.init(method, zeros, zeros, mesh, NODES)

    def batch_at(step):
        if step % every == 0:
            log(folder, "steps", step)
        return dbo.devices.load(lambda node: draws(node, step, entries), NODES, mesh)

    def evaluate(state):
        del state
        log(folder, "checkpoint")
        return {}

    def go(steps, **checkpoint):
        batches, key = dbo.from_host(batch_at), jax.random.key(1)
        more = dict(every=every, evaluate=evaluate, **checkpoint)
        return dbo.run(method, key, start, batches, steps, **more)

    return go


def whole(ended):
    """State and history of a run, by name, without the clock."""
    state, history = ended
    leaves = jax.tree.leaves(process_allgather(state, tiled=True))
    found = {f"leaf {i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    return found | {name: c for name, c in history.items() if name != "seconds"}
