"""What an exchange would take on many hosts, by the model that `bandwidth.py` checks.

    python benchmarks/scale/model.py
    python benchmarks/scale/model.py --hosts 1000 --gbit 10 --latency 50e-6

On paper: no host is started. A host sends to its k neighbours one after the other and
hears as many at the same time,

    seconds = work + k (latency + bytes / bandwidth),

with one node on a host and the work of an exchange, encoding and mixing included,
measured here without a link. The mean by a ring all-reduce of dense values takes
2 (n - 1) (latency + bytes / n / bandwidth). An exchange over a graph brings nodes
closer by its spectral gap; how many bring disagreement down to a thousandth is shown
for exact messages.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `environment`

from environment import ensure

ensure([])

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from exchanges import COMPRESSORS, channel
from report import header, table, write_csv

import dbojax as dbo

T = dbo.topology
GRAPHS = {
    "ring": lambda n: T.metropolis(T.ring(n)),
    "torus": lambda n: T.metropolis(T.torus(n // divisor(n), divisor(n))),
    "exponential": lambda n: T.uniform(T.exponential(n)),
}
TRIPS = 4
NAMES = ("dense", "block top-k 1 %", "sign", "QSGD, 4 bits")


def divisor(n):
    """The largest up to the root."""
    return max(k for k in range(1, math.isqrt(n) + 1) if n % k == 0)


def work(name, entries, neighbours):
    """Seconds that a node computes for an exchange: those of many, shared out."""
    n = neighbours + 2
    w = sum(np.roll(np.eye(n), k, axis=1) for k in range(neighbours + 1))
    mesh = dbo.devices.mesh(n, devices=jax.devices()[:1])
    mix = dbo.devices.spread(dbo.mixing.neighbours(w / (neighbours + 1)), mesh)
    exchange = channel(name, mix)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry):
        def body(carry, key):
            return exchange.send(key, *carry)[:2], None

        return jax.lax.scan(body, carry, jax.random.split(jax.random.key(0), TRIPS))[0]

    v = jax.random.normal(jax.random.key(1), (n, entries), jnp.float32)
    carry = run((v, jax.jit(exchange.init)(v)))
    seconds = []
    for _ in range(5):
        jax.block_until_ready(carry)
        start = time.perf_counter()
        carry = jax.block_until_ready(run(carry))
        seconds.append((time.perf_counter() - start) / TRIPS / n)
    return float(np.median(seconds))


def bytes_of(name, entries):
    compressor = COMPRESSORS[name] or dbo.compressors.identity()
    like = jax.ShapeDtypeStruct((entries,), jnp.float32)
    compress = compressor.compress
    payload, _ = jax.eval_shape(
        lambda key, v: compress(key, v, compressor.init(v)), jax.random.key(0), like
    )
    return dbo.trees.nbytes(payload)


def rows(entries, options):
    n, latency = options.hosts, options.latency
    bandwidth = options.gbit * 1e9 / 8
    dense = 4 * entries
    reduce = 2 * (n - 1) * (latency + dense / n / bandwidth)
    yield {
        "entries": entries,
        "graph": "all-reduce of the mean",
        "message": "dense",
        "neighbours": "-",
        "gap": "1",
        "exchanges to 1e-3": 1,
        "MB out of a host": f"{2 * (n - 1) / n * dense / 1e6:.3f}",
        "work, ms": "-",
        "link, ms": f"{1e3 * reduce:.2f}",
        "ms": f"{1e3 * reduce:.2f}",
    }
    for graph, make in GRAPHS.items():
        w = make(n)
        gap, k = T.spectral_gap(w), int(np.count_nonzero(w[0])) - 1
        for name in NAMES:
            sent = bytes_of(name, entries)
            link, busy = k * (latency + sent / bandwidth), work(name, entries, k)
            rounds = math.ceil(math.log(1e-3) / math.log1p(-gap)) if gap < 1 else 1
            yield {
                "entries": entries,
                "graph": graph,
                "message": name,
                "neighbours": k,
                "gap": f"{gap:.2g}",
                "exchanges to 1e-3": rounds if name == "dense" else "-",
                "MB out of a host": f"{k * sent / 1e6:.3f}",
                "work, ms": f"{1e3 * busy:.2f}",
                "link, ms": f"{1e3 * link:.2f}",
                "ms": f"{1e3 * (busy + link):.2f}",
            }


def main(options):
    found = [row for entries in options.entries for row in rows(entries, options)]
    print(header())
    print(f"{options.hosts} hosts, {options.gbit} Gbit/s, {options.latency:g} s\n")
    print("\n".join(table(found, left=3)))
    write_csv(options.out / "scale_model.csv", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--hosts", type=int, default=1000)
    add("--gbit", type=float, default=1.0)
    add("--latency", type=float, default=100e-6)
    add("--entries", type=int, nargs="+", default=[1_000_000])
    add("--out", type=Path, default=Path("results"))
    main(parser.parse_args())
