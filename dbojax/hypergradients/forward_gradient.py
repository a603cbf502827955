"""Forward gradients: unbiased, in memory that does not grow with the inner steps."""
# ruff: noqa: D417 - what means the same in both factories is described in the first.

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Calls, Hypergradient, Problem, Tree
from dbojax.hypergradients.common import cost, finish, no_state, prepare
from dbojax.hypergradients.directions import (
    Draw,
    Law,
    check_directions,
    direction_key,
    rademacher,
    sample_variance,
)
from dbojax.hypergradients.inner import (
    Inner,
    Solver,
    check_count,
    num_steps,
    objective,
    solve_calls,
)
from dbojax.hypergradients.spread import Over, here
from dbojax.hypergradients.tangents import Pass, combine, push, sweep


class ForwardGradient(NamedTuple):
    """The two halves of a forward gradient, with a message of b numbers in between.

    Whoever has the key and x makes the hypergradient out of the coefficients, so they
    are all that must be sent: nodes that use the same key average their coefficients.
    """

    # (key, x, y, batch) -> (w, y, value), with w of shape (directions,)
    coefficients: Callable[..., tuple[jax.Array, Tree, jax.Array]]
    combine: Callable[[jax.Array, Tree, jax.Array], Tree]  # (key, x, w) -> gradient
    directions: int
    calls: Calls = Calls()  # of the coefficients


def forward_gradient(
    problem: Problem,
    inner: Inner | Solver,
    directions: int = 32,
    chunk: int = 8,
    law: Law = rademacher,
    guide: Hypergradient | None = None,
    over: Over | None = None,
) -> Hypergradient:
    r"""Unbiased estimate of the unrolled gradient from random directions, (FG)²U.

    .. math::
        \hat\nabla h = \frac1b \sum_{i=1}^b w_i v_i, \quad
        w_i = \langle \nabla h(x), v_i \rangle, \quad h(x) = f(x, y_T(x))

    Each slope :math:`w_i` is one forward-mode pass through the solver, so memory
    depends neither on T nor, but for a chunk of directions, on b. Under Rademacher
    directions the mean squared error is :math:`\frac{N-1}b |\nabla h|^2` for N entries
    of x (Lemma 3.1); if :math:`N \le b`, :func:`forward` is exact and cheaper.

    A guide lowers the error by a control variate: with u its estimate, normalised,

    .. math::
        \hat\nabla h = \langle \nabla h, u \rangle u + \frac1b \sum_i
        (w_i - \langle \nabla h, u \rangle \langle u, v_i \rangle) v_i,

    unbiased whatever u is, with error :math:`\frac{N-1}b (1 - \cos^2) |\nabla h|^2`.

    The tangent starts at zero in every estimate. Who passes the returned y on to the
    next one truncates it: the dependence of that y on x is dropped, as in
    :func:`truncated`; :func:`online_forward_gradient` keeps it.

    Args:
        problem: objectives of one node.
        inner: steps, or a function ``(key, x, y, batch) -> y`` that forward mode can
            pass through, ``while_loop`` included. It gets the key of the estimate, as
            under :func:`reverse`; the directions get :func:`direction_key` of it.
        directions: b, a multiple of ``chunk`` and, times that, of the devices.
        chunk: directions at a time. More cost memory and save time, as each chunk runs
            the solver anew; the result does not depend on it.
        law: of the directions.
        guide: any cheap estimator; it sees the same inner randomness, draws directions
            of its own, and its state is carried.
        over: where directions are pushed, e.g. ``spread(mesh, "devices")``.

    Returns:
        An estimator whose state is that of the guide. ``info.variance`` estimates its
        mean squared error, from the w and the lengths of the directions alone.

    Raises:
        ValueError: if a number is not whole and positive or ``directions`` does not
            form whole chunks on each device; from ``estimate``, as :func:`reverse`,
            and if an orthogonal law cannot draw as many directions.
        TypeError: if a part is of another kind.

    Examples:
        With one entry of x there is nothing to be random about:

        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> hyper = forward_gradient(
        ...     p, dbo.hypergradients.descent(p, optax.sgd(0.5), 3), 1, chunk=1)
        >>> x, y = jnp.array(2.0), jnp.array(0.0)
        >>> g, _, _, info = hyper.estimate(jax.random.key(0), x, y, (), None)
        >>> float(g), float(info.variance)
        (0.65625, 0.0)

    References:
        Shen et al. (2024), arXiv:2406.14095, eq. 7-10 and Algorithm 1, with the
        states that lines 6-7 update read at once; guide and variance: our formulation.
    """
    over = here if over is None else over
    _check_parts(problem, directions, chunk, law, "forward_gradient")
    trees.check_type(over, Over, "over", 'dbo.hypergradients.spread(mesh, "devices")')
    check_directions(directions, chunk, over.devices, "forward_gradient")
    if guide is not None:
        trees.check_type(guide, Hypergradient, "guide", "truncated(...)")
    h, guides = objective(problem, inner), 0 if guide is None else guide.guides + 1

    def drawn(key, x):
        return _drawn(law, directions, direction_key(key, guides), x)

    def part(first, count, args):
        key, x, start, batch, known = args
        left = _without(lambda x: h(key, x, start, batch), x, known)
        return sweep(left, x, drawn(key, x), count, chunk, first)

    def recombine(w, args):
        key, x, *_ = args
        return combine(w, x, drawn(key, x), chunk)

    def estimate(key, x, y, state, batch):
        x, start = prepare(problem, x, y, batch, inner)
        known, spent = None, cost(own)
        if guide is not None:
            rough, _, state, told = guide.estimate(key, x, y, state, batch)
            trees.check_like(rough, x, "the guide's hypergradient", "x")
            known = _part_along(rough, lambda x: h(key, x, start, batch), x)
            spent = jax.tree.map(jnp.add, spent, told.cost)
        args = (key, x, start, batch, known)
        swept = over.run(directions, part, recombine, args)
        mean = swept.total / directions
        if known is not None:
            mean = mean + known.astype(mean.dtype)
        variance = sample_variance(law, swept.coefficients, swept.squares)
        hypergrad, y, info = finish(
            trees.unravel(mean, x),
            swept.aux,
            start,
            swept.value,
            spent,
            variance=variance,
        )
        return hypergrad, y, state, info

    own = _calls(inner, directions, chunk)
    if guide is None:
        return Hypergradient(no_state, estimate, own)
    own = own + _calls(inner, 1, 1)
    return Hypergradient(guide.init, estimate, own + guide.calls, guides)


