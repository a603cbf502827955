"""All forms of the mixing product are the same matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax import mixing, topology, trees

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
    rng = np.random.default_rng(n)
    return {"a": rng.normal(size=(n, 3)), "b": rng.normal(size=(n, 2, 4))}


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
    _assert_close(jax.jit(mixing.shifts(w).apply)(v), _expected(w, v))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("form", FORMS)
def test_exchange_and_weights_rebuild_the_product(graph, form):
    w = GRAPHS[graph]
    mix, v = FORMS[form](w), _tree(len(w))
    received = jax.jit(mix.exchange)(v)
    rebuilt = jax.tree.map(
        lambda r: np.einsum("ik,ik...->i...", mix.weights, r), received
    )
    _assert_close(rebuilt, _expected(w, v))


@pytest.mark.parametrize("graph", GRAPHS)
def test_links_count_directed_edges(graph):
    w = GRAPHS[graph]
    edges = [(i, j) for i, row in enumerate(w) for j, x in enumerate(row) if x]
    assert mixing.mixer(w).links == sum(i != j for i, j in edges)


def test_decoding_happens_behind_the_exchange():
    mix = mixing.mixer(GRAPHS["ring"])
    halves = np.arange(10, dtype=np.int8)
    mixed = jax.jit(lambda v: mix.apply(v, lambda h: h.astype(float) * 2))(halves)
    np.testing.assert_allclose(mixed, GRAPHS["ring"] @ (2.0 * np.arange(10)))


def test_traced_matrices_sweep_over_graphs_in_one_program():
    graphs = [topology.erdos_renyi(8, 0.5, seed) for seed in range(3)]
    ws = np.stack([topology.metropolis(graph) for graph in graphs])
    v = _tree(8)["b"][:, 0]
    mixed = jax.jit(jax.vmap(lambda w: mixing.dense(w).apply(v)))(ws)
    np.testing.assert_allclose(mixed, ws @ v, atol=1e-13)


def test_traced_matrices_exchange_with_everyone():
    w, v = GRAPHS["star"], _tree(7)["a"]

    def rebuilt(w):
        mix = mixing.dense(w)
        return jnp.einsum("ik,ikd->id", mix.weights, mix.exchange(v))

    np.testing.assert_allclose(jax.jit(rebuilt)(w), w @ v, atol=1e-13)


def test_the_chosen_form_follows_the_graph_and_the_size():
    def does(form, w, *shape):
        text = str(jax.make_jaxpr(form(w).apply)(jnp.ones((len(w), *shape))))
        return {
            name for name in ("dot_general", "gather[", "cond", "scan") if name in text
        }

    two_hops = topology.metropolis(topology.ring(12, hops=2))
    small, large = {"gather[", "cond"}, {"gather[", "scan", "cond"}
    assert does(mixing.mixer, GRAPHS["ring"], 2) == small
    assert does(mixing.mixer, topology.metropolis(topology.ring(80, 3)), 2) == small
    assert does(mixing.mixer, two_hops, 2) == {"dot_general"}
    assert does(mixing.mixer, two_hops, 4, 12_000) == large
    assert does(mixing.mixer, GRAPHS["wide"], 5000) == {"dot_general"}
    many = topology.metropolis(topology.ring(40, hops=17))
    assert does(mixing.neighbours, many, 2) == small | {"scan"}


@pytest.mark.parametrize("shape", [(45_056,), (3, 15_005), (44_900,)])
@pytest.mark.parametrize("graph", ["ring", "two hops"])
def test_large_arrays_are_mixed_alike_block_by_block(graph, shape):
    """Widths that blocks divide and that leave some columns over; with NaN in one."""
    w = topology.metropolis(topology.ring(12, hops=1 + (graph != "ring")))
    mix, v = mixing.mixer(w), np.random.default_rng(0).normal(size=(12, *shape))
    v[3, ..., -1] = np.nan
    mixed = np.asarray(jax.jit(mix.apply)(v))
    heard = w[:, 3] != 0
    np.testing.assert_array_equal(
        np.isnan(mixed).any(axis=tuple(range(1, v.ndim))), heard
    )
    clean = np.nan_to_num(v)
    wanted = _expected(w, clean)
    np.testing.assert_allclose(mixed[~heard], wanted[~heard], atol=1e-13)
    np.testing.assert_allclose(jax.jit(mix.apply)(clean), wanted, atol=1e-13)
    towards = jax.jit(mix.towards)(clean, 0.3)
    np.testing.assert_allclose(towards, 0.7 * clean + 0.3 * wanted, atol=1e-13)
    pulled = jax.jit(jax.grad(lambda v: jnp.vdot(mix.apply(v), clean)))(clean)
    np.testing.assert_allclose(pulled, wanted, atol=1e-13)


@pytest.mark.parametrize("width", [3, 45_056])
@pytest.mark.parametrize("n", [12, 70], ids=["product", "rows"])
def test_values_move_along_what_their_public_copies_disagree_about(n, width):
    """v + gamma (W hat - hat), where hat is not v: on few nodes one matrix product."""
    w = topology.metropolis(topology.ring(n, hops=2))
    mix = mixing.mixer(w)
    v, hat = np.random.default_rng(0).normal(size=(2, n, width))
    moved = jax.jit(mix.towards)(v, 0.3, hat)
    np.testing.assert_allclose(moved, v + 0.3 * (w @ hat - hat), atol=1e-13)
    products = str(jax.make_jaxpr(mix.towards)(v, 0.3, hat)).count("dot_general")
    assert products == (n == 12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_precision_of_the_values_is_kept(dtype):
    for form in FORMS.values():
        v = jax.ShapeDtypeStruct((10, 3), dtype)
        assert jax.eval_shape(form(GRAPHS["ring"]).apply, v).dtype == dtype


def test_gradients_flow_through_every_form():
    w = GRAPHS["erdos_renyi"]
    target = _tree(12)["b"][:, 0]
    for form in FORMS.values():
        slope = jax.grad(lambda v, f=form: jnp.vdot(f(w).apply(v), target))
        grad = jax.jit(slope)(target)
        np.testing.assert_allclose(grad, w.T @ target, atol=1e-13)


def test_the_border_of_gathers_changes_no_number():
    """It hangs on one entry being what it is, be that a NaN; vmap sees through it."""
    w = GRAPHS["erdos_renyi"]
    mix, v = mixing.neighbours(w), _tree(12)["b"][:, 0]
    assert "cond" in str(jax.make_jaxpr(mix.apply)(v))
    apply = jax.jit(mix.apply)

    def changed(first):
        return np.where(np.arange(v.size).reshape(v.shape) == 0, first, v)

    for first in (np.nan, np.inf, 0.0):
        mixed = np.asarray(apply(changed(first)))
        hears = w[:, 0] != 0
        np.testing.assert_allclose(mixed[~hears], (w @ v)[~hears], atol=1e-13)
        assert np.isfinite(mixed[hears, 0]).all() == np.isfinite(first)
    many = np.stack([v, changed(2.0), np.ones_like(v)])
    lifted = jax.jit(jax.vmap(mix.apply))
    _assert_close(lifted(many), np.einsum("ij,bjk->bik", w, many))
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
    mixed = jax.jit(mixing.mixer(w.astype(np.float32)).apply)(v)
    np.testing.assert_allclose(mixed, w @ v, atol=1e-6)


def test_derivatives_of_large_arrays_take_one_pass():
    w = topology.metropolis(topology.star(4))
    mix, gamma = mixing.mixer(w), 0.3
    v = np.random.default_rng(0).normal(size=(4, 2**17 + 300)).astype(np.float32)
    assert trees.is_large(v)
    t = v[::-1].copy()
    assert mix.towards is not None

    out, back = jax.vjp(mix.towards, v, jnp.float32(gamma))
    of_v, of_gamma = jax.jit(back)(t)
    apart = w @ v - v
    np.testing.assert_allclose(out, v + gamma * apart, atol=1e-5)
    np.testing.assert_allclose(of_v, t + gamma * (w.T @ t - t), atol=1e-5)
    np.testing.assert_allclose(of_gamma, np.vdot(t, apart), rtol=1e-3)
    # Going back through a loop over blocks would copy the array in each of them.
    for pull in (back, jax.vjp(mix.apply, v)[1]):
        text = str(jax.make_jaxpr(pull)(t))
        assert "scan" not in text
        assert "while" not in text
