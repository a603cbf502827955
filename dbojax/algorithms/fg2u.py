"""(FG)²U on a network whose nodes have lower levels of their own: scalars travel.

Our formulation: nodes push random directions through their own inner solvers
(arXiv:2406.14095) and exchange the slopes; who knows the key rebuilds the rest.
"""
# ruff: noqa: D417 - what means the same in both is described once.

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.algorithms.compose import Step, local_step
from dbojax.base import (
    Algorithm,
    Channel,
    Consensus,
    Metrics,
    Mix,
    Problem,
    Rounds,
    State,
    Traffic,
    Tree,
)
from dbojax.hypergradients import ForwardGradient
from dbojax.hypergradients.inner import upper_batch
from dbojax.strategies.common import check_channel, lift_of


class ScalarState(NamedTuple):
    """State of a network that sends slopes; all leaves are stacked."""

    x: Tree
    y: Tree
    channel: State
    optimizer: optax.OptState


def fg2u_shared(
    problem: Problem, scalars: ForwardGradient, channel: Channel, upper_step: Step
) -> Algorithm:
    r"""All nodes push the same directions and average their slopes.

    .. math::
        \hat g = \frac1b \sum_{i=1}^b \Big(\frac1n \sum_k w_{k,i}\Big) v_i, \quad
        w_{k,i} = \langle \nabla h_k(x), v_i \rangle

    The error is :math:`\frac{N-1}{b} |\frac1n \sum_k \nabla h_k|^2`: it vanishes at a
    solution, however unlike the nodes are.

    Args:
        problem: objectives of one node.
        scalars: ``dbo.hypergradients.forward_scalars(problem, inner, directions)``.
        channel: how the b slopes travel, e.g. ``dbo.channels.server(mix)``. Over a
            channel that does not give all nodes the same, x drifts apart; one that
            compresses differences to what it sent before gains nothing, as directions
            are new in each step.
        upper_step: of x: a number, a schedule, or an optax transform.

    Returns:
        An algorithm that sends b numbers per node and step, however long x is; y
        carries on where the inner solver ended, unless that starts anew by itself. A
        batch of type ``Rounds`` gives each inner step its own samples.

    Raises:
        ValueError: if the channel keeps sums but no values, as ``dbo.channels.push``.
        TypeError: if a part is of another kind.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: jnp.sum((y - b) ** 2), lambda x, y, b: y)
        >>> two = dbo.hypergradients.forward_scalars(p, lambda key, x, y, b: x, 2, 2)
        >>> server = dbo.channels.server(dbo.mixing.averaging(2))
        >>> method, x = fg2u_shared(p, two, server, 0.1), jnp.zeros((2, 5))
        >>> batch = jnp.array([[1.0] * 5, [5.0] * 5])
        >>> state, _ = dbo.run(method, jax.random.key(0), method.init(x, x), batch, 200)
        >>> bool(jnp.allclose(state.x, 3.0, atol=1e-4))
        True

    References:
        Shen et al. (2024), arXiv:2406.14095, eq. 7-10; the exchange: our formulation.
    """
    trees.check_type(
        channel, Channel, "channel", "dbo.channels.server(dbo.mixing.averaging(n))"
    )
    check_channel(channel, "channel")
    lift = lift_of(channel)

    def init(x):
        shape = trees.num_nodes(x, "x"), scalars.directions
        return channel.init(jnp.zeros(shape, jax.eval_shape(trees.ravel, x).dtype))

    def gradients(key, key_slopes, x, w, state):
        mean, state, traffic = channel.send(key, w, state)
        rebuild = lift(lambda x, mean: scalars.combine(key_slopes, x, mean))
        return rebuild(x, mean), state, traffic

    def one_for_all(key, n):
        return jnp.broadcast_to(key, (n, *key.shape))  # old keys have an axis

    return _algorithm(problem, scalars, upper_step, init, gradients, one_for_all, lift)


