"""What a smaller sub-model saves: operations, bytes, memory and time, measured.

    python benchmarks/reproduce/rabo/modes.py
    python benchmarks/reproduce/rabo/modes.py --width 2048 --repeats 15

A perceptron with three hidden layers and a convolutional network, x all hidden layers
and y the head, on random images of 28 x 28 pixels. Every client has the same capacity,
so that a row tells of that capacity alone. Operations and temporary memory are those of
the compiled program (XLA counts each of its loops as one pass through it), bytes follow
from shapes; times are medians of calls that take turns, blocked on the device,
compilation apart.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure(["tasks"])

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import header, quartiles, table, write_csv

import dbojax as dbo
from dbojax.tasks.networks import halved, instance_norm, patches

CAPACITIES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
CLIENTS, BATCH, RIDGE, STEP = 10, 32, 0.1, 0.01
oracle = functools.partial(dbo.oracles.finite_difference, radius=0.05)


class Network(NamedTuple):
    """Hidden layers and what they are made of; a linear head follows."""

    x: Any
    first: Callable  # (x, images) -> activations of the first hidden layer
    rest: Callable  # (x, activations) -> features, through what lies between


class Program(NamedTuple):
    """A compiled function with its arguments."""

    call: Any
    args: tuple

    def flops(self):
        return self.call.cost_analysis()["flops"]

    def temporary(self):
        return self.call.memory_analysis().temp_size_in_bytes


def compiled(function, *args):
    return Program(jax.jit(function).lower(*args).compile(), args)


def dense(layer, inputs):
    return jax.nn.relu(inputs @ layer["kernel"] + layer["bias"][None])


def block(layer, images):
    bias = layer["bias"][None, None, None]
    images = jax.nn.relu(patches(images) @ layer["kernel"] + bias)
    return halved(instance_norm(layer, images))


def drawn(key, d, width):
    kernel = jax.random.normal(key, (d, width)) * (2 / d) ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros(width)}


def perceptron(width):
    sizes = [(784, width), (width, width), (width, width)]
    keys = jax.random.split(jax.random.key(0), len(sizes))

    def rest(x, hidden):
        return functools.reduce(lambda h, layer: dense(layer, h), x[1:], hidden)

    def first(x, images):
        return dense(x[0], images.reshape(len(images), -1))

    x = [drawn(key, *size) for key, size in zip(keys, sizes, strict=True)]
    return Network(x, first, rest)


def convolutional(widths=(32, 64, 128), features=256):
    channels = [1, *widths]
    keys = jax.random.split(jax.random.key(1), len(channels))

    def conv(key, before, width):
        shape = (1, 1, 1, width)
        norm = {"scale": jnp.ones(shape), "offset": jnp.zeros(shape)}
        return drawn(key, 9 * before, width) | norm

    def rest(x, images):
        for layer in x[1:-1]:
            images = block(layer, images)
        return dense(x[-1], images.reshape(len(images), -1))

    x = [
        conv(*each) for each in zip(keys[:-1], channels[:-1], channels[1:], strict=True)
    ]
    x.append(drawn(keys[-1], 9 * widths[-1], features))  # 3 x 3 pixels are left
    return Network(x, lambda x, images: block(x[0], images), rest)


def head_of(network):
    # Not at zero, where a first step would not move x.
    return drawn(jax.random.key(4), network.x[-1]["kernel"].shape[1], 10)


def logits_of(network, x, y, images):
    hidden = network.rest(x, network.first(x, images))
    return hidden @ y["kernel"] + y["bias"][None]


def problem_of(network):
    def upper(x, y, samples):
        images, labels = samples
        logits = logits_of(network, x, y, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def lower(x, y, samples):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
        return upper(x, y, samples) + RIDGE / 2 * squares

    return dbo.Problem(upper, lower)


def samples(clients):
    keys = jax.random.split(jax.random.key(2), 2)

    def level(key):
        key_images, key_labels = jax.random.split(key)
        shape = (clients, BATCH, 28, 28, 1)
        images = jax.random.uniform(key_images, shape)
        return images, jax.random.randint(key_labels, shape[:2], 0, 10)

    return dbo.Batch(*map(level, keys))


def layout_of(network):
    apply = functools.partial(logits_of, network)
    images = jnp.zeros((2, 28, 28, 1))
    return dbo.submodels.layers(apply, network.x, head_of(network), images)


def held(layout, capacity):
    """The units that one client of a capacity keeps in the first round."""
    alone = dbo.submodels.fleet(layout, [capacity], minimum=0)
    [part] = dbo.submodels.draw(alone, jax.random.key(0), 0)
    return jax.tree.map(lambda units: units[0], part.kept)


def between(network, layout, capacity):
    """One gradient through what lies between hidden layers, and its kernels' bytes."""
    kept = held(layout, capacity)
    x = dbo.submodels.take(layout.x, layout.units, network.x, kept)
    images = samples(1).upper[0][0]
    hidden = jax.eval_shape(network.first, x, images)

    def gradient(x, hidden):
        return jax.grad(lambda *at: jnp.sum(network.rest(*at)), (0, 1))(x, hidden)

    program = compiled(gradient, x, jnp.ones(hidden.shape))
    return program, dbo.trees.nbytes([layer["kernel"] for layer in x[1:]])


