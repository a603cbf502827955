"""What a step of EF-SOBA costs beside one of SOBA and the compressor's own work."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from report import quartiles, table, write_csv

import dbojax as dbo

NODES, INNER, REPEATS, LIMIT = 16, 10, 10, 1.5


def upper(x, y, target):
    return 0.5 * jnp.sum((y - target) ** 2) + 0.05 * jnp.sum(x**2)


def lower(x, y, curvature):
    return 0.5 * jnp.sum(curvature * (y - x) ** 2)


PROBLEM = dbo.Problem(upper, lower)


def compressors():
    c = dbo.compressors
    return {
        "strided_random_k(0.1)": c.strided_random_k(0.1),
        "random_k(0.1)": c.random_k(0.1),
    }


def methods(compressor):
    """The two whose steps are compared."""
    a, mix = dbo.algorithms, dbo.mixing.averaging(NODES)
    steps = {"upper_step": 1e-3, "lower_step": 1e-3}
    return {
        "SOBA": a.soba(PROBLEM, mix=mix, **steps),
        "EF-SOBA": a.ef_soba(
            PROBLEM, mix=mix, upper=compressor, lower=compressor, **steps
        ),
    }


def scanned(body):
    """INNER repeats in one donated program: (carry, data) -> carry."""

    def program(carry, data):
        def one(carry, step):
            key = jax.random.fold_in(jax.random.key(0), step)
            return body(key, carry, data), None

        return jax.lax.scan(one, carry, jnp.arange(INNER))[0]

    return jax.jit(program, donate_argnums=0)


def coding(compressor):
    """Encode and decode three messages of all workers, and nothing else."""

    def body(key, carry, data):
        del data
        values, _ = carry
        out = []
        for index, value in enumerate(values):
            keys = jax.random.split(jax.random.fold_in(key, index), NODES)
            payload = jax.vmap(lambda k, v: compressor.compress(k, v, ())[0])(
                keys, value
            )
            out.append(jax.vmap(compressor.decompress)(payload, value))
        return values, tuple(out)

    return body


def stepping(method):
    return lambda key, state, data: method.step(key, state, data)[0]


def programs(compressor, start, dim):
    """Label -> (program, carry); a copy of one stacked array is the floor."""
    found = {
        label: (stepping(method), method.init(start, start))
        for label, method in methods(compressor).items()
    }
    keys = jax.random.split(jax.random.key(1), 3)
    values = tuple(jax.random.normal(key, (NODES, dim)) for key in keys)
    found["compressor"] = coding(compressor), (values, jax.tree.map(jnp.copy, values))
    found["one pass"] = (lambda key, v, data: v * 1.01), jnp.copy(start)
    return {label: (scanned(body), carry) for label, (body, carry) in found.items()}


def measure(compressor, dim):
    """Label -> seconds per step of each repeat; all programs take turns."""
    keys = jax.random.split(jax.random.key(2), 2)
    target, noise = (jax.random.normal(key, (NODES, dim)) for key in keys)
    data = dbo.Batch(upper=target, lower=1 + 0.5 * jnp.tanh(noise))
    start = jnp.zeros((NODES, dim))
    running, carries, seconds = {}, {}, {}
    for label, (program, carry) in programs(compressor, start, dim).items():
        running[label] = program.lower(carry, data).compile()
        carries[label] = jax.block_until_ready(running[label](carry, data))
        seconds[label] = []
    for _ in range(REPEATS):
        for label, program in running.items():
            begin = time.perf_counter()
            carries[label] = jax.block_until_ready(program(carries[label], data))
            seconds[label].append((time.perf_counter() - begin) / INNER)
    return {label: np.array(found) for label, found in seconds.items()}


def report(options):
    """Measure, write CSV, and return the lines of this part."""
    rows, raw, verdicts = [], [], []
    for name, compressor in compressors().items():
        seconds = measure(compressor, options.dim)
        ratio = seconds["EF-SOBA"] / (seconds["SOBA"] + seconds["compressor"])
        row = {"compressor": name}
        for label, found in seconds.items():
            row[f"{label}, ms"] = quartiles(1e3 * found, 1)
        row["EF-SOBA / (SOBA + compressor)"] = quartiles(ratio, 2)
        rows.append(row)
        verdict = "at most" if np.median(ratio) <= LIMIT else "above"
        verdicts.append(f"{name}: {np.median(ratio):.2f}, {verdict} {LIMIT}")
        raw += [
            {"compressor": name, "program": label, "repeat": i, "seconds": float(s)}
            for label, found in seconds.items()
            for i, s in enumerate(found)
        ]
        print(f"  {verdicts[-1]}", flush=True)
    write_csv(options.out / "step.csv", raw)
    return [
        "## Cost of one step",
        "",
        f"dx = dy = {options.dim}, {NODES} workers, float32; a diagonal quadratic "
        "whose "
        "workers each read data of their own. Compressor: encoding and decoding the "
        "three messages of all workers, nothing else; one pass: multiplying one array "
        f"({NODES}, {options.dim}) by 1.01 in place. Donated scans of {INNER} steps "
        "that "
        f"take turns, blocked on the device, median [quartiles] of {REPEATS}, compile "
        "time apart.",
        "",
        *table(rows),
        "",
        f"{'; '.join(verdicts)}.",
    ]
