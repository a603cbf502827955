"""One process of a large problem: what it holds at most."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

import dbojax as dbo

BATCH = 8  # samples in a minibatch


def peak():
    """MiB that this process has held at most."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("No VmHWM in /proc/self/status.")


def problem():
    """Least squares under a ridge that the upper level learns, entry by entry."""

    def loss(y, samples):
        return 0.5 * jnp.mean((samples.inputs @ y - samples.labels) ** 2)

    def lower(x, y, samples):
        return loss(y, samples) + 0.5 * jnp.mean(jnp.exp(x) * y**2)

    return dbo.Problem(lambda x, y, samples: loss(y, samples), lower)


def method(nodes, mesh):
    weights = dbo.topology.metropolis(dbo.topology.ring(nodes))
    mix = dbo.devices.spread(dbo.mixing.mixer(weights), mesh)
    top = dbo.compressors.block_top_k(0.01)
    return dbo.algorithms.c2dfb(
        problem(),
        outer=dbo.channels.exact(mix),
        inner=dbo.channels.reference_point(mix, top, 0.3),
        upper_step=0.1,
        lower_step=0.1,
        inner_steps=2,
    )


def read(node, rows, entries):
    """What one node has, as it would come from a file."""
    rng = np.random.default_rng(node)

    def samples():
        inputs = rng.random((rows, entries), np.float32)
        inputs /= np.sqrt(np.float32(entries))
        labels, mask = rng.random(rows, np.float32), np.ones(rows, bool)
        return dbo.tasks.data.Samples(inputs, labels, mask)

    return dbo.Batch(samples(), samples())


def gib(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**30


def ran(case, found):
    """Load, start and run; peaks go into ``found``. Sizes of data and state in GiB."""
    nodes, entries = case["nodes"], case["entries"]
    mesh = dbo.devices.mesh(nodes)
    data = dbo.devices.load(lambda i: read(i, case["rows"], entries), nodes, mesh)
    found["loaded"] = peak()
    c2dfb, zeros = method(nodes, mesh), jnp.zeros(entries, jnp.float32)
    draws = [dbo.tasks.samplers.minibatches(level, BATCH) for level in data]
    state, _ = dbo.run(
        c2dfb,
        jax.random.key(0),
        dbo.devices.init(c2dfb, zeros, zeros, mesh, nodes),  # and nobody keeps it
        dbo.tasks.samplers.paired(*draws),
        case["steps"],
        every=case["steps"],
        checkpoint=case["checkpoint"],
    )
    found["ran"] = peak()
    return {"data": gib(data), "state": gib(state)}


def main(case):
    jnp.zeros(1).block_until_ready()
    found = {"idle": peak()}
    sizes = ran(case, found) if case["nodes"] else {}
    peaks = process_allgather(np.array([*found.values()])).reshape(-1, len(found))
    return sizes | dict(zip(found, peaks.max(0).tolist(), strict=True))


if __name__ == "__main__":
    dbo.devices.start()
    found = main(json.loads(sys.argv[1]))
    if dbo.devices.is_first():
        print(json.dumps(found))
