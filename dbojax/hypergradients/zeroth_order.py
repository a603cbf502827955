"""Estimators that only run the inner solver: finite differences and ES."""
# ruff: noqa: D417 - what means the same in all of them is described once, in the first.

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Hypergradient, Problem, Tree
from dbojax.hypergradients.common import (
    check_positive,
    cost,
    finish,
    no_state,
    prepare,
)
from dbojax.hypergradients.directions import (
    Law,
    check_directions,
    direction_key,
    gaussian,
    rademacher,
    sample_variance,
)
from dbojax.hypergradients.inner import (
    Inner,
    Solver,
    check_count,
    objective,
    solve_calls,
)
from dbojax.hypergradients.tangents import Swept, sweep

# (law, swept) -> estimate of the error's square
Variance = Callable[[Law, Swept], jax.Array]


class Difference(NamedTuple):
    """How the slope of h along v is told from values of h."""

    # (h, step, value) -> slope: h as a function of the move along v; value is h(0)
    slope: Callable[[Callable[[jax.Array | float], jax.Array], float, jax.Array], Tree]
    solves: int  # runs of the solver for each direction, beyond that at x


# (h(x + mu v) - h(x)) / mu; bias of order mu.
one_sided = Difference(lambda h, step, value: (h(step) - value) / step, 1)

# (h(x + mu v) - h(x - mu v)) / 2 mu; bias of order mu^2.
central = Difference(lambda h, step, value: (h(step) - h(-step)) / (2 * step), 2)

# h(x + mu v) / mu: no difference at all, the mean over v makes it one.
_no_baseline = Difference(lambda h, step, value: h(step) / step, 1)


def zeroth_order(
    problem: Problem,
    inner: Inner | Solver,
    directions: int = 32,
    step: float = 1e-4,
    difference: Difference = one_sided,
    law: Law = rademacher,
    chunk: int = 8,
) -> Hypergradient:
    r"""Forward gradient with difference quotients for slopes, (FG)²U-ZO.

    .. math::
        \hat\nabla h = \frac1b \sum_{i=1}^b w_i v_i, \quad
        w_i = \frac{h(x + \mu v_i) - h(x)}\mu

    The solver is never differentiated. All its runs use one key, so its noise cancels
    in the differences; h(x) is shared by all, b + 1 runs in all. With ``central`` there
    are 2 b, and one at x for the returned value and y.

    In float32 values of h carry an error of about 1e-7, which the quotient divides by
    the step: take float64, or a step about 1e-2.

    Args:
        problem: objectives of one node.
        inner: steps, or any function ``(key, x, y, batch) -> y``.
        directions: b, a multiple of ``chunk``.
        step: :math:`\mu`.
        difference: ``one_sided`` or ``central``.
        law: of the directions.
        chunk: directions at a time; costs memory, the result does not depend on it.

    Returns:
        An estimator without state; ``info.variance`` leaves out the bias.

    Raises:
        ValueError: if a number is not positive or ``chunk`` does not divide
            ``directions``; from ``estimate``, as :func:`reverse`, and if an orthogonal
            law cannot draw as many directions.
        TypeError: if a part is of another kind.

    Examples:
        A central quotient is exact on a quadratic, here with one entry:

        >>> p = dbo.Problem(lambda x, y, b: y**2 / 2, lambda x, y, b: (y - x) ** 2)
        >>> def solve(key, x, y, batch):
        ...     return 3 * x
        >>> hyper = zeroth_order(p, solve, 1, 0.5, central, chunk=1)
        >>> x, y = jnp.array(2.0), jnp.array(0.0)
        >>> float(hyper.estimate(jax.random.key(0), x, y, (), None)[0])
        18.0

    References:
        Shen et al. (2024), arXiv:2406.14095, eq. 16 and Appendix D; ``central``: our
        formulation.
    """

    def variance(law, swept):
        return sample_variance(law, swept.coefficients, swept.squares)

    check_positive(step, "step", "zeroth_order")
    parts = problem, inner, directions, step, difference, law, chunk, variance
    return _differences("zeroth_order", *parts)


