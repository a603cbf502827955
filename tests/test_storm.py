"""Recursive momentum against its own recursion, exact directions and a variance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import dbojax as dbo

TASK = toys.task()
NOISY = dbo.tasks.noise.with_gradient_noise(TASK, 1.0)
SOBA = dbo.oracles.soba(NOISY.problem)
STEPS, RUNS = 40, 300


def _one(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _path():
    """Points that jump about: an estimate must follow wherever they go."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = toys.DX, toys.DY, toys.DY
    return tuple(
        jax.random.normal(key, (STEPS, d)) for key, d in zip(keys, sizes, strict=True)
    )


def _along(oracle, path, batches):
    """Directions at each point of a path, each on its own batch."""

    def step(memory, at):
        point, batch = at
        directions, memory = oracle.directions(None, *point, memory, batch)
        return memory, directions

    _, memory = oracle.init(path[0][0], path[1][0])
    return jax.lax.scan(step, memory, (path, batches))[1]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def _runs(make, rate, noise):
    """Directions of every run along one path, on the noise of each."""
    batch = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (STEPS, *leaf.shape)), _one(NOISY.batch)
    )
    upper, lower = noise
    batch = dbo.Batch(
        batch.upper._replace(x=upper[0], y=upper[1]), batch.lower._replace(y=lower)
    )
    return _along(make(rate), _path(), batch)


def _storm(rate, noise):
    return _runs(_make_storm, rate, noise)


def _make_storm(rate):
    return dbo.oracles.storm(SOBA, rate)


def _plain(noise):
    return _runs(_make_plain, 1.0, noise)


def _make_plain(rate):
    del rate
    return SOBA


def _noise():
    draw = jax.random.normal
    keys = jax.random.split(jax.random.key(1), 3)
    x, y, lower = (
        draw(key, (RUNS, STEPS, d))
        for key, d in zip(keys, (toys.DX, toys.DY, toys.DY), strict=True)
    )
    return (x, y), lower


def _close(a, b, atol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), a, b)


def test_without_noise_it_adds_nothing():
    """At every rate: the last estimate and the last point's directions cancel."""
    still = jax.tree.map(jnp.zeros_like, _noise())
    for rate in (1.0, 0.3):
        _close(_storm(rate, still), _plain(still))


def test_rate_one_is_the_plain_oracle_whatever_the_noise():
    _close(_storm(1.0, _noise()), _plain(_noise()))


def test_additive_noise_is_averaged_and_nothing_lags():
    """e_t = (1 - rate) e_{t-1} + rate xi_t, along any path, from e_0 = xi_0."""
    rate, still = 0.2, jax.tree.map(jnp.zeros_like, _noise())
    true = _plain(still)
    for got, plain, exact in zip(
        _storm(rate, _noise()), _plain(_noise()), true, strict=True
    ):
        xi = np.asarray(plain - exact)
        expected = xi.copy()
        for t in range(1, STEPS):
            expected[:, t] = (1 - rate) * expected[:, t - 1] + rate * xi[:, t]
        np.testing.assert_allclose(got - exact, expected, atol=1e-10)


def test_the_variance_falls_as_the_recursion_says():
    rate, still = 0.2, jax.tree.map(jnp.zeros_like, _noise())
    left = (1 - rate) ** (2 * STEPS - 2)
    share = left + rate / (2 - rate) * (1 - left)
    for got, plain, exact in zip(
        _storm(rate, _noise()), _plain(_noise()), _plain(still), strict=True
    ):
        last, before = (np.asarray(v - exact)[:, -1] for v in (got, plain))
        # A sum of m squares of standard normal numbers has mean m and variance 2 m.
        within = 5 * (2 / last.size) ** 0.5
        assert np.mean(before**2) == pytest.approx(1, abs=within)
        assert np.mean(last**2) / share == pytest.approx(1, abs=within)


def test_memory_is_the_last_point_and_estimate_and_costs_double():
    problem = dbo.Problem(lambda x, y, b: x @ x + y @ y, lambda x, y, b: y @ y)
    table = dbo.oracles.saba(problem, 2, 3)
    x, y = jnp.ones(2), jnp.ones(3)
    _, memory = dbo.oracles.storm(table, 0.5).init(x, y)
    _close(memory.memory, table.init(x, y)[1], 0)
    plain = dbo.oracles.soba(problem)
    oracle = dbo.oracles.storm(plain, 0.5)
    z, memory = oracle.init(x, y)
    np.testing.assert_array_equal(z, jnp.zeros(3))
    directions, after = jax.jit(oracle.directions)(None, x, y, z, memory, None)
    _close(after.point, (x, y, z), 0)
    _close(after.estimate, directions, 0)
    dbo.trees.check_like(after, memory, "after", "before")
    assert oracle.calls == tuple(calls + calls for calls in plain.calls)


@pytest.mark.parametrize("together", [False, True])
def test_both_points_share_the_key(together):
    """At a point that moves by one, huge noise of the same draw cancels."""

    def directions(key, x, y, z, memory, batch):
        noise = 100 * jax.random.normal(key, ())
        return (x + noise, y + noise, z + noise), memory

    plain = dbo.Oracle(lambda x, y: (y, ()), directions, (dbo.Calls(),) * 3)
    oracle, x = dbo.oracles.storm(plain, 1e-9, together), jnp.zeros(())
    _, memory = oracle.init(x, x)
    first, memory = oracle.directions(jax.random.key(0), x, x, x, memory, None)
    second, _ = oracle.directions(jax.random.key(1), x + 1, x, x, memory, None)
    np.testing.assert_allclose(second[0] - first[0], 1, atol=1e-5)


def test_both_points_at_once_give_the_same():
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * STEPS), _one(NOISY.batch))
    apart, together = (
        _along(dbo.oracles.storm(SOBA, 0.3, way), _path(), batch)
        for way in (False, True)
    )
    _close(together, apart, 1e-12)


@pytest.mark.parametrize("together", [False, True])
def test_the_wrapped_memory_moves_once_a_step(together):
    def directions(key, x, y, z, memory, batch):
        return (x, y, z), memory + 1

    plain = dbo.Oracle(lambda x, y: (y, jnp.array(0)), directions, (dbo.Calls(),) * 3)
    oracle, x = dbo.oracles.storm(plain, 0.5, together), jnp.zeros(())
    _, memory = oracle.init(x, x)
    for _ in range(3):
        _, memory = oracle.directions(None, x, x, x, memory, None)
    assert memory.memory == 3


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, float("nan")])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match=f"0 < rate <= 1, got {rate}"):
        dbo.oracles.storm(SOBA, rate)


def test_only_oracles_are_wrapped():
    with pytest.raises(TypeError, match="`oracle` must be a Oracle"):
        dbo.oracles.storm(SOBA.directions, 0.5)
