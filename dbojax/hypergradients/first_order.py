"""Hypergradients from gradients alone, without products of second derivatives."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Calls, Hypergradient, Problem, Tree, by_level
from dbojax.hypergradients.common import (
    check_positive,
    check_state,
    cost,
    finish,
    no_state,
    prepare,
)
from dbojax.hypergradients.inner import (
    descent,
    lower_batch,
    schedule,
    upper_batch,
)


def darts(
    problem: Problem, step_size: float | jax.Array, epsilon: float = 0.01
) -> Hypergradient:
    r"""Gradient through one descent step, its cross term by a central difference.

    With :math:`y' = y - \xi \nabla_y g(x, y)`, :math:`v = \nabla_y f(x, y')` and
    :math:`\varepsilon = \epsilon / |v|`,

    .. math::
        \nabla_x f(x, y') - \xi \,
        \frac{\nabla_x g(x, y + \varepsilon v) - \nabla_x g(x, y - \varepsilon v)}
        {2 \varepsilon}

    It differs from reverse mode through that step by :math:`O(\epsilon^2)`, and not at
    all where g is quadratic in y.

    Args:
        problem: objectives of one node.
        step_size: xi.
        epsilon: how far y is moved, as a Euclidean norm; in float32 much less than
            0.01 drowns in rounding.

    Returns:
        An estimator without state, which returns y'. Of ``Rounds`` it sees the outer
        samples.

    Raises:
        ValueError: if a setting is not positive; from ``estimate``, if the variables
            are not floating point or an objective is not a scalar.
        TypeError: if ``problem`` is of another kind.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> args = jax.random.key(0), jnp.array(2.0), jnp.array(1.0), (), None
        >>> g, y, _, _ = darts(p, 0.5).estimate(*args)
        >>> round(float(g), 6), float(y)
        (0.25, 1.5)

    References:
        Liu, Simonyan and Yang (2019), arXiv:1806.09055, equations 7 and 8.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    check_positive(step_size, "step_size", "darts")
    check_positive(epsilon, "epsilon", "darts")
    calls = Calls(gradients=5)

    def estimate(key, x, y, state, batch):
        del key
        x, start = prepare(problem, x, y, batch)
        samples = lower_batch(batch)
        slope = jax.grad(problem.lower, 1)(x, start, samples)
        y = jax.tree.map(lambda a, d: a - trees.times(step_size, d), start, slope)
        value, (f_x, v) = jax.value_and_grad(problem.upper, (0, 1))(
            x, y, upper_batch(batch)
        )
        length = trees.norm(v)
        # A step of length epsilon along v; for v = 0 no step at all.
        scale = jnp.where(length > 0, epsilon / jnp.where(length > 0, length, 1), 0)

        def slope_at(sign):
            at = jax.tree.map(lambda a, d: a + trees.times(sign * scale, d), start, v)
            return jax.grad(problem.lower)(x, at, samples)

        ahead, behind = slope_at(1), slope_at(-1)
        weight = step_size * length / (2 * epsilon)
        hypergrad = jax.tree.map(
            lambda f, a, b: f - trees.times(weight, a - b), f_x, ahead, behind
        )
        hypergrad, y, info = finish(hypergrad, y, start, value, cost(calls))
        return hypergrad, y, state, info

    return Hypergradient(no_state, estimate, calls)


class PenaltyState(NamedTuple):
    """What :func:`penalty` remembers between estimates."""

    z: Tree  # the plain lower variable, like y
    penalised: optax.OptState  # of y
    plain: optax.OptState  # of z


def penalty(
    problem: Problem,
    weight: float | jax.Array,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> Hypergradient:
    r"""Difference of two lower solutions, one of them penalised; biased.

    .. math::
        y \approx \arg\min_y \tfrac1\lambda f(x, y) + g(x, y), \quad
        z \approx \arg\min_z g(x, z), \\
        \nabla_x f(x, y) + \lambda\, (\nabla_x g(x, y) - \nabla_x g(x, z))

    The bias is :math:`O(1/\lambda)` once both have converged; errors of y and z count
    :math:`\lambda` times.

    Args:
        problem: objectives of one node.
        weight: lambda > 0; beyond 1000 the difference needs float64.
        optimizer: moves both, with a state each, which is kept between estimates.
        steps: per estimate, on both.

    Returns:
        An estimator that returns the penalised y; z is in the state and starts at y. A
        batch of type ``Rounds`` gives each step its own samples.

    Raises:
        ValueError: if a setting is impossible; from ``estimate``, if the variables are
            not floating point, an objective is not a scalar, or ``Rounds`` are too few.
        TypeError: if a part is of another kind.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> hyper = penalty(p, 9.0, optax.sgd(0.5), steps=60)
        >>> x, y = jnp.array(2.0), jnp.array(0.0)
        >>> g, *_ = hyper.estimate(jax.random.key(0), x, y, hyper.init(x, y), None)
        >>> round(float(g), 6)  # 1 without the penalty's bias
        0.9

    References:
        Kwon, Kwon, Wright and Nowak (2023), arXiv:2301.10945, F2SA; Chen, Ma and Zhang
        (2023), arXiv:2306.14853, F2BA. Here y moves along the penalised gradient
        divided by lambda, so that one step size suits both.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    check_positive(weight, "weight", "penalty")
    plain = descent(problem, optimizer, steps)  # what z does; checks the settings
    calls = Calls(gradients=3 * steps + 3)

    def init(x, y):
        del x
        # A copy: a state may be donated.
        y = jax.tree.map(lambda a: jnp.array(a, copy=True), y)
        return PenaltyState(y, optimizer.init(y), optimizer.init(y))

    def descend(x, batch, carry, scheduled):
        y, state = carry
        upper, lower = by_level(batch if scheduled[1] is None else scheduled[1])
        f_y = jax.grad(problem.upper, 1)(x, y, upper)
        slopes = [jax.grad(problem.lower, 1)(x, at, lower) for at in (y, state.z)]
        d_y = jax.tree.map(lambda f, g: trees.times(1 / weight, f) + g, f_y, slopes[0])
        moved_y, penalised = optimizer.update(d_y, state.penalised, y)
        moved_z, plain = optimizer.update(slopes[1], state.plain, state.z)
        z = optax.apply_updates(state.z, moved_z)
        return (
            optax.apply_updates(y, moved_y),
            PenaltyState(z, penalised, plain),
        ), None

    def estimate(key, x, y, state, batch):
        del key
        prepare(problem, x, y, batch, plain)
        x, start = prepare(problem, x, y, batch)
        check_state(state, init, x, start)
        (y, moved), _ = jax.lax.scan(
            lambda carry, scheduled: descend(x, batch, carry, scheduled),
            (start, state),
            schedule(batch, 0, steps),
        )
        value, f_x = jax.value_and_grad(problem.upper)(x, y, upper_batch(batch))
        at_y, at_z = (
            jax.grad(problem.lower)(x, at, lower_batch(batch)) for at in (y, moved.z)
        )
        hypergrad = jax.tree.map(
            lambda f, a, b: f + trees.times(weight, a - b), f_x, at_y, at_z
        )
        # Second moments that overflow stop an optimiser for ever, at a finite y.
        sound = jnp.stack(jax.tree.leaves(jax.tree.map(_sound, moved, state))).all()
        hypergrad, y, info = finish(hypergrad, y, start, value, cost(calls), sound)
        # A y that is not finite was put back, so its companions are too.
        state = jax.tree.map(lambda a, b: jnp.where(info.ok, a, b), moved, state)
        return hypergrad, y, state, info

    return Hypergradient(init, estimate, calls)


def _sound(after: jax.Array, before: jax.Array) -> jax.Array:
    """Whether no entry of an optimiser's memory stopped being finite."""
    if not jnp.issubdtype(after.dtype, jnp.floating):
        return jnp.array(True)
    return (jnp.isfinite(after) | ~jnp.isfinite(before)).all()
