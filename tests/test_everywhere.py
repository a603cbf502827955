"""Every algorithm takes the same steps on one device and on eight."""

import os
import subprocess
import sys
from pathlib import Path

import everywhere
import jax
import numpy as np
import pytest

import dbojax as dbo
from dbojax.runner.feeds import feed
from dbojax.runner.peers import peers_of
from dbojax.runner.program import Program, own

D = dbo.devices
MESHES = {k: D.mesh(everywhere.N, devices=jax.devices()[:k]) for k in (1, 8)}
METHODS = {
    k: everywhere.methods(lambda part, mesh=mesh: D.spread(part, mesh))
    for k, mesh in MESHES.items()
}


@pytest.mark.parametrize("name", METHODS[1])
def test_devices_make_no_difference(name):
    (one, of_one), (many, of_many) = (
        everywhere.end(*METHODS[k][name], everywhere.batch(name), mesh)
        for k, mesh in MESHES.items()
    )
    assert of_one.traffic == of_many.traffic
    # To the last bit with JAX 0.10. Later compilers form the sums of a node in another
    # order where a device holds another number of nodes.
    close((one, of_one), (many, of_many))


def close(ours, theirs):
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


# One that compresses, one whose links fail, one with a server.
ACROSS = ("c2dfb", "lossy", "c_soba")


@pytest.mark.skipif(sys.platform == "win32", reason="gloo needs POSIX")
def test_processes_make_no_difference(tmp_path):
    out, worker = tmp_path / "ends.npz", Path(everywhere.__file__).parent
    command = [sys.executable, "-m", "dbojax", "launch", "-n", "2", "--devices", "4"]
    command += [str(worker / "everywhere_worker.py"), str(out), *ACROSS]
    paths = os.pathsep.join([str(worker), str(worker.parent)])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
    found = np.load(out)
    for name in ACROSS:
        end = everywhere.end(*METHODS[8][name], everywhere.batch(name), MESHES[8])
        theirs = [found[f"{name} {i}"] for i in range(len(jax.tree.leaves(end)))]
        close(end, theirs)
        if name not in everywhere.MEANS:
            state = jax.tree.leaves(end[0])
            jax.tree.map(np.testing.assert_array_equal, state, theirs[: len(state)])


def test_leaves_of_one_node_may_be_spread_along_a_second_axis():
    n, ends = 4, []
    task = dbo.tasks.quadratic(n=n, dx=4, dy=6, seed=1)
    w = dbo.topology.metropolis(dbo.topology.ring(n))
    x, y = dbo.replicate(task.x0, n), dbo.replicate(task.y0, n)
    for mesh in (D.mesh(n, devices=jax.devices()[:1]), D.mesh(n, model=2)):
        mix = D.spread(dbo.mixing.mixer(w), mesh)
        top = dbo.channels.reference_point(mix, dbo.compressors.top_k(0.4), 0.3)
        method = dbo.algorithms.c2dfb(
            task.problem,
            outer=dbo.channels.exact(mix),
            inner=top,
            inner_steps=2,
            upper_step=0.02,
            lower_step=0.1,
        )
        spec = jax.P("nodes", *mesh.axis_names[1:])
        wide = jax.NamedSharding(mesh, spec)
        starts = (jax.device_put(v, wide) for v in (x, y))
        state = D.init(method, *starts, mesh)
        state = state._replace(
            **{k: jax.device_put(getattr(state, k), wide) for k in "xyz"}
        )
        steps = jax.jit(
            lambda s, b, m=method: jax.lax.fori_loop(
                0, 3, lambda i, s: m.step(jax.random.key(i), s, b)[0], s
            )
        )
        ends.append(steps(state, D.place(task.batch, mesh)))
    assert ends[1].y.sharding.spec == jax.P("nodes", "model")
    close(*ends)


def test_a_step_sends_what_the_meter_counts_and_measuring_sends_the_rest():
    method, start = METHODS[8]["c2dfb"]
    mesh, key = MESHES[8], jax.random.key(0)
    state = D.init(method, *start, mesh)
    batch = D.place(everywhere.batch("c2dfb"), mesh)
    graph = dbo.mixing.mixer(everywhere.graph())
    assert D.crossings(graph, mesh) == graph.links
    bare = jax.jit(lambda *step: method.step(*step)[0])
    _, metrics = jax.eval_shape(method.step, key, state, batch)
    sent = D.wire(bare.lower(key, state, batch).compile())
    assert sent == {"collective-permute": metrics.traffic.total}
    texts = []
    for measure in (1, 1000):
        program = Program(method, feed(batch), key, peers_of(state), measure)
        program(own(state), 0, 2)
        texts.append(program.compiled[2].as_text())
    reductions, exchanges = (
        [text.count(f" {kind}(") for text in texts]
        for kind in ("all-reduce", "collective-permute")
    )
    # Of the two branches that a step then has, one measures.
    assert reductions[0] == reductions[1] > 0
    assert exchanges[1] == 2 * exchanges[0] > 0
