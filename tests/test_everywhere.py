"""Every algorithm takes the same steps on one device and on eight."""

import everywhere
import jax
import numpy as np
import pytest

import dbojax as dbo

D = dbo.devices
STEPS = 3
MESHES = {k: D.mesh(everywhere.N, devices=jax.devices()[:k]) for k in (1, 8)}
METHODS = {
    k: everywhere.methods(lambda part, mesh=mesh: D.spread(part, mesh))
    for k, mesh in MESHES.items()
}


def end(name, devices):
    """State and metrics after a few steps."""
    method, (x, y) = METHODS[devices][name]
    start = jax.jit(method.init)(x, y), everywhere.batch(name)
    placed = (D.place(tree, MESHES[devices], everywhere.N) for tree in start)

    @jax.jit
    def steps(state, batch, key):
        def body(state, key):
            return method.step(key, state, batch)

        return jax.lax.scan(body, state, jax.random.split(key, STEPS))

    return steps(*placed, jax.random.key(0))


@pytest.mark.parametrize("name", METHODS[1])
def test_devices_make_no_difference(name):
    (one, of_one), (many, of_many) = end(name, 1), end(name, 8)
    assert of_one.traffic == of_many.traffic
    for a, b in zip(
        jax.tree.leaves((one, of_one)), jax.tree.leaves((many, of_many)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    if name not in everywhere.MEANS:
        jax.tree.map(np.testing.assert_array_equal, one, many)


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
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
