"""Networks whose nodes share x and solve lower levels of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbojax as dbo

h = dbo.hypergradients
NODES, N, M = 5, 3, 4


def own_quadratics():
    """Per node y*(x) = H^-1 (B x + c): the value and its minimiser in closed form."""
    rng = np.random.default_rng(2)
    root = rng.normal(size=(NODES, M, M))
    hessians = root @ root.transpose(0, 2, 1) / M + np.eye(M)
    crosses, offsets = rng.normal(size=(NODES, M, N)), rng.normal(size=(NODES, M))
    batch = tuple(map(jnp.asarray, (hessians, crosses, offsets)))
    problem = dbo.Problem(
        lambda x, y, batch: jnp.sum(y**2) / 2 + jnp.sum(x**2) / 20,
        lambda x, y, batch: y @ batch[0] @ y / 2 - y @ (batch[1] @ x + batch[2]),
    )
    maps = np.linalg.solve(hessians, crosses)
    shifts = np.linalg.solve(hessians, offsets[..., None])[..., 0]
    normal = np.einsum("imj,imk->jk", maps, maps) / NODES + np.eye(N) / 10
    best = -np.linalg.solve(normal, np.einsum("imj,im->j", maps, shifts) / NODES)
    return problem, batch, best


def solver(problem):
    return h.descent(problem, optax.sgd(0.3), 60, start=lambda key, x, y: 0 * y)


def ring():
    return dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(NODES)))


CHANNELS = {
    "exact": lambda: dbo.channels.exact(ring()),
    "reference points": lambda: dbo.channels.reference_point(
        ring(), dbo.compressors.top_k(2), 0.4
    ),
}


@pytest.mark.parametrize("channel", CHANNELS)
def test_tracking_reaches_the_optimum_of_the_mean(channel):
    problem, batch, best = own_quadratics()
    upper = dbo.strategies.gradient_tracking(CHANNELS[channel](), optax.sgd(0.03))
    method = dbo.algorithms.personal(
        problem, h.checkpointed(problem, solver(problem)), upper
    )
    state = method.init(jnp.zeros((NODES, N)), jnp.zeros((NODES, M)))
    state, history = dbo.run(method, jax.random.key(0), state, batch, 1200)
    np.testing.assert_allclose(state.x, np.tile(best, (NODES, 1)), atol=1e-7)
    assert history["hypergrad_norm"][-1] < 1e-7


def test_only_x_travels_and_calls_are_those_of_the_estimator():
    problem, batch, _ = own_quadratics()
    hyper = h.reverse(problem, solver(problem))
    upper = dbo.strategies.diffusion_cta(CHANNELS["exact"](), optax.sgd(0.1))
    method = dbo.algorithms.personal(problem, hyper, upper)
    state = method.init(jnp.zeros((NODES, N)), jnp.zeros((NODES, M)))
    state, metrics = jax.jit(method.step)(jax.random.key(0), state, batch)
    assert metrics.traffic.message == N * 8
    assert metrics.calls == hyper.calls
    solutions = jax.vmap(jnp.linalg.solve)(batch[0], batch[2])
    np.testing.assert_allclose(state.y, solutions, rtol=1e-6)


def test_the_lower_level_may_carry_on():
    problem, batch, _ = own_quadratics()
    inner = h.descent(problem, optax.sgd(0.3), 2)
    upper = dbo.strategies.diffusion_cta(CHANNELS["exact"](), optax.sgd(0.0))
    method = dbo.algorithms.personal(problem, h.reverse(problem, inner), upper)
    state = method.init(jnp.zeros((NODES, N)), jnp.zeros((NODES, M)))
    state, _ = dbo.run(method, jax.random.key(0), state, batch, 60)
    solutions = jax.vmap(jnp.linalg.solve)(batch[0], batch[2])
    np.testing.assert_allclose(state.y, solutions, rtol=1e-8)


def test_refused_parts():
    problem, _, _ = own_quadratics()
    with pytest.raises(TypeError, match="`hyper` must be a Hypergradient"):
        dbo.algorithms.personal(problem, dbo.oracles.soba(problem), None)
