"""(FG)²U with scalar messages: laws of the error, bytes, and the optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_personal

import dbojax as dbo

h = dbo.hypergradients
NODES, N, B = 6, 40, 5

# h_k(x) = <g_k, x>: gradients that differ from node to node, and are known.
linear = dbo.Problem(lambda x, y, batch: batch @ y, lambda x, y, batch: jnp.sum(y))


def scalars(directions=B, problem=linear, inner=lambda key, x, y, batch: x):
    return h.forward_scalars(problem, inner, directions, chunk=1)


def everyone():
    return dbo.mixing.averaging(NODES)


METHODS = {
    "shared": lambda: dbo.algorithms.fg2u_shared(
        linear, scalars(), dbo.channels.server(everyone()), 1.0
    ),
    "own": lambda: dbo.algorithms.fg2u_own(linear, scalars(), everyone(), 1.0),
}


def gradients():
    return jnp.asarray(np.random.default_rng(0).normal(size=(NODES, N)))


def estimates(method, count):
    """What moved x in a step from zero, for many keys: (count, N)."""
    x = jnp.zeros((NODES, N))
    state = method.init(x, x)

    def moved(key):
        return -method.step(key, state, gradients())[0].x

    return jax.jit(jax.vmap(moved))(jax.random.split(jax.random.key(1), count))


def expected_error(name):
    g = np.asarray(gradients())
    if name == "shared":
        return (N - 1) / B * np.sum(g.mean(0) ** 2)
    return (N - 1) / (NODES * B) * np.mean(np.sum(g**2, axis=1))


@pytest.mark.parametrize("name", METHODS)
def test_unbiased_with_the_error_of_its_law(name):
    found = np.asarray(estimates(METHODS[name](), 1000))
    np.testing.assert_allclose(found, found[:, :1].repeat(NODES, axis=1), atol=1e-12)
    mean = np.asarray(gradients()).mean(0)
    errors = np.sum((found[:, 0] - mean) ** 2, axis=1)
    spread = errors.std() / np.sqrt(len(errors))
    assert abs(errors.mean() - expected_error(name)) < 4 * spread
    offset = np.sum((found[:, 0].mean(0) - mean) ** 2)
    assert offset < 2 * expected_error(name) / len(errors)


@pytest.mark.parametrize("name", METHODS)
def test_only_scalars_travel(name):
    method, x = METHODS[name](), jnp.zeros((NODES, N))
    _, metrics = jax.jit(method.step)(jax.random.key(0), method.init(x, x), gradients())
    assert metrics.traffic.message == B * 8
    assert metrics.calls == scalars().calls


def test_gossip_of_slopes_is_gossip_of_gradients():
    w = dbo.topology.metropolis(dbo.topology.ring(NODES))
    method = dbo.algorithms.fg2u_own(linear, scalars(), dbo.mixing.mixer(w), 1.0)
    x = jnp.zeros((NODES, N))
    key = jax.random.key(3)
    state, metrics = jax.jit(method.step)(key, method.init(x, x), gradients())
    key_slopes, _ = jax.random.split(key)
    halves = scalars()

    @jax.jit
    def alone(node, gradient):
        node_key = jax.random.fold_in(key_slopes, node)
        slopes, _, _ = halves.coefficients(node_key, x[0], x[0], gradient)
        return halves.combine(node_key, x[0], slopes)

    own = [alone(node, gradient) for node, gradient in enumerate(gradients())]
    np.testing.assert_allclose(-state.x, w @ jnp.stack(own), atol=1e-12)
    assert metrics.traffic.total == B * 8 * 2 * NODES


@pytest.mark.parametrize("name", ["shared", "own"])
def test_both_reach_the_optimum_of_unlike_nodes(name):
    problem, batch, best = test_personal.own_quadratics()
    mix = dbo.mixing.averaging(test_personal.NODES)
    halves = scalars(3, problem, test_personal.solver(problem))
    step = optax.sgd(optax.exponential_decay(0.05, 400, 0.5))
    if name == "shared":
        channel = dbo.channels.server(mix)
        method = dbo.algorithms.fg2u_shared(problem, halves, channel, step)
    else:
        method = dbo.algorithms.fg2u_own(problem, halves, mix, step)
    zeros = [jnp.zeros((test_personal.NODES, d)) for d in (3, 4)]
    state, _ = dbo.run(method, jax.random.key(0), method.init(*zeros), batch, 2000)
    x = np.asarray(dbo.node_mean(state.x))
    # Shared directions lose their noise where the mean gradient vanishes; own ones
    # keep that of the single gradients.
    assert np.linalg.norm(x - best) < (1e-6 if name == "shared" else 0.05)


def test_refused_parts():
    with pytest.raises(TypeError, match="`channel` must be a Channel"):
        dbo.algorithms.fg2u_shared(linear, scalars(), everyone(), 0.1)
    with pytest.raises(TypeError, match="`scalars` must be a ForwardGradient"):
        dbo.algorithms.fg2u_own(linear, None, everyone(), 0.1)


@pytest.mark.parametrize("name", METHODS)
def test_refused_variables_and_states(name, key):
    method, x = METHODS[name](), jnp.zeros((NODES, N))
    with pytest.raises(ValueError, match="`x` must hold real floating-point arrays"):
        method.init(x.astype(int), x)
    with pytest.raises(ValueError, match=r"holds 5 nodes on axis 0"):
        method.init(x[:5], x[:5])
    with pytest.raises(TypeError, match="`state` must be a ScalarState"):
        method.step(key, (), gradients())


def test_keys_of_both_kinds_give_the_same_step():
    typed = jax.random.key(3)
    method = METHODS["shared"]()
    state, step = method.init(*np.zeros((2, NODES, N))), jax.jit(method.step)
    moved = [
        step(key, state, gradients())[0].x
        for key in (typed, jax.random.key_data(typed))
    ]
    np.testing.assert_array_equal(*moved)


@pytest.mark.parametrize("name", ["shared", "own"])
def test_every_inner_step_may_have_samples_of_its_own(name):
    # As many rounds as nodes: an axis taken for the other would not be noticed.
    problem = dbo.Problem(
        lambda x, y, batch: jnp.sum(y * batch), lambda x, y, batch: batch @ (y * x)
    )
    inner = h.descent(problem, optax.sgd(1.0), NODES)
    x, y = jnp.ones((NODES, 2)), jnp.zeros((NODES, 2))
    rng = np.random.default_rng(0)
    outer = jnp.asarray(rng.normal(size=(NODES, 2)))
    rounds = jnp.asarray(rng.normal(size=(NODES, NODES, 2)))  # steps, nodes
    halves = scalars(2, problem, inner)
    if name == "shared":
        server = dbo.channels.server(everyone())
        method = dbo.algorithms.fg2u_shared(problem, halves, server, 0.1)
    else:
        method = dbo.algorithms.fg2u_own(problem, halves, everyone(), 0.1)
    batch = dbo.Rounds(outer, rounds)
    state, metrics = method.step(jax.random.key(0), method.init(x, y), batch)
    end = -rounds.sum(axis=0)  # y moves along -batch * x, with x = 1
    np.testing.assert_allclose(state.y, end, rtol=1e-12)
    np.testing.assert_allclose(metrics.upper, (end * outer).sum(1).mean(), rtol=1e-12)
    with pytest.raises(ValueError, match=r"`batch.inner` needs 6 nodes on axis 1"):
        method.step(jax.random.key(0), state, dbo.Rounds(outer, rounds[:, :3]))