def client_step(network, layout, capacity, mode):
    """One local step of one client, which already has its sub-model."""
    problem, kept = problem_of(network), held(layout, capacity)
    labels = layout.x, layout.y, layout.y
    x, y = network.x, head_of(network)
    cut = {
        "extracted": lambda label, v: dbo.submodels.take(label, layout.units, v, kept),
        "masked": lambda label, v: dbo.submodels.masked(label, layout.units, kept, v),
    }[mode]
    held_now = tuple(map(cut, labels, (x, y, y)))

    def step(held_now, batch, kept):
        directions, _ = oracle(problem).directions(None, *held_now, (), batch)
        if mode == "masked":
            hide = functools.partial(dbo.submodels.masked, units=layout.units)
            directions = tuple(
                hide(label, kept=kept, tree=d)
                for label, d in zip(labels, directions, strict=True)
            )
        return jax.tree.map(lambda a, d: a - STEP * d, held_now, directions)

    batch = jax.tree.map(lambda leaf: leaf[0], samples(1))
    return compiled(step, held_now, batch, kept)


def whole_round(network, fleet, clients, **settings):
    """A round of a fleet: draws, local steps, and the server's average."""
    method = dbo.algorithms.federated(
        problem_of(network),
        oracle,
        fleet,
        upper_step=STEP,
        lower_step=STEP,
        radius=10.0,
        **settings,
    )
    x, y = (dbo.replicate(v, 1) for v in (network.x, head_of(network)))
    return compiled(method.step, jax.random.key(3), method.init(x, y), samples(clients))


def timed(programs, repeats):
    """Seconds of each call, in turns; the first of each does not count."""
    times = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program.call(*program.args))
            times[name].append(time.perf_counter() - begin)
    return {name: np.array(values[1:]) for name, values in times.items()}


def two_rounds(program):
    """How far x has moved after the second round, and the second round's metrics.

    In the first z is zero and the differences have nothing to say.
    """
    key, start, batch = program.args
    middle, _ = program.call(*program.args)
    end, metrics = program.call(key, middle, batch)
    return jax.tree.map(jnp.subtract, end.x, start.x), metrics


