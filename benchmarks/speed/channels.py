"""Channels: one exchange of all nodes, encoding included, against copying the values.

    python benchmarks/speed/channels.py

Every node sends its vector and holds what comes of it, which it sends next time; the
memories of the channel are part of the loop. Three arrays may not fit into a cache that
holds the one that is copied: `of its arrays` is against a copy of all that the round
reads and writes, per array.
"""

import start

start.ready()

import floors
import jax
import numpy as np
from records import copy_row, normal, power
from steps import floats

import dbojax as dbo

c, ch = dbo.compressors, dbo.channels
NODES, LENGTH = 64, 100_000
GAMMA = 0.1
BOUNDED = {2: 9, 12: 12}  # neighbours -> most floors of a round with block top-k 1 %
BLOCK = "reference_point, block_top_k(0.01)"


def over_graph(mix):
    """Label -> channel over the links of a fixed graph."""
    contractions = {
        "block_top_k(0.01)": c.block_top_k(0.01),
        "block_top_k(0.1)": c.block_top_k(0.1),
        "top_k(0.01)": c.top_k(0.01),
        "scaled(random_k(0.01))": c.scaled(c.random_k(0.01)),
        "sign": c.sign(),
        "scaled(qsgd(7))": c.scaled(c.qsgd(7)),
    }
    found = {"exact": ch.exact(mix), "exact, gamma=0.1": ch.exact(mix, GAMMA)}
    for name, part in contractions.items():
        found[f"reference_point, {name}"] = ch.reference_point(mix, part, GAMMA)
    part = c.block_top_k(0.01)
    found["error_feedback, block_top_k(0.01)"] = ch.error_feedback(mix, part, GAMMA)
    return found


def over_changing(w):
    network, part = dbo.networks.lossy(dbo.networks.fixed(w), 0.2), c.block_top_k(0.01)
    return {
        "changing, a fifth lost": ch.changing(network, GAMMA),
        "changing_reference_point, block_top_k(0.01)": ch.changing_reference_point(
            network, part, GAMMA
        ),
    }


def over_server(mix):
    block, share = c.block_top_k(0.01), c.random_k(0.01)
    return {
        "server, dense": ch.server(mix),
        "server, random_k(0.01)": ch.server(mix, share),
        "ef14, block_top_k(0.01)": ch.ef14(mix, block),
        "ef21, block_top_k(0.01)": ch.ef21(mix, block),
        "two_way, block_top_k(0.01)": ch.two_way(mix, block),
        "diana, random_k(0.01)": ch.diana(mix, share),
    }


def contenders(options):
    """(label, neighbours or None for a server) -> channel."""
    t, found = dbo.topology, {}
    for neighbours in BOUNDED:
        w = t.metropolis(t.ring(NODES, neighbours // 2))
        parts = over_graph(dbo.mixing.mixer(w))
        if not options.short:
            # At 12 neighbours its copies, two per link, fill 600 MB.
            parts |= over_changing(w) if neighbours == 2 else {}
        found |= {(name, neighbours): part for name, part in parts.items()}
    if options.short:
        return {at: part for at, part in found.items() if at[0] in ("exact", BLOCK)}
    server = over_server(dbo.mixing.averaging(NODES))
    return found | {(name, None): part for name, part in server.items()}


def exchange(channel, key):
    """What the nodes hold is what they send next: ``((v, state), i)``."""

    def step(carry, i):
        held, state, _ = channel.send(jax.random.fold_in(key, i), *carry)
        return held, state

    return step


def message(channel, v):
    """Bytes of a node's message."""
    found = {}

    def send(v):
        _, _, found["traffic"] = channel.send(jax.random.key(0), v, channel.init(v))

    jax.eval_shape(send, v)
    return found["traffic"].message


def rows(options):
    key, v = jax.random.key(1), normal(NODES, LENGTH)
    parts = contenders(options)
    steps = {
        at: (exchange(part, key), (v, jax.jit(part.init)(0 * v)))
        for at, part in parts.items()
    }
    copies = {
        at: (floors.copy_step, floats(steps[at][1])) for at in steps if at[0] == BLOCK
    }
    measured = {**steps, **{("copy", *at): parts for at, parts in copies.items()}}
    found = floors.against_floor(measured, v, options.turns, options.budget(30))
    size, lines = f"n={NODES}, d={power(LENGTH)}", []
    for (name, neighbours), part in parts.items():
        where = "server" if neighbours is None else f"{neighbours} neighbours"
        case, at = f"{name}, {where}, {size}", (name, neighbours)
        line = copy_row("channels", case, found, at)
        line |= {"channel": name, "nodes": NODES, "length": LENGTH}
        line["degree"] = neighbours
        line["message bytes"] = message(part, v)
        if at in copies:
            arrays = dbo.trees.nbytes(copies[at][1]) / v.nbytes
            whole = found["copy", *at][2] / arrays
            line["of its arrays"] = float(np.median(found[at][2] / whole))
        lines.append(line)
    return lines


if __name__ == "__main__":
    import run

    raise SystemExit(run.alone("channels"))
