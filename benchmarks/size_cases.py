"""One case of size.py, in a process of its own: its peak of memory is its own.

    python benchmarks/size_cases.py '{"kind": "network", "graph": "ring", ...}'

prints one line of JSON. `size.py` knows the cases and starts them.
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dbojax as dbo

COMPRESSORS = {
    "dense": None,
    "block top-20 %": dbo.compressors.block_top_k(0.2),
    "top-20 %": dbo.compressors.top_k(0.2),
    "block top-1 %": dbo.compressors.block_top_k(0.01),
    "sign": dbo.compressors.sign(),
}
PENALTY = 10.0


def peak():
    """Most memory this process ever held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # a child inherits the `ru_maxrss` of what started it
        line = next(x for x in status.read_text().splitlines() if "VmHWM" in x)
        return 1024 * int(line.split()[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def method_of(case, problem, mix):
    c = dbo.channels
    compressor = COMPRESSORS[case["compressor"]]
    inner = (
        c.exact(mix, gamma=case["gamma"])
        if compressor is None
        else c.reference_point(mix, compressor, gamma=case["gamma"])
    )
    return dbo.algorithms.c2dfb(
        problem,
        outer=c.exact(mix, gamma=0.6),
        inner=inner,
        upper_step=case["upper_step"],
        lower_step=case["lower_step"],
        penalty=PENALTY,
        inner_steps=case["inner_steps"],
    )


def text(case):
    """C²DFB on the sparse stand-in of 20 Newsgroups: (method, start, batch, judge)."""
    dataset = dbo.tasks.sparse_text(case["documents"], case["features"])
    shards = dbo.tasks.sparse.distribute(dataset, n=case["nodes"])
    task = dbo.tasks.sparse_coefficient_tuning(shards)
    graph = dbo.topology.metropolis(dbo.topology.ring(case["nodes"]))
    method = method_of(case, task.problem, dbo.mixing.mixer(graph))
    return method, (task.x0, task.y0), task.batch, task.evaluate


def diagonal(n, d):
    """Quadratics whose curvature is a vector per node, and the exact hypergradient.

    g_i = y'(a_i y) / 2 - y'(x + c_i), f_i = |y - t_i|^2 / 2 + 0.05 |x|^2.
    """

    def lower(x, y, batch):
        return 0.5 * jnp.vdot(batch["a"] * y, y) - jnp.vdot(y, x + batch["c"])

    def upper(x, y, batch):
        return 0.5 * jnp.sum((y - batch["t"]) ** 2) + 0.05 * jnp.vdot(x, x)

    @jax.jit
    def draw(key):
        shared, *keys = jax.random.split(key, 4)
        c, t = 3 * jax.random.normal(shared, (2, 1, d))
        noise = [jax.random.normal(key, (n, d)) for key in keys[1:]]
        a = 0.5 + jax.random.uniform(keys[0], (n, d))
        return {"a": a, "c": c + noise[0], "t": t + noise[1]}

    batch = draw(jax.random.key(0))
    mean = dbo.node_mean(batch)

    @jax.jit
    def slope(x):
        x = dbo.node_mean(x)
        solution = (x + mean["c"]) / mean["a"]
        return jnp.linalg.norm(0.1 * x + (solution - mean["t"]) / mean["a"])

    return dbo.Problem(upper, lower), batch, lambda state: {"slope": slope(state.x)}


def network(case):
    """C²DFB on many nodes: (method, start, batch, judge)."""
    n, d = case["nodes"], case["features"]
    t = dbo.topology
    begin = time.perf_counter()
    graph = (
        t.metropolis(t.ring(n))
        if case["graph"] == "ring"
        else t.uniform(t.exponential(n))
    )
    mix = dbo.mixing.mixer(graph)
    case["mixer_seconds"] = time.perf_counter() - begin
    case["mixer_peak"] = peak()
    problem, batch, judge = diagonal(n, d)
    return method_of(case, problem, mix), (jnp.zeros(d), jnp.zeros(d)), batch, judge


def measured(case):
    """Run the case and return what to report of it."""
    method, start, batch, judge = {"text": text, "network": network}[case["kind"]](case)
    n = case["nodes"]
    state = method.init(*(dbo.replicate(value, n) for value in start))
    held = dbo.trees.nbytes(state)
    program = jax.jit(method.step, donate_argnums=1).lower(
        jax.random.key(0), state, batch
    )
    begin = time.perf_counter()
    program = program.compile()
    compile_seconds = time.perf_counter() - begin
    gc.collect()
    scores, seconds, upper = [judge(state)], [], []
    for key in jax.random.split(jax.random.key(1), case["steps"]):
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(program(key, state, batch))
        seconds.append(time.perf_counter() - begin)
        upper.append(float(metrics.upper))
        scores.append(judge(state))
    return {
        **case,
        "state": held,
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "peak": peak(),
        "message": metrics.traffic.message,
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "upper": upper,
        "scores": [{k: float(v) for k, v in found.items()} for found in scores],
        "finite": bool(np.isfinite(upper).all()),
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
