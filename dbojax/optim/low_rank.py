"""PowerSGD: gradients as products of two thin matrices."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Mix, Traffic
from dbojax.channels import server
from dbojax.channels.links import wide
from dbojax.optim.exchange import as_rows, first


class PowersgdState(NamedTuple):
    """What earlier products left out, and where the next ones start."""

    residual: tuple  # of each leaf that is a matrix, (n, rows, columns)
    q: tuple  # likewise, (columns, rank)
    traffic: Traffic  # static


def powersgd(
    learning_rate: optax.ScalarOrSchedule,
    mix: Mix,
    rank: int,
    momentum: float = 0.0,
    *,
    seed: int = 0,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Send one power iteration on the mean gradient, with error feedback.

    With :math:`M_i` the gradient of a leaf plus its residual, as a matrix,

    .. math::
        P = \mathrm{orth}\Bigl(\tfrac1n \textstyle\sum_i M_i Q\Bigr), \quad
        Q \leftarrow \tfrac1n \textstyle\sum_i M_i^\top P, \quad
        e_i \leftarrow M_i - P Q^\top.

    The messages add up on the way, so the answer is as short as they are, and Q starts
    the next iteration. Leaves with fewer than two axes go dense; of others the last
    axis, JAX's axis of outputs, is the columns of M.

    Args:
        learning_rate: a number or an optax schedule.
        mix: gives everyone the mean, ``dbo.mixing.averaging(n)``, or
            ``dbo.mixing.along(axis_name, n)`` together with ``axis_name``.
        rank: columns of P and Q; a leaf has no more than its shorter side.
        momentum: of what arrives, as in ``optax.sgd``; the paper adds the newest
            product to it once more.
        seed: of the first Q, which is normal and the same on all workers.
        axis_name: of :func:`communicate`.

    Returns:
        An optax transform: stacked gradients in, one update out. Traffic counts P and
        Q up and down, and dense leaves next to P.

    Raises:
        ValueError: if ``mix`` does not average, ``rank`` is not a whole number of at
            least 1, or a mask of participants is given.
        TypeError: if ``mix`` is of another kind.

    Examples:
        >>> tx = powersgd(1.0, dbo.mixing.averaging(2), rank=1)
        >>> x, row = jnp.zeros((3, 4)), jnp.arange(1.0, 5.0)
        >>> gradients = jnp.stack([jnp.outer(jnp.ones(3), row), jnp.zeros((3, 4))])
        >>> updates, state = tx.update(gradients, tx.init(x), x)
        >>> bool(jnp.allclose(updates, -gradients.mean(0)))  # the mean has rank 1
        True
        >>> optax.tree.get(state, "traffic").message // x.itemsize
        7

    References:
        Vogels, Karimireddy and Jaggi (2019), arXiv:1905.13727.
    """
    if not isinstance(rank, numbers.Integral) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"`powersgd` needs a whole number rank >= 1, got {rank!r}.")
    rounds = _power_iteration(mix, int(rank), seed, axis_name)
    still = isinstance(momentum, int | float) and momentum == 0
    trace = () if still else (optax.trace(momentum),)
    return optax.chain(rounds, *trace, optax.scale_by_learning_rate(learning_rate))


def _power_iteration(mix, rank, seed, axis_name):
    channel, n = server(mix), mix.weights.shape[0]

    def mean(values):
        held, _, traffic = channel.send(jax.random.key(0), values, channel.init(values))
        return first(held), traffic

    def init(params) -> Any:
        matrices = [leaf for leaf in jax.tree.leaves(wide(params)) if leaf.ndim > 1]
        keys = jax.random.split(jax.random.key(seed), len(matrices))
        residual, q = [], []
        for key, leaf in zip(keys, matrices, strict=True):
            rows, columns = math.prod(leaf.shape[:-1]), leaf.shape[-1]
            residual.append(jnp.zeros((n, rows, columns), leaf.dtype))
            shape = (columns, min(rank, rows, columns))
            q.append(jax.random.normal(key, shape, leaf.dtype))
        memory = tuple(residual), tuple(q)
        stacked = jax.eval_shape(lambda tree: trees.replicate(tree, n), params)
        return PowersgdState(*memory, jax.eval_shape(iterate, stacked, *memory)[3])

    def iterate(stacked, residual, q):
        leaves, structure = jax.tree.flatten(stacked)
        thin = [leaf.ndim > 2 for leaf in leaves]
        matrices = [leaf for leaf, low in zip(leaves, thin, strict=True) if low]
        dense = [leaf for leaf, low in zip(leaves, thin, strict=True) if not low]
        wanted = [
            e + g.reshape(e.shape).astype(e.dtype)
            for g, e in zip(matrices, residual, strict=True)
        ]
        projected = [m @ start for m, start in zip(wanted, q, strict=True)]
        (p, dense), traffic = mean((projected, dense))
        # Where Gram and Schmidt would divide by zero, QR still gives a basis.
        p = [jnp.linalg.qr(a)[0] for a in p]
        q = [jnp.swapaxes(m, 1, 2) @ a for m, a in zip(wanted, p, strict=True)]
        if q:
            q, second = mean(q)
            traffic = traffic + second
        product = [a @ b.T for a, b in zip(p, q, strict=True)]
        left = tuple(m - a[None] for m, a in zip(wanted, product, strict=True))
        sources = iter(dense), iter(product)
        heard = [
            next(sources[low]).reshape(leaf.shape[1:]).astype(leaf.dtype)
            for leaf, low in zip(leaves, thin, strict=True)
        ]
        return jax.tree.unflatten(structure, heard), left, tuple(q), traffic

    def update(updates, state, params=None, *, mask=None, **extra) -> Any:
        del extra
        if mask is not None:
            raise ValueError(
                "`powersgd` hears all workers in every step and takes no mask; leave "
                "`mask` out."
            )
        rows = as_rows(updates, params, mix, axis_name, unstack=True)
        out, residual, q, _ = iterate(rows, state.residual, state.q)
        return out, PowersgdState(residual, q, state.traffic)

    return optax.GradientTransformationExtraArgs(init, update)
