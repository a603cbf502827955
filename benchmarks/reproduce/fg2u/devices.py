"""Forward gradients over several devices: work per device, and what crosses links.

    python benchmarks/reproduce/fg2u/devices.py
    python benchmarks/reproduce/fg2u/devices.py --entries 10000000

x has a million entries by default: one weight per training example. On a CPU the
devices are virtual ones: they show what a compiled program does on each, never speed.
Operations are the program's own count for one device; bytes are those of the arrays in
its collectives.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `environment`

from environment import ensure

ensure([])

import argparse
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import header, table, write_csv

import dbojax as dbo

h = dbo.hypergradients
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


def fit(y, samples, weights=None):
    inputs, targets = samples
    errors = (inputs @ y - targets) ** 2
    return jnp.mean(errors if weights is None else jax.nn.sigmoid(weights) * errors)


problem = dbo.Problem(
    upper=lambda x, y, samples: fit(y, samples),
    lower=lambda x, y, samples: fit(y, samples, x),
)


def data(entries):
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=8)

    def samples(count):
        inputs = rng.normal(size=(count, 8))
        noise = rng.normal(size=count) * (rng.random(count) < 0.3)
        targets = inputs @ slopes + 10 * noise
        return tuple(jnp.asarray(part, jnp.float32) for part in (inputs, targets))

    return dbo.Batch(upper=samples(1000), lower=samples(entries))


def crossing(text):
    """Bytes that the collectives of a compiled program return on one device."""
    pattern = r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-reduce)\("
    return sum(
        WIDTHS[kind] * int(np.prod([int(n) for n in shape.split(",") if n] or [1]))
        for kind, shape in re.findall(pattern, text)
    )


def measure(devices, scalars, options, x, batch):
    mesh = jax.make_mesh(
        (devices,), ("directions",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    hyper = h.forward_gradient(
        problem,
        h.descent(problem, optax.sgd(0.05), options.depth),
        options.directions,
        chunk=options.directions // devices,  # so that no loop hides operations
        over=h.spread(mesh, "directions", scalars=scalars),
    )
    args = jax.random.key(0), x, jnp.zeros(8), (), batch
    program = jax.jit(hyper.estimate).lower(*args).compile()
    jax.block_until_ready(program(*args))
    begin = time.perf_counter()
    gradient, _, _, info = jax.block_until_ready(program(*args))
    seconds = time.perf_counter() - begin
    assert info.ok
    memory = program.memory_analysis().temp_size_in_bytes
    row = {
        "exchanged": "coefficients" if scalars else "one vector",
        "devices": devices,
        "operations": program.cost_analysis()["flops"],
        "bytes received": crossing(program.as_text()),
        "temporary MB": memory / 1e6,
        "seconds": seconds,
    }
    return row, np.asarray(gradient)


def one_pass(options, x, batch):
    """Operations of the upper loss after the inner solver: every device needs them."""
    solve = h.solver(h.descent(problem, optax.sgd(0.05), options.depth))

    def value(x):
        y = solve(jax.random.key(0), x, jnp.zeros(8), batch.lower)
        return problem.upper(x, y, batch.upper)

    return jax.jit(value).lower(x).compile().cost_analysis()["flops"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=1_000_000, help="of x")
    parser.add_argument("--directions", type=int, default=64)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/fg2u"))
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    counts = [n for n in (1, 2, 4, 8) if n <= len(jax.devices())]
    x, batch = jnp.zeros(options.entries), data(options.entries)
    rows, gradients = [], []
    for scalars in (True, False):
        for devices in counts:
            row, gradient = measure(devices, scalars, options, x, batch)
            rows.append(row)
            gradients.append(gradient)
    gap = max(np.abs(g - gradients[0]).max() for g in gradients)
    alone = one_pass(options, x, batch)
    whole = rows[0]["operations"]
    shown = [
        row
        | {
            "operations": f"{row['operations']:.3e}",
            "share": f"{row['operations'] / whole:.3f}",
            "share of the tangents": (
                f"{(row['operations'] - alone) / (whole - alone):.3f}"
            ),
            "temporary MB": f"{row['temporary MB']:.0f}",
            "seconds": f"{row['seconds']:.2f}",
        }
        for row in rows
    ]
    lines = [
        "# Forward gradients over devices",
        "",
        f"{header()}, {jax.device_count()} devices; x of {options.entries} entries, "
        f"b = {options.directions}, T = {options.depth}.",
        "",
        *table(shown),
        "",
        f"Largest difference between any two of the results: {gap:.1e}, where the "
        f"largest entry is {np.abs(gradients[0]).max():.1e}.",
    ]
    print(*lines, sep="\n")
    write_csv(options.out / "devices.csv", rows)
    (options.out / "devices.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