def fg2u_own(
    problem: Problem, scalars: ForwardGradient, mix: Mix, upper_step: Step
) -> Algorithm:
    r"""Every node pushes directions of its own and tells its neighbours the slopes.

    .. math::
        \hat g_k = \sum_l W_{kl}\, \frac1b \sum_{i=1}^b w_{l,i} v_{l,i}, \quad
        w_{l,i} = \langle \nabla h_l(x_l), v_{l,i} \rangle

    Nodes rebuild the estimates of their neighbours from the key and b numbers each.
    With a server or a complete graph the error is
    :math:`\frac{N-1}{nb} \frac1n \sum_k |\nabla h_k|^2`: less than that of
    :func:`fg2u_shared` while nodes are alike, more near a solution if they are not.

    Args:
        problem, scalars, upper_step: as for :func:`fg2u_shared`.
        mix: who hears of whom, e.g. ``dbo.mixing.averaging(n)`` for everyone of all.

    Returns:
        An algorithm that sends b numbers over each link and step.

    Raises:
        TypeError: if a part is of another kind.

    References:
        Shen et al. (2024), arXiv:2406.14095, eq. 7-10; the exchange: our formulation.
    """
    trees.check_type(mix, Mix, "mix", "dbo.mixing.averaging(n)")

    def rebuilt(key, x, w, nodes, weights):
        def add(total, one):
            node, w, weight = one
            piece = scalars.combine(jax.random.fold_in(key, node), x, w)
            return jax.tree.map(
                lambda t, p: t + trees.times(weight, p), total, piece
            ), None

        zeros = jax.tree.map(jnp.zeros_like, x)
        return jax.lax.scan(add, zeros, (nodes, w, weights))[0]

    def gradients(key, key_slopes, x, w, state):
        del key
        heard = mix.exchange(w)
        message = trees.nbytes(trees.one_node(w))
        traffic = Traffic(message, message * mix.links, rounds=1)
        grads = mix.lift(lambda *own: rebuilt(key_slopes, *own))(
            x, heard, mix.heard, mix.weights
        )
        return grads, state, traffic

    def init(x):
        trees.check_nodes(x, mix.weights.shape[0], "x")
        return ()

    keys = trees.node_keys
    return _algorithm(problem, scalars, upper_step, init, gradients, keys, mix.lift)


def _algorithm(
    problem: Problem,
    scalars: ForwardGradient,
    upper_step: Step,
    init_channel: Callable,
    gradients: Callable,
    node_keys: Callable,
    lift: Callable,
) -> Algorithm:
    """Slopes of all nodes, an exchange, and a step of x."""
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_type(
        scalars,
        ForwardGradient,
        "scalars",
        "dbo.hypergradients.forward_scalars(problem, inner)",
    )
    optimizer = local_step(upper_step)

    def init(x, y):
        x, y = (jax.tree.map(lambda a: jnp.array(a, copy=True), v) for v in (x, y))
        trees.check_floating(x, "x")
        trees.check_floating(y, "y")
        trees.check_nodes(y, trees.num_nodes(x, "x"), "y")
        return ScalarState(x, y, init_channel(x), jax.vmap(optimizer.init)(x))

    def step(key, state, batch):
        trees.check_type(state, ScalarState, "state", "method.init(x, y)")
        n = trees.num_nodes(state.x, "x")
        nodes_first = batch
        if isinstance(batch, Rounds):
            trees.check_batch(batch.inner, n, "batch.inner", axis=1)
            trees.check_batch(batch.outer, n, "batch.outer")
            inner = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batch.inner)
            nodes_first = Rounds(batch.outer, inner)
        else:
            trees.check_batch(batch, n, "batch")
        key_slopes, key_channel = jax.random.split(key)
        keys = node_keys(key_slopes, n)
        slopes_at = lift(scalars.coefficients)
        w, y, _ = slopes_at(keys, state.x, state.y, nodes_first)
        grads, memory, traffic = gradients(
            key_channel, key_slopes, state.x, w, state.channel
        )
        moves, moments = jax.vmap(optimizer.update)(grads, state.optimizer, state.x)
        x = optax.apply_updates(state.x, moves)
        upper = lift(problem.upper)(x, y, upper_batch(batch))
        metrics = Metrics(
            trees.node_mean(upper),
            trees.norm(trees.node_mean(grads)),
            Consensus(
                trees.consensus_error(x), trees.consensus_error(y), jnp.zeros(())
            ),
            traffic,
            scalars.calls,
        )
        return ScalarState(x, y, memory, moments), metrics

    return Algorithm(init, step)
