"""Compressors: encode, decode and add, against copying the vectors.

    python benchmarks/speed/compressors.py

In place, as memories of channels are kept. Bytes are those of the message's arrays;
the error is |C(v) - v|^2 / |v|^2 on Gaussian entries, beside the law that the
compressor declares.
"""

import start

start.ready()

import floors
import jax
import jax.numpy as jnp
import numpy as np
from records import copy_row, normal, power

import dbojax as dbo

c = dbo.compressors
SIZES = [(16, 10_000), (64, 100_000), (4, 1_000_000), (1, 10_000_000)]
SHARES = [0.001, 0.01, 0.1]
SPARSE = {
    "top_k": c.top_k,
    "block_top_k": c.block_top_k,
    "random_k": c.random_k,
    "strided_random_k": c.strided_random_k,
    "chunked_top_k": c.chunked_top_k,
}
# Families whose round trip is to cost at most four copies.
BOUNDED = ("random_k", "strided_random_k", "block_top_k", "sign", "qsgd")


def contenders(d):
    """Label -> compressor of vectors of length d."""
    rows = 10 ** (len(str(d)) // 2)
    threefry = {"uniform": jax.random.uniform}
    sparse = {
        f"{name}({share:g})": make(share)
        for name, make in SPARSE.items()
        for share in SHARES
    }
    return sparse | {
        "scaled(random_k(0.01))": c.scaled(c.random_k(0.01)),
        "composed(block_top_k(0.01), qsgd(7))": c.composed(
            c.block_top_k(0.01), c.qsgd(7)
        ),
        "multi_step(random_k(0.01), 2)": c.multi_step(c.random_k(0.01), 2),
        "low_rank(4)": c.low_rank(4, (rows, d // rows)),
        "identity": c.identity(),
        "sign": c.sign(),
        "qsgd(1)": c.qsgd(1),
        "qsgd(7)": c.qsgd(7),
        "qsgd(127)": c.qsgd(127),
        "natural": c.natural(),
        "int8": c.int8(),
        "cast(float16)": c.cast(jnp.float16),
        "cast(bfloat16)": c.cast(jnp.bfloat16),
        "qsgd(7), threefry": c.qsgd(7, **threefry),
        "natural, threefry": c.natural(**threefry),
        "int8, threefry": c.int8(**threefry),
    }


# Exact top-k -> how much faster than `lax.top_k` at 10 % of a million entries.
FASTER = {"top_k(0.1)": 2.5, "keep_largest(0.1)": 5}


def plain_top_k(share):
    """The sparsifier that a user would write: `jax.lax.top_k` and a scatter."""

    def step(v, i):
        del i
        k = round(share * v.shape[1])

        def one(v):
            _, at = jax.lax.top_k(jnp.abs(v), k)
            return v.at[at].add(0.01 * v[at], unique_indices=True)

        return jax.vmap(one)(v)

    return step


def masked(share):
    """The dense form of exact top-k, for simulations."""

    def step(v, i):
        del i
        k = round(share * v.shape[1])
        return v + 0.01 * jax.vmap(lambda v: c.keep_largest(v, k))(v)

    return step


def message(compressor, v):
    """Bytes of one message, from its arrays."""
    one = jax.ShapeDtypeStruct(v.shape[1:], v.dtype)
    state = jax.eval_shape(compressor.init, one)
    payload, _ = jax.eval_shape(compressor.compress, jax.random.key(0), one, state)
    return dbo.trees.nbytes(payload)


def errors(parts, v):
    """Label -> |C(v) - v|^2 / |v|^2 on average over some nodes."""

    def one(compressor, key, v):
        payload, _ = compressor.compress(key, v, compressor.init(v))
        gap = compressor.decompress(payload, v) - v
        return jnp.vdot(gap, gap) / jnp.vdot(v, v)

    @jax.jit
    def all_of_them(key, v):
        return {label: one(part, key, v) for label, part in parts.items()}

    keys = jax.random.split(jax.random.key(2), min(4, len(v)))
    found = [all_of_them(key, v[i]) for i, key in enumerate(keys)]
    return jax.tree.map(lambda *values: float(np.mean(values)), *found)


def law(compressor, d):
    """The most that the error may be on average; empty where none is declared."""
    if compressor.delta is not None:
        return 1 - compressor.delta(d)
    return compressor.omega(d) if compressor.omega is not None else ""


def measure(n, d, options):
    key, v = jax.random.key(1), normal(n, d)
    parts = contenders(d)
    if options.short:
        parts = {name: parts[name] for name in parts if "threefry" not in name}
    steps = {name: floors.round_trip(part, key, v) for name, part in parts.items()}
    for share in SHARES:
        if share * d < 5e5:  # beyond that, half a minute for a figure
            steps[f"lax.top_k({share:g})"] = plain_top_k(share), v
        steps[f"keep_largest({share:g})"] = masked(share), v
    found = floors.against_floor(steps, v, options.turns, options.budget(15))
    size, gaps = f"n={n}, d={power(d)}", errors(parts, v)
    for label in steps:
        line = copy_row("compressors", f"{label}, {size}", found, label)
        line |= {"nodes": n, "length": d, "compressor": label}
        share = label.partition("(")[2]
        plain = found.get(f"lax.top_k({share}", [None] * 3)[2]
        if label.startswith(("top_k", "keep_largest")) and plain is not None:
            line["lax.top_k / this"] = float(np.median(plain / found[label][2]))
        if label in parts:
            line["message bytes"] = message(parts[label], v)
            line["error"] = gaps[label]
            line["law"] = law(parts[label], d)
        yield line


def rows(options):
    sizes = SIZES[:1] if options.short else SIZES
    return [line for n, d in sizes for line in measure(n, d, options)]


if __name__ == "__main__":
    import run

    raise SystemExit(run.alone("compressors"))
