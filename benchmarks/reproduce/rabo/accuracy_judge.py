"""How a representation or a set of coefficients is judged, whatever method found it."""

import functools

import jax
import jax.numpy as jnp
import optax

from dbojax.tasks.classification import accuracy, cross_entropy

STEPS, RATE = 60, 0.2  # of Adam, on the lower level, from zero


def fitted(loss, start):
    """Minimise a loss by Adam with steps that shrink to nothing."""
    tx = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def step(carry, _):
        y, state = carry
        change, state = tx.update(jax.grad(loss)(y), state)
        return (optax.apply_updates(y, change), state), None

    (y, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, length=STEPS)
    return y


def one_head(kind, x, y0, pool, test):
    """Test accuracy of x with one head, fitted anew to the training data of all."""
    features = kind.features(x, pool.inputs)

    def loss(y):
        return cross_entropy(kind.logits(y, features), pool) + kind.penalty(x, y)

    y = fitted(loss, jax.tree.map(jnp.zeros_like, y0))
    return accuracy(kind.logits(y, kind.features(x, test.inputs)), test)


def own_heads(kind, x, y0, pool, test, shares):
    """Accuracy of x with a head for each client, fitted to its own data alone.

    Judged on the client's own distribution: the common test samples, each class in the
    proportion in which the client holds it. Clients without training data do not count.
    """
    clients = shares.shape[0]
    features = kind.features(x, pool.inputs)
    held = jnp.zeros(clients).at[pool.ids].add(1.0)
    weights = 1 / held[pool.ids]
    start = jax.tree.map(lambda leaf: jnp.zeros((clients, *leaf.shape)), y0)

    def loss(heads):
        own = jax.tree.map(lambda leaf: leaf[pool.ids], heads)
        logits = jax.vmap(lambda y, row: kind.logits(y, row[None])[0])(own, features)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, pool.labels)
        extra = jax.vmap(kind.penalty, (None, 0))(x, heads)
        return jnp.sum(each * weights) + jnp.sum(extra)

    return on_own(kind, x, fitted(loss, start), test, shares, held > 0)


def on_own(kind, x, heads, test, shares, counted):
    """Mean over clients of the accuracy of their heads on their own distributions."""
    features = kind.features(x, test.inputs)
    classes = jnp.arange(shares.shape[1])
    of_class = (test.labels[:, None] == classes) & test.mask[:, None]
    rates = of_class / jnp.maximum(of_class.sum(0, keepdims=True), 1)

    def of_client(y, share):
        hits = jnp.argmax(kind.logits(y, features), -1) == test.labels
        return jnp.sum((hits @ rates) * share) / jnp.maximum(jnp.sum(share), 1)

    found = jax.vmap(of_client)(heads, shares)
    return jnp.sum(jnp.where(counted, found, 0)) / jnp.maximum(jnp.sum(counted), 1)


def lifted(judge, kind):
    """A judge of all runs at once; data are arguments, or XLA would fold them."""
    return jax.jit(jax.vmap(functools.partial(judge, kind)))


def along(runs):
    """x -> accuracy of each run with one head: cheap enough to watch."""
    judge = lifted(one_head, runs.kind)
    return lambda x: judge(x, runs.y0, runs.pool, runs.test)


def at_end(runs):
    """x -> accuracy of each run with a head of their own for each client."""
    judge = lifted(own_heads, runs.kind)
    return lambda x: judge(x, runs.y0, runs.pool, runs.test, runs.shares)


def as_trained(runs, personal):
    """(x, y) -> accuracy with the server's y, or with the clients' on what is theirs.

    Each with the y that the method has, at full width.
    """

    def shared(kind, x, y, test, shares):
        del shares
        return accuracy(kind.logits(y, kind.features(x, test.inputs)), test)

    def own(kind, x, heads, test, shares):
        return on_own(kind, x, heads, test, shares, shares.sum(1) > 0)

    judge = lifted(own if personal else shared, runs.kind)
    return lambda x, y: judge(x, y, runs.test, runs.shares)
