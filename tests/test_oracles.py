"""Oracles against dense linear algebra and the closed-form value function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import dbojax as dbo


def _one_node():
    toy = dbo.tasks.quadratic(n=1, dx=3, dy=5)
    batch = jax.tree.map(lambda leaf: leaf[0], toy.batch)
    key_x, key_y, key_z = jax.random.split(jax.random.key(4), 3)
    x, y = jax.random.normal(key_x, (3,)), jax.random.normal(key_y, (5,))
    return toy, batch, x, y, jax.random.normal(key_z, (5,))


def test_soba_directions_are_the_dense_ones():
    toy, batch, x, y, z = _one_node()
    oracle = dbo.oracles.soba(toy.problem)
    _, memory = oracle.init(x, y)
    (d_x, d_y, d_z), _ = oracle.directions(None, x, y, z, memory, batch)
    a, b, c = batch.lower
    np.testing.assert_allclose(d_y, a @ y - b @ x - c, atol=1e-13)
    np.testing.assert_allclose(d_z, a @ z - (y - batch.upper), atol=1e-13)
    np.testing.assert_allclose(d_x, 0.1 * x + b.T @ z, atol=1e-13)


def test_soba_at_its_solutions_is_the_hypergradient():
    toy, batch, x, _, _ = _one_node()
    oracle = dbo.oracles.soba(toy.problem)
    y = toy.exact.solution(x)
    z = jnp.linalg.solve(batch.lower.a, y - batch.upper)
    (d_x, d_y, d_z), _ = oracle.directions(None, x, y, z, (), batch)
    np.testing.assert_allclose(d_y, 0, atol=1e-12)
    np.testing.assert_allclose(d_z, 0, atol=1e-12)
    np.testing.assert_allclose(d_x, jax.grad(toy.exact.value)(x), atol=1e-10)


def test_penalty_bias_falls_as_one_over_lambda():
    toy, batch, x, _, _ = _one_node()
    a, b, c = batch.lower
    errors = []
    for weight in (100.0, 200.0, 400.0):
        oracle = dbo.oracles.penalty(toy.problem, weight)
        penalised = a + jnp.eye(5) / weight
        y = jnp.linalg.solve(penalised, b @ x + c + batch.upper / weight)
        z = toy.exact.solution(x)
        (d_x, d_y, d_z), _ = oracle.directions(None, x, y, z, (), batch)
        np.testing.assert_allclose(d_y, 0, atol=1e-12)
        np.testing.assert_allclose(d_z, 0, atol=1e-12)
        errors.append(float(jnp.linalg.norm(d_x - toy.exact.hypergradient(x))))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    "make", [dbo.oracles.soba, lambda p: dbo.oracles.penalty(p, 7.0)]
)
def test_trees_on_both_levels_are_flat_vectors_in_disguise(make):
    toy, batch, x, y, z = _one_node()
    flat = make(toy.problem).directions(None, x, y, z, (), batch)[0]

    def join(tree):
        return jnp.concatenate([tree["a"], tree["b"]])

    def fork(v):
        return {"a": v[:2], "b": v[2:]}

    problem = dbo.Problem(
        *(lambda x, y, b, f=f: f(join(x), join(y), b) for f in toy.problem)
    )
    forked = make(problem).directions(None, fork(x), fork(y), fork(z), (), batch)[0]
    for tree, vector in zip(forked, flat, strict=True):
        np.testing.assert_allclose(join(tree), vector, atol=1e-13)


def test_penalty_never_differentiates_twice():
    @jax.custom_vjp
    def once(v):
        return jnp.sum(v**2)

    def backward(v, g):
        return (jax.pure_callback(lambda a, b: 2 * a * b, v, v, g),)

    once.defvjp(lambda v: (once(v), v), backward)
    problem = dbo.Problem(lambda x, y, b: once(y), lambda x, y, b: once(y - x))
    x = y = z = jnp.ones(3)
    (d_x, _, _), _ = dbo.oracles.penalty(problem, 2.0).directions(
        None, x, y, z, (), None
    )
    np.testing.assert_array_equal(d_x, 0)
    with pytest.raises(ValueError, match=r"[Pp]ure callbacks do not support"):
        dbo.oracles.soba(problem).directions(None, x, y, z, (), None)


def test_soba_takes_objectives_that_have_reverse_derivatives_alone():
    """One derived by hand, and one whose derivative the host computes."""

    @jax.custom_vjp
    def square(v):
        return v**2

    square.defvjp(lambda v: (v**2, v), lambda v, g: (2 * v * g,))

    def on_host(function, v):
        return jax.pure_callback(function, v, v, vmap_method="sequential")

    @jax.custom_vjp
    def summed(v):
        return on_host(np.cumsum, v)

    summed.defvjp(
        lambda v: (summed(v), None),
        lambda _, g: (on_host(lambda a: np.cumsum(a[::-1])[::-1].copy(), g),),
    )

    def problem(square, summed):
        return dbo.Problem(
            lambda x, y, b: jnp.sum(square(y)),
            lambda x, y, b: jnp.sum(square(y) * (1 + x**2) + y * summed(x)),
        )

    x, y, z = jax.random.normal(jax.random.key(0), (3, 4))
    found, exact = (
        dbo.oracles.soba(one).directions(None, x, y, z, (), None)[0]
        for one in (problem(square, summed), problem(jnp.square, jnp.cumsum))
    )
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


def test_a_batch_of_two_parts_is_split_by_level():
    problem = dbo.Problem(
        lambda x, y, b: b * jnp.sum(x) + jnp.sum(y), lambda x, y, b: b * jnp.sum(y**2)
    )
    x = y = jnp.ones(2)
    oracle = dbo.oracles.soba(problem)
    split = oracle.directions(None, x, y, 0 * y, (), dbo.Batch(3.0, 5.0))[0]
    whole = oracle.directions(None, x, y, 0 * y, (), 5.0)[0]
    np.testing.assert_array_equal(split[0], 3.0 * jnp.ones(2))
    np.testing.assert_array_equal(split[1], whole[1])


def test_the_penalty_must_be_positive():
    with pytest.raises(ValueError, match="lambda > 0, got 0"):
        dbo.oracles.penalty(toys.task().problem, 0)
