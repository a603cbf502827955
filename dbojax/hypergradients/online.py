"""Forward gradients through an unroll that goes on from estimate to estimate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Calls, Hypergradient, Problem, State, Tree
from dbojax.hypergradients.common import check_state, cost, finish, prepare
from dbojax.hypergradients.directions import (
    Law,
    check_directions,
    direction_key,
    rademacher,
    sample_variance,
)
from dbojax.hypergradients.episodes import (
    aged,
    blank,
    check_parts,
    in_chunks,
    merge,
    out_of_chunks,
    split,
    stacked,
    window,
)
from dbojax.hypergradients.inner import Inner, solve_calls, upper_batch
from dbojax.hypergradients.tangents import accumulate, zero_total, zeros_like


class OnlineState(NamedTuple):
    """State of :func:`online_forward_gradient`."""

    age: jax.Array  # estimates since the episode began, int32
    seed: jax.Array  # of the episode's directions, uint32
    inner: State  # of the solver
    tangents: Tree  # of the floating-point part of it, (b, ...)


def online_forward_gradient(
    problem: Problem,
    inner: Inner,
    episode: int,
    directions: int = 32,
    chunk: int = 8,
    law: Law = rademacher,
) -> Hypergradient:
    r"""Forward gradient of an unroll that is continued for a whole episode.

    The k-th estimate of an episode takes the steps k T + 1 to (k + 1) T and returns

    .. math::
        \frac1b \sum_{i=1}^b \langle \nabla h_k(x), v_i \rangle \, v_i, \quad
        h_k(x) = f(x, y_{(k+1) T}(x)),

    an unbiased estimate of the gradient through all steps since the episode began, at
    the cost of the last T: the tangents are kept, :math:`z_i = (dy/dx) v_i`, the
    optimiser's included, and the directions stay the same until it ends. If x moves
    within an episode, each step is derived at the x it was taken at.

    Args:
        problem: objectives of one node.
        inner: solver whose state goes on, optimiser memories too.
        episode: number of estimates until the solver starts anew, from the y that is
            given to ``estimate`` then; give ``descent`` a ``start`` to begin elsewhere
            than where the last episode ended. Any y given in between is not looked at.
        directions: b, a multiple of ``chunk``; the state holds b tangents.
        chunk: directions at a time.
        law: of the directions.

    Returns:
        An estimator; ``info.variance`` is that of :func:`forward_gradient`. An estimate
        that is not finite ends its episode.

    Raises:
        ValueError: as :func:`forward_gradient`.
        TypeError: if a part is of another kind.

    Examples:
        Three estimates of one step are one estimate of three steps:

        >>> p = dbo.Problem(lambda x, y, b: (y - 1) ** 2 / 2,
        ...                 lambda x, y, b: (y - x) ** 2 / 2)
        >>> step = dbo.hypergradients.descent(p, optax.sgd(0.5), 1)
        >>> hyper = online_forward_gradient(p, step, 3, directions=1, chunk=1)
        >>> x, y = jnp.array(2.0), jnp.array(0.0)
        >>> state = hyper.init(x, y)
        >>> for key in jax.random.split(jax.random.key(0), 3):
        ...     g, y, state, _ = hyper.estimate(key, x, y, state, None)
        >>> float(g), float(y)
        (0.65625, 1.75)

    References:
        Our formulation, after Vicol, Kolter and Swersky (2023), arXiv:2304.11153, who
        fix the directions of ES for an episode.
    """
    name = "online_forward_gradient"
    counts = {"episode": episode, "directions": directions, "chunk": chunk}
    check_parts(problem, inner, counts, name)
    trees.check_type(law, Law, "law", "dbo.hypergradients.directions.rademacher")
    check_directions(directions, chunk, 1, name)
    calls = solve_calls(inner) * (directions // chunk)
    calls = calls + Calls(tangents=directions * inner.steps)

    def init(x, y):
        first = blank(inner, x, y)
        tangents = jax.tree.map(jnp.zeros_like, stacked(split(first)[0], directions))
        zero = jnp.zeros((), jnp.int32)
        return OnlineState(zero, zero.astype(jnp.uint32), first, tangents)

    def estimate(key, x, y, state, batch):
        x, start = prepare(problem, x, y, batch, inner)
        check_state(state, init, x, start)
        fresh = jax.random.bits(direction_key(key), (), jnp.uint32)
        seed = jnp.where(state.age == 0, fresh, state.seed)
        flat = jax.eval_shape(trees.ravel, x)
        draw = law.draw(jax.random.key(seed), flat.size, directions, flat.dtype)
        floats, rest = split(state.inner)

        def advance(x, floats):
            whole = merge(floats, rest)
            whole = window(inner, key, whole, x, start, batch, state.age)
            y = inner.read(whole)
            floats_after, rest_after = split(whole)
            value = problem.upper(x, y, upper_batch(batch))
            return (value, floats_after), (rest_after, y)

        def along(v, z):
            tangents = trees.unravel(v, x), z
            return jax.jvp(advance, (x, floats), tangents, has_aux=True)

        def few(carry, part):
            first, z = part
            vs = draw(first + jnp.arange(chunk))
            outs = jax.vmap(along, out_axes=(None, 0, None))(vs, z)
            (value, after), (w, z), (rest_after, y) = outs
            total, squares = accumulate(carry[0], w, vs)
            return (total, value, merge(after, rest_after), y), (w, squares, z)

        firsts = jnp.arange(0, directions, chunk)
        parts = firsts, in_chunks(state.tangents, chunk)
        carry = jax.eval_shape(few, (zero_total(x), None, None, None), _first(parts))
        carry = zeros_like(carry[0])
        (total, value, whole, y), after = jax.lax.scan(few, carry, parts)
        w, squares, tangents = out_of_chunks(after)
        variance = sample_variance(law, w, squares)
        hypergrad, y, info = finish(
            trees.unravel(total / directions, x),
            y,
            start,
            value,
            cost(calls),
            variance=variance,
        )
        state = OnlineState(aged(state.age, episode, info.ok), seed, whole, tangents)
        return hypergrad, y, state, info

    return Hypergradient(init, estimate, calls)


def _first(parts: Tree) -> Tree:
    return jax.tree.map(lambda a: a[0], parts)