def forward_scalars(
    problem: Problem,
    inner: Inner | Solver,
    directions: int = 32,
    chunk: int = 8,
    law: Law = rademacher,
) -> ForwardGradient:
    r"""The two halves of :func:`forward_gradient`, to send the coefficients in between.

    .. math::
        w_i = \langle \nabla h(x), v_i \rangle, \qquad
        \hat\nabla h = \frac1b \sum_i w_i v_i

    The second half is linear in w. So when n nodes use one key, the mean of their
    coefficients gives an unbiased estimate of the mean of their gradients, whose error
    is proportional to the square of that mean alone; when each uses a key of its own,
    every node can rebuild every other's estimate from the key and b numbers.

    Args:
        problem, inner, directions, chunk, law: as for :func:`forward_gradient`.

    Returns:
        Both halves; what they return is not checked for being finite.

    Raises:
        ValueError: as :func:`forward_gradient`; from ``combine``, if w has another
            shape.
        TypeError: if a part is of another kind.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: jnp.sum(y * b), lambda x, y, b: y)
        >>> halves = forward_scalars(p, lambda key, x, y, b: x * x, 8)
        >>> key, x, y = jax.random.key(0), jnp.arange(50.0), jnp.zeros(50)
        >>> w, _, _ = jax.vmap(halves.coefficients, (None, None, None, 0))(
        ...     key, x, y, jnp.stack([0 * x, 1 + x]))
        >>> w.shape, halves.combine(key, x, w.mean(0)).shape
        ((2, 8), (50,))

    References:
        Shen et al. (2024), arXiv:2406.14095, eq. 7-10; what is sent: our formulation.
    """
    _check_parts(problem, directions, chunk, law, "forward_scalars")
    check_directions(directions, chunk, 1, "forward_scalars")
    h = objective(problem, inner)

    def coefficients(key, x, y, batch):
        x, start = prepare(problem, x, y, batch, inner)
        swept = sweep(
            lambda x: h(key, x, start, batch),
            x,
            _drawn(law, directions, direction_key(key), x),
            directions,
            chunk,
        )
        return swept.coefficients, swept.aux, swept.value

    def mean(key, x, w):
        if w.shape != (directions,):
            raise ValueError(
                f"`combine(key, x, w)` needs one coefficient for each of {directions} "
                f"directions; got shape {w.shape}. Average those of several nodes over "
                "the node axis first, or use `jax.vmap`."
            )
        return trees.unravel(
            combine(w, x, _drawn(law, directions, direction_key(key), x), chunk).total
            / directions,
            x,
        )

    return ForwardGradient(
        coefficients, mean, directions, _calls(inner, directions, chunk)
    )


def _check_parts(problem, directions, chunk, law, name):
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_type(law, Law, "law", "dbo.hypergradients.directions.rademacher")
    check_count(directions, "directions", name)
    check_count(chunk, "chunk", name)


def _calls(inner: Inner | Solver, directions: int, chunk: int) -> Calls:
    """Each chunk runs the solver anew, once for all of its directions."""
    tangents = Calls(tangents=directions * num_steps(inner))
    return solve_calls(inner) * (directions // chunk) + tangents


def _drawn(law: Law, directions: int, key: jax.Array, x: Tree) -> Draw:
    flat = jax.eval_shape(trees.ravel, x)
    return law.draw(key, flat.size, directions, flat.dtype)


def _part_along(rough: Tree, h: Pass, x: Tree) -> jax.Array:
    """The part of the gradient of h along a direction; zero along zero."""
    u = trees.ravel(rough)
    length = trees.norm(u).astype(u.dtype)
    u = u / jnp.where(length > 0, length, 1)
    w, _, _ = push(h, x, u[None])
    return w.astype(u.dtype) * u


def _without(h: Pass, x: Tree, known: jax.Array | None) -> Pass:
    """``h`` less a linear function: the same at x, its gradient less by ``known``."""
    if known is None:
        return h

    def rest(at):
        value, aux = h(at)
        moved = trees.ravel(jax.tree.map(jnp.subtract, at, x))
        linear = jnp.vdot(known, moved, precision="highest")
        return value - linear.astype(value.dtype), aux

    return rest
