"""All forms of the mixing product are the same matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax import mixing, topology

GRAPHS = {
    "ring": topology.metropolis(topology.ring(10)),
    "ring of two": topology.metropolis(topology.ring(2)),
    "one node": np.ones((1, 1)),
    "star": topology.metropolis(topology.star(7)),
    "complete": np.full((5, 5), 0.2),
    "exponential": topology.uniform(topology.exponential(12)),
    "erdos_renyi": topology.metropolis(topology.erdos_renyi(12, 0.4, seed=1)),
    "wide": topology.metropolis(topology.erdos_renyi(40, 0.6, seed=1)),
}
FORMS = {
    "picked": mixing.mixer,
    "dense": mixing.dense,
    "neighbours": mixing.neighbours,
}


def _tree(n):
    key_a, key_b = jax.random.split(jax.random.key(n))
    a, b = jax.random.normal(key_a, (n, 3)), jax.random.normal(key_b, (n, 2, 4))
    return {"a": a, "b": b}


def _expected(w, tree):
    return jax.tree.map(lambda v: np.einsum("ij,j...->i...", w, v), tree)


def _assert_close(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), got, wanted)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_matrix(graph, form):
    w = GRAPHS[graph]
    v = _tree(len(w))
    _assert_close(jax.jit(FORMS[form](w).apply)(v), _expected(w, v))


@pytest.mark.parametrize("graph", ["ring", "ring of two", "exponential", "one node"])
def test_shifts_are_the_same_matrix(graph):
    w = GRAPHS[graph]
    v = _tree(len(w))
    _assert_close(mixing.shifts(w).apply(v), _expected(w, v))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("form", FORMS)
def test_exchange_and_weights_rebuild_the_product(graph, form):
    w = GRAPHS[graph]
    mix, v = FORMS[form](w), _tree(len(w))
    rebuilt = jax.tree.map(
        lambda r: np.einsum("ik,ik...->i...", mix.weights, r), mix.exchange(v)
    )
    _assert_close(rebuilt, _expected(w, v))


@pytest.mark.parametrize("graph", GRAPHS)
def test_links_count_directed_edges(graph):
    w = GRAPHS[graph]
    edges = [(i, j) for i, row in enumerate(w) for j, x in enumerate(row) if x]
    assert mixing.mixer(w).links == sum(i != j for i, j in edges)


def test_decoding_happens_behind_the_exchange():
    mix = mixing.mixer(GRAPHS["ring"])
    halves = jnp.arange(10, dtype=jnp.int8)
    mixed = mix.apply(halves, lambda h: h.astype(float) * 2)
    np.testing.assert_allclose(mixed, GRAPHS["ring"] @ (2.0 * np.arange(10)))


def test_traced_matrices_sweep_over_graphs_in_one_program():
    graphs = [topology.erdos_renyi(8, 0.5, seed) for seed in range(3)]
    ws = jnp.stack([topology.metropolis(graph) for graph in graphs])
    v = jax.random.normal(jax.random.key(0), (8, 4))
    mixed = jax.vmap(lambda w: mixing.dense(w).apply(v))(ws)
    np.testing.assert_allclose(mixed, ws @ v, atol=1e-13)


def test_traced_matrices_exchange_with_everyone():
    w, v = jnp.asarray(GRAPHS["star"]), _tree(7)["a"]

    def rebuilt(w):
        mix = mixing.dense(w)
        return jnp.einsum("ik,ikd->id", mix.weights, mix.exchange(v))

    np.testing.assert_allclose(jax.jit(rebuilt)(w), w @ v, atol=1e-13)


def test_the_chosen_form_follows_the_graph():
    shifted = jax.make_jaxpr(mixing.mixer(GRAPHS["ring"]).apply)(jnp.ones((10, 2)))
    assert "dot_general" not in str(shifted)
    assert "gather" not in str(shifted)
    sparse = topology.metropolis(topology.ring(80, hops=3))
    gathered = jax.make_jaxpr(mixing.mixer(sparse).apply)(jnp.ones((80, 2)))
    assert "gather" in str(gathered)
    wide = jax.make_jaxpr(mixing.neighbours(GRAPHS["wide"]).apply)(jnp.ones((40, 2)))
    assert "scan" in str(wide)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_precision_of_the_values_is_kept(dtype):
    for form in FORMS.values():
        v = jnp.ones((10, 3), dtype)
        assert form(GRAPHS["ring"]).apply(v).dtype == dtype


def test_gradients_flow_through_every_form():
    w = GRAPHS["erdos_renyi"]
    target = jax.random.normal(jax.random.key(3), (12, 2))
    for form in FORMS.values():
        grad = jax.grad(lambda v, f=form: jnp.vdot(f(w).apply(v), target))(target)
        np.testing.assert_allclose(grad, w.T @ target, atol=1e-13)


def test_the_border_of_gathers_changes_no_number():
    """It hangs on one entry being what it is, be that a NaN; vmap sees through it."""
    w = GRAPHS["erdos_renyi"]
    mix, v = mixing.neighbours(w), jax.random.normal(jax.random.key(0), (12, 2))
    assert "cond" in str(jax.make_jaxpr(mix.apply)(v))
    for first in (jnp.nan, jnp.inf, 0.0):
        mixed = jax.jit(mix.apply)(v.at[0, 0].set(first))
        hears = w[:, 0] != 0
        np.testing.assert_allclose(mixed[~hears], (w @ v)[~hears], atol=1e-13)
        assert np.isfinite(mixed[hears, 0]).all() == np.isfinite(first)
    many = jnp.stack([v, v.at[0, 0].set(2.0), jnp.ones_like(v)])
    _assert_close(jax.vmap(mix.apply)(many), jnp.einsum("ij,bjk->bik", w, many))
    assert mix.apply(jnp.zeros((12, 0))).shape == (12, 0)


def test_wrong_node_axis_is_refused():
    with pytest.raises(ValueError, match=r"holds 9 nodes on axis 0, but .* has 10"):
        mixing.mixer(GRAPHS["ring"]).apply(jnp.ones((9, 2)))
    with pytest.raises(ValueError, match="node axis first"):
        mixing.mixer(GRAPHS["ring"]).apply({"a": jnp.ones((10, 2)), "b": jnp.ones(3)})


def test_bad_matrices_are_refused_before_any_compute():
    with pytest.raises(ValueError, match="doubly stochastic"):
        mixing.mixer(np.full((3, 3), 0.5))
    with pytest.raises(ValueError, match="not connected"):
        mixing.mixer(np.eye(3))
    with pytest.raises(ValueError, match="circulant"):
        mixing.shifts(GRAPHS["star"])
    with pytest.raises(ValueError, match=r"square matrix .* got shape \(2, 3\)"):
        mixing.dense(np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"dbo\.mixing\.dense\(w\)"):
        jax.jit(lambda w: mixing.mixer(w).weights)(GRAPHS["ring"])


@pytest.mark.parametrize("graph", GRAPHS)
def test_matrices_may_come_in_float32(graph):
    w = GRAPHS[graph]
    v = _tree(len(w))["a"]
    mixed = mixing.mixer(w.astype(np.float32)).apply(v)
    np.testing.assert_allclose(mixed, w @ v, atol=1e-6)
