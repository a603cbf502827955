"""1-bit Adam: dense steps until the second moment has settled, then signs."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Compressor, Mix, State, Traffic, Tree
from dbojax.channels import server
from dbojax.channels.links import over_server, residual, wide
from dbojax.compressors import on_trees, stateless
from dbojax.compressors.quantised import Packed, pack, unpack, widened
from dbojax.optim.amsgrad import averaged, corrected
from dbojax.optim.exchange import as_rows, first


class OneBitState(NamedTuple):
    """Moments, residuals of both ends, bytes of a step before and after the freeze."""

    steps: jax.Array  # (), int32
    mu: Tree
    nu: Tree
    channel: State
    traffic: Traffic  # static, of a compressed step
    warmup_traffic: Traffic  # static, of each of the `freeze` steps before


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    mix: Mix,
    freeze: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    live: Tree | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam for ``freeze`` steps, then signs of momenta over a second moment at rest.

    The first steps average dense gradients and correct no bias. Then v stays and

    .. math::
        b_i = e_i + \beta_1 m + (1 - \beta_1) g_i, \quad
        c_i = C(b_i), \quad e_i \leftarrow b_i - c_i, \quad
        C(b) = \tfrac{\|b\|_2}{\sqrt d} \mathrm{sign}(b), \\
        s = e + \tfrac1n \textstyle\sum_i c_i, \quad m \leftarrow C(s), \quad
        e \leftarrow s - m, \quad
        x \leftarrow x - \alpha_t \Bigl(\frac{m}{\sqrt v + \epsilon} + \lambda x\Bigr)

    with sign(0) = +1. This sign is no contraction: a vector of few large entries is
    sent with an error larger than itself.

    Args:
        learning_rate: alpha, a number or an optax schedule.
        mix: gives everyone the mean, ``dbo.mixing.averaging(n)``, or
            ``dbo.mixing.along(axis_name, n)`` together with ``axis_name``.
        freeze: dense steps at the start, at least 1.
        b1: of the momentum.
        b2: of the second moment.
        eps: keeps the divisor from zero.
        weight_decay: lambda.
        live: a tree like the parameters, 0 where the momentum shall stay 0 once it is
            compressed. One bit cannot say 0, and where v is 0 any momentum is a leap.
        axis_name: of :func:`communicate`.

    Returns:
        An optax transform: stacked gradients in, one update out. Its state has
        ``traffic`` and ``warmup_traffic``.

    Raises:
        ValueError: if ``mix`` does not average, or ``freeze`` is not a whole number of
            at least 1.
        TypeError: if ``mix`` is of another kind.

    Examples:
        >>> tx = one_bit_adam(1e-2, dbo.mixing.averaging(4), freeze=1)
        >>> state = tx.init(jnp.ones(64, jnp.float32))
        >>> optax.tree.get(state, "warmup_traffic").message
        256
        >>> optax.tree.get(state, "traffic").message  # 64 bits and a scale
        12

    References:
        Tang et al. (2021), arXiv:2102.02888, following its public implementation, in
        which each worker is the server of one chunk, with a scale and a residual of its
        own; here one server answers with one scale.
    """
    phases = _phases(mix, freeze, "one_bit_adam")

    def init(params) -> Any:
        mu, nu = _moments(params), _moments(params)
        memory, traffic, warmup = phases.init(params)
        steps = jnp.zeros((), jnp.int32)
        return OneBitState(steps, mu, nu, memory, traffic, warmup)

    def update(updates, state, params=None, *, mask=None, **extra) -> Any:
        del extra
        rows = as_rows(updates, params, mix, axis_name, unstack=True)

        def warm(memory):
            mean = phases.dense(wide(rows), mask)
            squares = jax.tree.map(jnp.square, mean)
            return averaged(state.mu, mean, b1), averaged(state.nu, squares, b2), memory

        def frozen(memory):
            mu = trees.replicate(state.mu, mix.weights.shape[0])
            mu, memory = phases.compressed(averaged(mu, rows, b1), memory, mask)
            if live is not None:
                mu = jax.tree.map(lambda m, a: m * jnp.asarray(a, m.dtype), mu, live)
            return mu, state.nu, memory

        mu, nu, memory = jax.lax.cond(state.steps < freeze, warm, frozen, state.channel)
        scaled = jax.tree.map(
            lambda u, m, v: (m / (jnp.sqrt(v) + jnp.asarray(eps, v.dtype))).astype(
                u.dtype
            ),
            rows,
            mu,
            nu,
        )
        steps = optax.safe_increment(state.steps)
        return scaled, state._replace(steps=steps, mu=mu, nu=nu, channel=memory)

    return optax.chain(
        optax.GradientTransformationExtraArgs(init, update),
        *_decay(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


class TwoPhaseState(NamedTuple):
    """Residuals of both ends, bytes of a step before and after the freeze."""

    steps: jax.Array  # (), int32
    channel: State
    traffic: Traffic
    warmup_traffic: Traffic


def one_bit_adam_on_gradients(
    learning_rate: optax.ScalarOrSchedule,
    mix: Mix,
    freeze: int,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""1-bit Adam as a baseline of CD-Adam: gradients travel, and not momenta.

    The messages of :func:`one_bit_adam` with :math:`g_i` in place of the momentum, the
    same for the server, and then

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) u, \quad
        x \leftarrow x - \alpha_t
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon},

    u being the answer plus :math:`\lambda x`; v rests after ``freeze`` dense steps.
    Args, return value and errors as for :func:`one_bit_adam`.

    References:
        The baseline in our formulation of CD-Adam (arXiv 2111.00705), following the
        authors' public code.
    """
    phases = _phases(mix, freeze, "one_bit_adam_on_gradients")

    def init(params) -> Any:
        return TwoPhaseState(jnp.zeros((), jnp.int32), *phases.init(params))

    def update(updates, state, params=None, *, mask=None, **extra) -> Any:
        del extra
        rows = as_rows(updates, params, mix, axis_name, unstack=True)
        mean, memory = jax.lax.cond(
            state.steps < freeze,
            lambda memory: (phases.dense(wide(rows), mask), memory),
            lambda memory: phases.compressed(wide(rows), memory, mask),
            state.channel,
        )
        mean = jax.tree.map(lambda a, u: a.astype(u.dtype), mean, rows)
        steps = optax.safe_increment(state.steps)
        return mean, state._replace(steps=steps, channel=memory)

    return optax.chain(
        optax.GradientTransformationExtraArgs(init, update),
        *_decay(weight_decay),
        _scale_by_frozen_adam(b1, b2, eps, freeze),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_frozen_adam(b1, b2, eps, freeze):
    """Adam whose second moment rests after ``freeze`` steps."""

    def update(updates, state, params=None) -> Any:
        del params
        count = optax.safe_increment(state.count)
        mu = averaged(state.mu, wide(updates), b1)
        nu = averaged(state.nu, jax.tree.map(jnp.square, wide(updates)), b2)
        nu = jax.tree.map(lambda a, b: jnp.where(count <= freeze, a, b), nu, state.nu)
        scaled = jax.tree.map(
            lambda u, m, v: (m / (jnp.sqrt(v) + jnp.asarray(eps, v.dtype))).astype(
                u.dtype
            ),
            updates,
            corrected(mu, 1 - b1**count),
            corrected(nu, 1 - b2**count),
        )
        return scaled, optax.ScaleByAdamState(count, mu, nu)

    def init(params) -> Any:
        count = jnp.zeros((), jnp.int32)
        return optax.ScaleByAdamState(count, _moments(params), _moments(params))

    return optax.GradientTransformation(init, update)


def l2_sign() -> Compressor:
    """Signs with the scale that keeps the norm; declares no law, as it contracts not.

    The squared error is ``2 |v|_2^2 (1 - |v|_1 / (sqrt(d) |v|_2))``, which exceeds
    ``|v|_2^2`` for sparse vectors.
    """

    def compress(key, v):
        del key
        v = widened(v)
        scale = jnp.sqrt(jnp.vdot(v, v, precision="highest") / v.size)
        return Packed(pack(v >= 0, 1), scale)

    def decompress(payload, like):
        positive = unpack(payload.words, 1, like.size) == 1
        return jnp.where(positive, payload.scale, -payload.scale).astype(like.dtype)

    return on_trees(stateless(compress, decompress))


class _Phases(NamedTuple):
    init: Callable  # params -> (memory, traffic, warm-up traffic)
    dense: Callable  # (rows, mask) -> mean
    compressed: Callable  # (rows, memory, mask) -> (mean, memory)


def _phases(mix, freeze, name) -> _Phases:
    """What both forms send; nothing in it is random."""
    if not isinstance(freeze, numbers.Integral) or freeze < 1:
        raise ValueError(
            f"`{name}` needs a whole number freeze >= 1 of dense steps, which the "
            f"second moment is made of; got {freeze!r}."
        )
    plain = server(mix)
    signs = over_server(mix, residual(l2_sign()), residual(l2_sign()))

    def init(params):
        known = trees.replicate(_moments(params), mix.weights.shape[0])
        memory, key = signs.init(known), jax.random.key(0)
        traffic = jax.eval_shape(signs.send, key, known, memory)[2]
        warmup = jax.eval_shape(plain.send, key, known, plain.init(known))[2]
        return memory, traffic, warmup

    def dense(rows, mask):
        key = jax.random.key(0)
        return first(plain.send(key, rows, plain.init(rows), mask)[0])

    def compressed(rows, memory, mask):
        held, memory, _ = signs.send(jax.random.key(0), rows, memory, mask)
        return first(held), memory

    return _Phases(init, dense, compressed)


def _moments(params):
    return jax.tree.map(jnp.zeros_like, wide(params))


def _decay(weight_decay):
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return ()
    return (optax.add_decayed_weights(weight_decay),)