def difference(found, wanted):
    """Largest difference of two trees, over the largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    gaps = [(float(abs(a - b).max()), float(abs(b).max())) for a, b in pairs]
    return max(gap for gap, _ in gaps) / max(size for _, size in gaps)


def cases():
    """(capacity, mode): at capacity 1 the two modes are one."""
    yield 1.0, "extracted"
    for capacity in CAPACITIES[1:]:
        yield capacity, "masked"
        yield capacity, "extracted"


def costs(name, what, programs, repeats):
    """Rows with operations, temporary memory and seconds, and shares of full size."""
    times = timed(programs, repeats)
    full = programs[1.0, "extracted"]
    base = np.median(times[1.0, "extracted"])
    for (capacity, mode), program in programs.items():
        seconds = times[capacity, mode]
        yield {
            "network": name,
            "what": what,
            "capacity": f"1/{round(1 / capacity)}" if capacity < 1 else "1",
            "mode": mode if capacity < 1 else "full size",
            "GFLOP": f"{program.flops() / 1e9:.3f}",
            "of full": f"{program.flops() / full.flops():.3f}",
            "MiB": f"{program.temporary() / 2**20:.1f}",
            "of full ": f"{program.temporary() / full.temporary():.3f}",
            "ms": quartiles(1e3 * seconds, 1),
            "of full  ": f"{np.median(seconds) / base:.3f}",
        }


def between_rows(name, network, layout):
    full, kernels = between(network, layout, 1.0)
    for capacity in CAPACITIES:
        program, size = between(network, layout, capacity)
        yield {
            "network": name,
            "capacity": f"1/{round(1 / capacity)}" if capacity < 1 else "1",
            "MFLOP": f"{program.flops() / 1e6:.2f}",
            "of full": f"{program.flops() / full.flops():.4f}",
            "kB of kernels": f"{size / 1e3:.1f}",
            "of full ": f"{size / kernels:.4f}",
        }


def rounds(network, layout):
    """Programs of rounds by (capacity, mode), bytes up, and how far modes differ."""
    programs, ends = {}, {}
    for capacity, mode in cases():
        fleet = dbo.submodels.fleet(layout, [capacity] * CLIENTS, minimum=0)
        program = whole_round(network, fleet, CLIENTS, extracted=mode == "extracted")
        programs[capacity, mode] = program
        ends[capacity, mode] = two_rounds(program)
    sent = {case: metrics.traffic.message / 1e6 for case, (_, metrics) in ends.items()}
    gaps = {
        capacity: difference(
            ends[capacity, "extracted"][0], ends[capacity, "masked"][0]
        )
        for capacity in CAPACITIES[1:]
    }
    return programs, sent, gaps


def absent_rows(network, layout, repeats):
    """Ten clients of ten against ten of a hundred: one full, nine of a quarter."""
    for personal in (False, True):
        programs = {}
        for clients in (10, 100):
            capacities = [1.0] * (clients // 10) + [0.25] * (clients - clients // 10)
            fleet = dbo.submodels.fleet(
                layout, capacities, participants={1.0: 1, 0.25: 9}
            )
            programs[clients] = whole_round(network, fleet, clients, personal=personal)
        times = timed(programs, repeats)
        for clients, program in programs.items():
            yield {
                "y and z": "personal" if personal else "global",
                "clients": clients,
                "present": 10,
                "GFLOP": f"{program.flops() / 1e9:.4f}",
                "of 10 clients'": f"{program.flops() / programs[10].flops():.4f}",
                "MiB": f"{program.temporary() / 2**20:.1f}",
                "ms": quartiles(1e3 * times[clients], 1),
            }


def report(options):
    """Lines of the report, and all rows of costs."""
    networks = {
        f"MLP 784-{'-'.join([str(options.width)] * 3)}-10": perceptron(options.width),
        "CNN 32-64-128, dense 256": convolutional(),
    }
    layers, steps, sizes = [], [], []
    for name, network in networks.items():
        layout = layout_of(network)
        layers += between_rows(name, network, layout)
        local = {case: client_step(network, layout, *case) for case in cases()}
        steps += costs(name, "local step of a client", local, options.repeats)
        programs, sent, gaps = rounds(network, layout)
        found = list(costs(name, f"round of {CLIENTS}", programs, options.repeats))
        for row, case in zip(found, programs, strict=True):
            row["MB up per client"] = f"{sent[case]:.3f}"
            gap = gaps.get(case[0]) if case[1] == "extracted" else None
            row["from masked"] = "" if gap is None else f"{gap:.0e}"
        sizes += found
    mlp = next(iter(networks.values()))
    missing = list(absent_rows(mlp, layout_of(mlp), options.repeats))
    lines = [
        "# What extracted sub-models save",
        "",
        f"{header()}; batches of {BATCH}, {options.repeats} repeats. `of full` is the "
        "share of what full size needs; MiB are temporaries of the compiled program.",
        "",
        "## Between hidden layers, one gradient",
        "",
        *table(layers, 2),
        "",
        "## Local step of a client",
        "",
        *table(without(steps, "what"), 3),
        "",
        f"## Round of {CLIENTS} clients of one capacity",
        "",
        "`from masked` compares how far the two modes have moved the server's x in two "
        "rounds: the largest difference over the largest move.",
        "",
        *table(without(sizes, "what"), 3),
        "",
        "## Clients that are absent",
        "",
        *table(missing),
    ]
    return lines, steps + without(sizes, "MB up per client", "from masked")


def without(rows, *names):
    return [{k: v for k, v in row.items() if k not in names} for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/rabo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines, rows = report(options)
    print(*lines, sep="\n")
    (options.out / "modes.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    write_csv(options.out / "modes.csv", rows)


if __name__ == "__main__":
    main()
