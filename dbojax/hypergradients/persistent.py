"""Evolution strategies whose particles go on from estimate to estimate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Hypergradient, Problem, State
from dbojax.hypergradients.common import (
    check_positive,
    check_state,
    cost,
    finish,
    prepare,
)
from dbojax.hypergradients.directions import (
    check_directions,
    direction_key,
    gaussian,
)
from dbojax.hypergradients.episodes import (
    aged,
    blank,
    check_parts,
    in_chunks,
    out_of_chunks,
    stacked,
    window,
)
from dbojax.hypergradients.inner import Inner, solve_calls, upper_batch
from dbojax.hypergradients.zeroth_order import scatter


class PesState(NamedTuple):
    """State of :func:`pes`."""

    age: jax.Array  # estimates since the episode began, int32
    inner: State  # of the solver at x itself
    particles: tuple[State, State]  # at x + sigma v and x - sigma v, (b, ...) each
    perturbations: jax.Array  # sum of v over the episode, (b, N)


def pes(
    problem: Problem,
    inner: Inner,
    episode: int,
    directions: int = 32,
    sigma: float = 0.1,
    chunk: int = 8,
) -> Hypergradient:
    r"""Persistent evolution strategies: ES of an unroll continued for an episode.

    Each of b pairs of particles runs its own solver; in the k-th estimate of an episode
    it takes T steps at :math:`x \pm \sigma v_{i,k}` and the estimate is

    .. math::
        \frac1{2 b \sigma} \sum_{i=1}^b \big(f(x + \sigma v_{i,k}, y_i^+)
        - f(x - \sigma v_{i,k}, y_i^-)\big) \sum_{j \le k} v_{i,j},
        \quad v_{i,j} \sim N(0, I),

    unbiased for the gradient of :math:`f(x, y_{(k+1)T}(x))`, smoothed by a perturbation
    of its own in each window; the sum of v is what undoes the truncation. Its error
    grows with k, and nothing is differentiated.

    Args:
        problem: objectives of one node.
        inner: solver whose state goes on, optimiser memories too.
        episode: estimates until all particles start anew, as in
            :func:`online_forward_gradient`.
        directions: b, pairs of particles, a multiple of ``chunk``; the state holds
            2 b + 1 states of the solver and b sums, as large as x.
        sigma: width of the smoothing.
        chunk: pairs at a time.

    Returns:
        An estimator; one more run, at x itself, gives the returned value and y.
        ``info.variance`` is about the smoothed gradient, infinite for one pair. An
        estimate that is not finite ends its episode.

    Raises:
        ValueError: if a number is not positive or ``chunk`` does not divide
            ``directions``; from ``estimate``, as :func:`reverse`.
        TypeError: if a part is of another kind.

    References:
        Vicol, Metz and Sohl-Dickstein (2021), arXiv:2112.13835, Algorithm 2; they give
        one loss to each step, we the upper objective at the end of each window.
    """
    counts = {"episode": episode, "directions": directions, "chunk": chunk}
    check_parts(problem, inner, counts, "pes")
    check_directions(directions, chunk, 1, "pes")
    check_positive(sigma, "sigma", "pes")
    calls = solve_calls(inner) * (2 * directions + 1)

    def init(x, y):
        first = blank(inner, x, y)
        flat = trees.ravel(jax.tree.map(jnp.asarray, x))
        # Two arrays, not one twice: a state may be donated.
        plus, minus = stacked(first, directions), stacked(first, directions)
        dtype = jnp.promote_types(flat.dtype, jnp.float32)
        sums = jnp.zeros((directions, flat.size), dtype)
        zero = jnp.zeros((), jnp.int32)
        return PesState(zero, first, (plus, minus), sums)

    def estimate(key, x, y, state, batch):
        x, start = prepare(problem, x, y, batch, inner)
        check_state(state, init, x, start)
        flat = trees.ravel(x)
        draw = gaussian.draw(direction_key(key), flat.size, directions, flat.dtype)

        def play(flat, particle):
            x_moved = trees.unravel(flat, x)
            args = x_moved, start, batch, state.age
            particle = window(inner, key, particle, *args)
            y = inner.read(particle)
            return problem.upper(x_moved, y, upper_batch(batch)), y, particle

        def pair(v, plus, minus, total):
            up, _, plus = play(flat + trees.times(sigma, v), plus)
            down, _, minus = play(flat - trees.times(sigma, v), minus)
            total = v.astype(total.dtype) + jnp.where(state.age == 0, 0, total)
            return (up - down) / (2 * sigma), plus, minus, total

        def few(part):
            first, *pairs = part
            return jax.vmap(pair)(draw(first + jnp.arange(chunk)), *pairs)

        value, y, whole = play(flat, state.inner)
        firsts = jnp.arange(0, directions, chunk)
        pairs = in_chunks((*state.particles, state.perturbations), chunk)
        w, plus, minus, sums = out_of_chunks(jax.lax.map(few, (firsts, *pairs)))
        w = w.astype(sums.dtype)
        total = jnp.dot(w, sums, precision="highest")
        variance = scatter(total, w, jnp.sum(jnp.square(sums), axis=1))
        hypergrad, y, info = finish(
            trees.unravel(total / directions, x),
            y,
            start,
            value,
            cost(calls),
            variance=variance,
        )
        age = aged(state.age, episode, info.ok)
        return hypergrad, y, PesState(age, whole, (plus, minus), sums), info

    return Hypergradient(init, estimate, calls)
