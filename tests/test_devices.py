import weakref
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo

D = dbo.devices
EXPLICIT = jax.sharding.AxisType.Explicit


def held(array):
    """What each device has, by its number."""
    return {part.device.id: np.asarray(part.data) for part in array.addressable_shards}


def test_a_mesh_shares_nodes_out_without_a_rest():
    assert [D.mesh(n).shape["nodes"] for n in (1, 6, 7, 12, 16)] == [1, 6, 7, 6, 8]
    assert dict(D.mesh(12, model=2).shape) == {"nodes": 4, "model": 2}
    assert D.mesh(8, devices=jax.devices()[2:4]).devices.tolist() == jax.devices()[2:4]


def test_a_mesh_refuses_what_cannot_be_shared_out():
    with pytest.raises(ValueError, match="whole number n >= 1 of nodes, got 0"):
        D.mesh(0)
    with pytest.raises(ValueError, match="of devices along 'model', got Frac"):
        D.mesh(8, model=Fraction(3, 2))
    with pytest.raises(ValueError, match="8 devices out over 'nodes' and further axes"):
        D.mesh(8, model=16)
    with pytest.raises(ValueError, match="give these other names"):
        D.mesh(8, nodes=2)


def test_nodes_go_where_the_mesh_has_them():
    mesh = D.mesh(16)
    tree = {
        "x": jnp.arange(32.0).reshape(16, 2),
        "step": jnp.ones(3),
        "n": jnp.ones(()),
    }
    placed = D.place(tree, mesh, 16)
    parts = held(placed["x"])
    assert sorted(parts) == list(range(8))
    for device, part in parts.items():
        assert part[:, 0].tolist() == [4.0 * device, 4.0 * device + 2]
    for name in ("step", "n"):
        assert all(
            part.shape == tree[name].shape for part in held(placed[name]).values()
        )


def test_inner_batches_have_their_nodes_second():
    mesh = D.mesh(8)
    batch = dbo.Rounds(outer=jnp.ones((8, 3)), inner=jnp.arange(40.0).reshape(5, 8))
    placed = D.place(batch, mesh)
    assert held(placed.inner)[3].ravel().tolist() == [3.0, 11.0, 19.0, 27.0, 35.0]
    assert held(placed.outer)[3].shape == (1, 3)


def test_place_keeps_leaves_that_are_spread_along_a_second_axis():
    mesh = D.mesh(4, model=2)
    wide = jax.NamedSharding(mesh, jax.P("nodes", "model"))
    v = jax.device_put(jnp.arange(24.0).reshape(4, 6), wide)
    assert D.place(v, mesh) is v
    whole = jax.device_put(v, jax.NamedSharding(mesh, jax.P()))
    assert D.place(whole, mesh).sharding.spec == jax.P("nodes")


def test_load_reads_each_node_once_and_puts_it_where_it_lives():
    mesh, asked = D.mesh(4, model=2), []

    def read(node):
        asked.append(node)
        return {"a": np.full((2, 3), node), "b": np.float32(node)}

    data = D.load(read, 8, mesh)
    assert sorted(asked) == list(range(8))
    assert data["a"].shape == (8, 2, 3)
    assert data["b"].dtype == np.float32
    assert {part[0, 0, 0] for part in held(data["a"]).values()} == {0, 2, 4, 6}
    np.testing.assert_array_equal(data["b"], np.arange(8))


def test_load_lets_go_of_a_node_before_it_reads_the_next():
    before = []

    def read(node):
        assert not any(seen() is not None for seen in before)
        leaf = np.full(1000, node, np.float32)
        before.append(weakref.ref(leaf))
        return {"a": leaf}

    data = D.load(read, 8, D.mesh(8, devices=jax.devices()[:2]))["a"]
    np.testing.assert_array_equal(data[:, 0], np.arange(8))


def test_load_refuses_nodes_of_unlike_shapes():
    with pytest.raises(ValueError, match=r"`read\(2\)` must have the shapes of `read"):
        D.load(lambda node: np.ones(1 + node // 2), 4, D.mesh(4))


def test_runs_of_a_sweep_stay_in_front():
    mesh = D.mesh(8)
    tree = {"x": jnp.arange(48.0).reshape(3, 8, 2), "step": jnp.zeros(3)}
    placed = D.place(tree, mesh, axis=1)
    assert held(placed["x"])[5].shape == (3, 1, 2)
    assert held(placed["step"])[5].shape == (3,)


def test_what_is_placed_does_not_follow_the_memory_it_came_from():
    mesh = D.mesh(8)
    for shape in ((8, 1024), (8, 64)):
        rows = np.ones(shape)
        placed = D.place({"x": rows, "same": np.ones(64)}, mesh)
        rows[:] = 7
        assert float(placed["x"].max()) == 1


def test_what_does_not_fit_the_mesh_is_refused():
    mesh = D.mesh(8)
    with pytest.raises(ValueError, match="6 nodes need a mesh with an axis 'nodes'"):
        D.place(jnp.ones((6, 2)), mesh)
    with pytest.raises(ValueError, match=r"Write `place\(tree, mesh, n\)`"):
        D.place(jnp.ones(()), mesh)
    with pytest.raises(ValueError, match="if 1 is not the number of nodes, since"):
        D.place(jnp.ones((1, 2)), mesh)
    with pytest.raises(ValueError, match=r"must be of type Auto, got \w*\.?Explicit"):
        D.place(jnp.ones((8, 2)), jax.make_mesh((8,), ("nodes",), (EXPLICIT,)))
    other = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="axis 'nodes' whose length divides 4; got"):
        D.load(lambda node: np.ones(1), 4, other)
    with pytest.raises(TypeError, match="`mesh` must be a Mesh"):
        D.place(jnp.ones((8, 2)), 8)
    with pytest.raises(TypeError, match=r"`spread\(part\)` must be a Mix"):
        D.spread(np.eye(8), mesh)


def test_a_start_is_never_held_by_one_device(monkeypatch):
    task, mesh = dbo.tasks.quadratic(n=8), D.mesh(8)
    method = dbo.algorithms.soba(
        task.problem,
        mix=D.spread(dbo.mixing.averaging(8), mesh),
        upper_step=0.1,
        lower_step=0.1,
    )
    x, y = dbo.replicate(task.x0, 8), dbo.replicate(task.y0, 8)
    state = D.init(method, task.x0, task.y0, mesh, n=8)
    plain = method.init(x, y)
    for placed in (state, D.init(method, x, y, mesh)):
        jax.tree.map(np.testing.assert_array_equal, placed, plain)
    assert all(len(part) == 1 for part in held(state.y).values())


def test_a_process_that_did_not_join_is_told_so(monkeypatch):
    monkeypatch.setenv("DBOJAX_PROCESSES", "4")
    with pytest.raises(RuntimeError, match=r"Call `dbo.devices.start\(\)` first"):
        D.mesh(8)
