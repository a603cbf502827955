"""CD-Adam beside a plain data-parallel loop of optax: overhead and bytes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import turns
from report import quartiles

import dbojax as dbo

WORKERS, BATCH, CLASSES = 8, 16, 10
B1, B2, RATE = 0.9, 0.99, 1e-3


class Size(NamedTuple):
    """A perceptron with one hidden layer, and the steps in one scan."""

    inputs: int
    width: int
    steps: int


SIZES = Size(64, 133, 50), Size(512, 1914, 5)  # 1e4 and 1e6 parameters


def arguments(size):
    """Parameters and each worker's samples."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    params = {
        "hidden": normal(size.inputs, size.width, scale=size.inputs**-0.5),
        "shift": jnp.zeros(size.width, jnp.float32),
        "out": normal(size.width, CLASSES, scale=size.width**-0.5),
        "bias": jnp.zeros(CLASSES, jnp.float32),
    }
    targets = jnp.asarray(rng.integers(CLASSES, size=(WORKERS, BATCH)))
    return params, (normal(WORKERS, BATCH, size.inputs), targets)


def loss(params, samples):
    inputs, targets = samples
    hidden = jax.nn.relu(inputs @ params["hidden"] + params["shift"])
    logits = hidden @ params["out"] + params["bias"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, targets
    ).mean()


def stacked(params, samples):
    return jax.vmap(jax.grad(loss), (None, 0))(params, samples)


def averaged(params, samples):
    """Their mean, as a product: far faster on CPU than ``mean`` over a short axis."""
    share = jnp.full(WORKERS, 1 / WORKERS, jnp.float32)
    return jax.tree.map(lambda g: jnp.tensordot(share, g, 1), stacked(params, samples))


def at_once(params, samples):
    """The same mean, of all workers' samples as one batch: only on one device."""
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), samples)
    return jax.grad(loss)(params, flat)


def contenders():
    """Label -> (gradients that the transform takes, transform)."""
    mix, sign = dbo.mixing.averaging(WORKERS), dbo.compressors.sign()
    cd_adam = dbo.optim.cd_adam(RATE, mix, sign, b1=B1, b2=B2)
    amsgrad = optax.amsgrad(RATE, B1, B2)
    return {
        "optax, mean of workers": (averaged, amsgrad),
        "optax, one batch": (at_once, amsgrad),
        "dbojax CD-Adam, sign": (stacked, cd_adam),
    }


def scanned(gradients, tx, steps):
    def program(state, samples):
        def body(state, _):
            params, memory = state
            updates, memory = tx.update(gradients(params, samples), memory, params)
            return (optax.apply_updates(params, updates), memory), None

        return jax.lax.scan(body, state, length=steps)

    return program


def traffic(memory, params):
    """Bytes of one worker in a step, up and down."""
    sent = optax.tree.get(memory, "traffic")
    if sent is None:
        dense = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        return dense, dense
    return sent.message, sent.down


def rows(repeats):
    base = "optax, mean of workers"
    for size in SIZES:
        params, samples = arguments(size)
        calls, states, sent = {}, {}, {}
        for who, (gradients, tx) in contenders().items():
            start = params, tx.init(params)
            program = jax.jit(scanned(gradients, tx, size.steps), donate_argnums=0)
            compiled = program.lower(start, samples).compile()
            calls[who], states[who] = turns.donated(compiled, start, samples)
            sent[who] = traffic(start[1], params)
        times = turns.taken_in_turns(calls, repeats)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        for who in calls:
            each = np.multiply(times[who], 1e3 / size.steps)
            mean = loss(states[who]()[0], jax.tree.map(jnp.concatenate, samples))
            yield {
                "parameters": count,
                "who": who,
                "ms / step": quartiles(each, 3),
                "time / optax": turns.times_base(times, who, base),
                "kB up": f"{sent[who][0] / 1e3:.1f}",
                "kB down": f"{sent[who][1] / 1e3:.1f}",
                "loss": f"{float(mean):.4f}",
            }
