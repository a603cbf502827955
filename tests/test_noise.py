"""Gradient noise: its place in the directions, its size, its dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax.oracles import soba
from dbojax.tasks.noise import with_gradient_noise


def directions(task, batch, x, y, z):
    oracle = soba(task.problem)
    one = jax.tree.map(lambda leaf: leaf[0], batch)
    return jax.jit(oracle.directions)(None, x, y, z, (), one)[0]


def cleaning():
    labels = np.arange(60) % 3
    inputs = np.random.default_rng(0).normal(size=(60, 4))
    dataset = dbo.tasks.data.Dataset(inputs, labels, 3, "blobs")
    return dbo.tasks.hyper_cleaning(dbo.tasks.data.distribute(dataset, n=2))


TASKS = {
    "quadratic": lambda: dbo.tasks.quadratic(n=2, dx=3, dy=4),
    "worker_quadratic": lambda: dbo.tasks.worker_quadratic(n=2, d=3),
    "hyper_cleaning": cleaning,
}


@pytest.mark.parametrize("name", TASKS)
def test_every_direction_is_off_by_its_own_noise(name, key):
    task = TASKS[name]()
    noisy = with_gradient_noise(task, 0.5)
    x, y = (v + 0.1 for v in (task.x0, task.y0))
    batch = noisy.sampler(4)(key, 0)
    clean = directions(task, task.batch, x, y, y)
    calm = directions(noisy, noisy.batch, x, y, y)
    drawn = directions(noisy, batch, x, y, y)
    off = batch.upper.x[0], batch.lower.y[0], -batch.upper.y[0]
    for still, found, wanted, change in zip(calm, drawn, clean, off, strict=True):
        np.testing.assert_allclose(still, wanted, atol=1e-13)
        np.testing.assert_allclose(found - wanted, change, atol=1e-13)


@pytest.mark.parametrize("b", [1, 4])
def test_noise_has_the_promised_size(b, key):
    sampler = with_gradient_noise(TASKS["quadratic"](), 3.0).sampler(b)
    many = jax.jit(jax.vmap(sampler, (None, 0)))(key, jnp.arange(2000))
    for leaf in (many.upper.x, many.upper.y, many.lower.y):
        np.testing.assert_allclose(leaf.std(), 3.0 / b**0.5, rtol=0.05)
    assert float(jnp.abs(jnp.mean(many.upper.y * many.lower.y))) < 0.5 / b


@pytest.mark.parametrize("sigma", [1.0, np.float64(1.0), jnp.asarray(1.0)])
def test_the_noise_has_the_dtype_of_the_variables(sigma, key):
    task = TASKS["quadratic"]()
    short = task._replace(x0=task.x0.astype(jnp.float32))
    batch = with_gradient_noise(short, sigma).sampler(np.int64(4))(key, 0)
    assert (batch.upper.x.dtype, batch.lower.y.dtype) == (jnp.float32, jnp.float64)


def test_messages():
    with pytest.raises(ValueError, match=r"sigma=-1\.0"):
        with_gradient_noise(TASKS["quadratic"](), -1.0)
    with pytest.raises(ValueError, match="batch_size=0"):
        with_gradient_noise(TASKS["quadratic"](), 1.0).sampler(0)