def es(
    problem: Problem,
    inner: Inner | Solver,
    directions: int = 32,
    sigma: float = 0.1,
    chunk: int = 8,
) -> Hypergradient:
    r"""Evolution strategies: the gradient of a smoothed h, from its values alone.

    .. math::
        \frac1{b \sigma} \sum_{i=1}^b h(x + \sigma v_i) \, v_i, \quad v_i \sim N(0, I),

    unbiased for the gradient of :math:`E\,h(x + \sigma v)`. Its error grows with
    :math:`h(x)^2 / \sigma^2`, even where h is flat: :func:`antithetic_es` has no such
    term and is nearly always to be preferred.

    Args:
        problem, inner, directions, chunk: as for :func:`zeroth_order`.
        sigma: width of the smoothing.

    Returns:
        An estimator without state; ``info.variance`` is about the smoothed gradient,
        infinite for one direction.

    Raises:
        ValueError: as :func:`zeroth_order`.
        TypeError: if a part is of another kind.

    References:
        Salimans et al. (2017), arXiv:1703.03864, Algorithm 1.
    """
    check_positive(sigma, "sigma", "es")
    parts = problem, inner, directions, sigma, _no_baseline, gaussian, chunk, _scatter
    return _differences("es", *parts)


def antithetic_es(
    problem: Problem,
    inner: Inner | Solver,
    directions: int = 32,
    sigma: float = 0.1,
    chunk: int = 8,
) -> Hypergradient:
    r"""Evolution strategies with mirrored perturbations, ``directions`` pairs of them.

    .. math::
        \frac1{2 b \sigma} \sum_{i=1}^b
        \big(h(x + \sigma v_i) - h(x - \sigma v_i)\big) v_i, \quad v_i \sim N(0, I)

    :func:`zeroth_order` with central quotients, Gaussian directions and a wide step.

    Args:
        problem, inner, directions, sigma, chunk: as for :func:`es`.

    Returns:
        An estimator without state.

    Raises:
        ValueError: as :func:`zeroth_order`.
        TypeError: if a part is of another kind.

    References:
        Salimans et al. (2017), arXiv:1703.03864, Section 2.1, mirrored sampling.
    """
    check_positive(sigma, "sigma", "antithetic_es")
    parts = problem, inner, directions, sigma, central, gaussian, chunk, _scatter
    return _differences("antithetic_es", *parts)


def scatter(total: jax.Array, w: jax.Array, squares: jax.Array) -> jax.Array:
    r"""Square of the standard error of :math:`\frac1b \sum_i w_i v_i`.

    For independent terms whatever they are; infinite for a single one.
    """
    if w.size == 1:
        return jnp.full((), jnp.inf, total.dtype)
    mean = total / w.size
    around = jnp.mean(jnp.square(w) * squares) - jnp.vdot(mean, mean)
    return jnp.maximum(around, 0) / (w.size - 1)


def _scatter(law: Law, swept: Swept) -> jax.Array:
    del law
    return scatter(swept.total, swept.coefficients, swept.squares)


def _differences(
    name: str,
    problem: Problem,
    inner: Inner | Solver,
    directions: int,
    step: float,
    difference: Difference,
    law: Law,
    chunk: int,
    variance: Variance,
) -> Hypergradient:
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_type(law, Law, "law", "dbo.hypergradients.directions.rademacher")
    trees.check_type(difference, Difference, "difference", "one_sided")
    check_count(directions, "directions", name)
    check_count(chunk, "chunk", name)
    check_directions(directions, chunk, 1, name)
    h = objective(problem, inner)
    calls = solve_calls(inner) * (1 + difference.solves * directions)

    def estimate(key, x, y, state, batch):
        x, start = prepare(problem, x, y, batch, inner)
        value, y = h(key, x, start, batch)

        def slopes(_, x, directions):
            def along(v):
                return difference.slope(
                    lambda by: h(key, _moved(x, by, v), start, batch)[0], step, value
                )

            return jax.vmap(along)(directions), value, ()

        flat = jax.eval_shape(trees.ravel, x)
        draw = law.draw(direction_key(key), flat.size, directions, flat.dtype)
        swept = sweep(lambda x: (value, ()), x, draw, directions, chunk, slopes=slopes)
        error = variance(law, swept)
        hypergrad, y, info = finish(
            trees.unravel(swept.total / directions, x),
            y,
            start,
            value,
            cost(calls),
            variance=error,
        )
        return hypergrad, y, state, info

    return Hypergradient(no_state, estimate, calls)


def _moved(x: Tree, by, v: jax.Array) -> Tree:
    """``x + by * v``, for a flat v."""
    step = trees.unravel(v, x)
    return jax.tree.map(lambda a, d: a + trees.times(by, d), x, step)
