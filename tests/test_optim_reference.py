"""Every optimiser against loops over the workers, five steps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_server as twin

import dbojax as dbo
from dbojax.optim.one_bit import l2_sign

STEPS, RATE = 5, 0.03
TOY = twin.DiagonalToy()
A, C = jnp.asarray(TOY.a), jnp.asarray(TOY.c)
MIX = dbo.mixing.averaging(TOY.n)
SIGN, TOP = dbo.compressors.sign(), dbo.compressors.top_k(10)
ONE_BIT = twin.by_vector(twin.scaled_sign)
TEN = twin.by_vector(twin.top_k(10))
L2 = twin.by_vector(twin.l2_sign)
DECAY = dbo.optim.two_step_decay(RATE, STEPS), twin.two_step_decay(RATE, STEPS)


def both_top(channel):
    """AMSGrad on what `channel` delivers, ten entries each way."""
    return optax.chain(
        dbo.communicate(channel(MIX, TOP, TOP)),
        dbo.optim.scale_by_amsgrad(),
        optax.scale_by_learning_rate(RATE),
    )


# name -> (ours, twin, its settings)
CASES = {
    "amsgrad": (
        optax.chain(
            dbo.communicate(dbo.channels.server(MIX)),
            dbo.optim.scale_by_amsgrad(0.8, 0.95, 1e-3),
            optax.scale_by_learning_rate(RATE),
        ),
        twin.amsgrad,
        {"rate": RATE, "betas": (0.8, 0.95), "eps": 1e-3},
    ),
    "cd_adam": (
        dbo.optim.cd_adam(DECAY[0], MIX, SIGN, weight_decay=0.1),
        twin.cd_adam,
        {"rate": DECAY[1], "compress": ONE_BIT, "weight_decay": 0.1},
    ),
    "cd_adam top_k": (
        dbo.optim.cd_adam(RATE, MIX, TOP),
        twin.cd_adam,
        {"rate": RATE, "compress": TEN},
    ),
    "ef_adam": (
        both_top(dbo.channels.ef14),
        twin.ef_adam,
        {"rate": RATE, "compress": TEN},
    ),
    "naive_adam": (
        both_top(dbo.channels.server),
        twin.naive_adam,
        {"rate": RATE, "compress": TEN},
    ),
    "ef_sgd": (
        dbo.optim.ef_sgd(DECAY[0], MIX, TOP),
        twin.ef14,
        {"rate": DECAY[1], "compress": TEN},
    ),
    "ef21_sgd": (
        dbo.optim.ef21_sgd(RATE, MIX, TOP),
        twin.ef21,
        {"rate": RATE, "compress": TEN},
    ),
    "ef21_sgdm": (
        dbo.optim.ef21_sgdm(RATE, MIX, SIGN, 0.3),
        twin.ef21,
        {"rate": RATE, "compress": ONE_BIT, "momentum": 0.3},
    ),
    "one_bit": (
        dbo.optim.one_bit_adam(
            RATE, MIX, 2, weight_decay=0.1, live=(jnp.arange(TOY.d) % 5 > 0)
        ),
        twin.one_bit_adam,
        {
            "rate": RATE,
            "freeze": 2,
            "compress": L2,
            "weight_decay": 0.1,
            "mask": (np.arange(TOY.d) % 5 > 0).astype(float),
        },
    ),
    "one_bit_on_gradients": (
        dbo.optim.one_bit_adam_on_gradients(RATE, MIX, 2, weight_decay=0.1),
        twin.one_bit_adam_on_gradients,
        {"rate": RATE, "freeze": 2, "compress": L2, "weight_decay": 0.1},
    ),
}


def visited(tx, steps, start=None):
    """Points of a descent on the toy, start first, and the last state."""
    x = jnp.zeros(TOY.d) if start is None else start

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(A * (x[None] - C), state, x)
        x = x + updates
        return (x, state), x

    (_, state), path = jax.lax.scan(step, (x, tx.init(x)), None, length=steps)
    return jnp.concatenate([x[None], path]), state


@pytest.mark.parametrize("case", CASES)
def test_five_steps_are_those_of_the_loops(case):
    ours, loops, settings = CASES[case]
    path = jax.jit(lambda: visited(ours, STEPS)[0])()
    slow = loops(TOY, TOY.start, STEPS, **settings)
    np.testing.assert_allclose(path, slow, rtol=0, atol=1e-12)
    assert np.abs(slow[-1]).max() > 1e-2


class MatrixToy:
    """The toy, its variable and data as a matrix of five rows."""

    n = TOY.n

    def gradient(self, worker, step, x):
        return TOY.gradient(worker, step, x.reshape(-1)).reshape(x.shape)


def test_powersgd_is_that_of_the_loops():
    tx = dbo.optim.powersgd(RATE, MIX, rank=2)
    x = jnp.zeros((5, 10))
    state = tx.init(x)
    slow = twin.power_sgd(MatrixToy(), x, STEPS, rate=RATE, q=np.asarray(state[0].q[0]))
    a, c = A.reshape(-1, 5, 10), C.reshape(-1, 5, 10)
    update = jax.jit(lambda x, state: tx.update(a * (x[None] - c), state, x))
    for step in range(STEPS):
        updates, state = update(x, state)
        x = x + updates
        np.testing.assert_allclose(x, slow[step + 1], rtol=0, atol=1e-12)


def test_powersgd_keeps_the_mean_and_counts_its_bytes():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 6), "dense": (7, 5), "bias": (6,), "one": ()}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    gradients = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(TOY.n, *p.shape))), params
    )
    tx = dbo.optim.powersgd(1.0, MIX, rank=3)
    updates, state = jax.jit(lambda g: tx.update(g, tx.init(params), params))(gradients)
    sent = optax.tree.get(state, "traffic")
    thin = 3 * (36 + 6 + 7 + 5) + 6 + 1
    assert sent.message == sent.down == 8 * thin
    assert (sent.total, sent.rounds) == (2 * TOY.n * 8 * thin, 4)
    mean = jax.tree.map(lambda g: g.mean(0), gradients)
    for name in ("bias", "one"):
        np.testing.assert_allclose(updates[name], -mean[name], atol=1e-15)
    for name, left in zip(("conv", "dense"), state[0].residual, strict=True):
        whole = left.mean(0).reshape(mean[name].shape) - updates[name]
        np.testing.assert_allclose(whole, mean[name], atol=1e-12)
        assert np.linalg.matrix_rank(updates[name].reshape(-1, shapes[name][-1])) == 3


def test_powersgd_survives_a_gradient_of_zero():
    tx = dbo.optim.powersgd(1.0, MIX, rank=2, momentum=0.9)
    x = jnp.ones((3, 4))
    update = jax.jit(tx.update)
    updates, state = update(jnp.zeros((TOY.n, 3, 4)), tx.init(x), x)
    assert (updates == 0).all()
    for _ in range(2):
        updates, state = update(jnp.ones((TOY.n, 3, 4)), state, x)
    assert jnp.isfinite(updates).all()
    assert jnp.abs(updates).max() > 0.1


def test_dense_leaves_need_one_exchange():
    tx = dbo.optim.powersgd(1.0, MIX, rank=2)
    sent = optax.tree.get(tx.init(jnp.ones(3)), "traffic")
    assert (sent.message, sent.down, sent.rounds) == (24, 24, 2)


def test_one_bit_adam_counts_both_phases():
    for tx in (CASES["one_bit"][0], CASES["one_bit_on_gradients"][0]):
        state = tx.init(jnp.zeros(TOY.d, jnp.float32))
        warmup = optax.tree.get(state, "warmup_traffic")
        later = optax.tree.get(state, "traffic")
        assert warmup.message == warmup.down == 4 * TOY.d
        assert later.message == later.down == 4 * 2 + 4
        assert later.total == TOY.n * (later.message + later.down)


def test_the_l2_scale_expands_sparse_vectors(key):
    def error(compressor, v):
        payload, _ = compressor.compress(key, v, ())
        return float(((compressor.decompress(payload, v) - v) ** 2).sum())

    sparse = jnp.zeros(64).at[3].set(2.0)
    assert error(l2_sign(), sparse) == pytest.approx(2 * 4 * (1 - 1 / 8))
    assert error(SIGN, sparse) == pytest.approx(4 * (1 - 1 / 64))
    dense = jax.random.normal(key, (64,))
    assert error(l2_sign(), dense) < float((dense**2).sum())
    assert l2_sign().delta is None
    assert l2_sign().omega is None
