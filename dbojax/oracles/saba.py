"""Directions with a memory of every sample: no variance at the solution."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Indexed, Oracle, Problem, Tree, split_levels
from dbojax.oracles.memoryless import (
    SOBA_CALLS,
    LowerTerms,
    UpperTerms,
    assemble,
    lower_terms,
    upper_terms,
)


class Table(NamedTuple):
    """The last known terms of every sample, and their mean."""

    last: Tree  # leaves (num, ...), zero where a sample was never drawn
    mean: Tree  # over the node's true samples
    rest: Tree  # what rounding has kept out of `mean` so far


class SabaState(NamedTuple):
    """One table per level."""

    upper: Table  # of UpperTerms
    lower: Table  # of LowerTerms


def saba(problem: Problem, num_upper: int, num_lower: int) -> Oracle:
    r"""Directions of `soba` whose variance vanishes as the iterates converge.

    A table keeps, for each sample :math:`j` of a level, the terms
    :math:`\nabla_y g_j,\ \nabla^2_{yy} g_j z,\ \nabla^2_{xy} g_j z` or
    :math:`\nabla_x f_j,\ \nabla_y f_j` as they were when j was last drawn. With the
    terms :math:`\phi_j` at the current point and distinct drawn indices :math:`S`,

    .. math::
        \hat\phi = \frac1{|S|} \sum_{j \in S} (\phi_j - T_j) + \bar T, \qquad
        T_j \leftarrow \phi_j \ \text{for } j \in S

    stand for the full means in the directions of :func:`soba`. They are unbiased
    whatever the tables hold, and on strongly convex problems small constant steps
    converge linearly, where :func:`soba` on the same draws stops at its variance.

    Let x, y and z move in one phase, with an independent draw at every step. Each call
    refreshes all tables, so further phases cost all terms again, which ``calls`` does
    not count, and a batch used twice is already known to the tables, which biases the
    second estimate.

    Args:
        problem: objectives of one node, the means of their values over a sample axis
            that comes first in every leaf of the data; called here on one sample each.
        num_upper: length of that axis in the node's data of f, padding included.
        num_lower: the same for g.

    Returns:
        An oracle for batches ``dbo.Batch(upper=dbo.Indexed(...),
        lower=dbo.Indexed(...))``, or one ``dbo.Indexed`` for both levels. Its memory is
        ``num_lower`` times (x, y, y) and ``num_upper`` times (x, y) and starts at zero.
        ``Indexed.size`` makes the means those of the true samples. An index
        beyond the table gives NaN.

    Raises:
        ValueError: if a count is not a positive whole number; from ``directions``, if a
            batch does not tell its indices, or holds more of them than the table.

    Examples:
        >>> near = lambda x, y, b: jnp.mean((y - b) ** 2) / 2
        >>> oracle, data = saba(dbo.Problem(near, near), 4, 4), jnp.arange(4.0)
        >>> x = y = jnp.asarray(1.0)
        >>> z, memory = oracle.init(x, y)
        >>> for j in (0, 1, 2, 3, 0):
        ...     one = dbo.Indexed(jnp.array([j]), data[j : j + 1], jnp.array(4))
        ...     (_, d_y, _), memory = oracle.directions(None, x, y, z, memory, one)
        >>> float(d_y) == float(y - data.mean())  # all are known, so one is enough
        True

    References:
        Dagréou, Ablin, Vaiter and Moreau (2022), arXiv:2201.13409, SABA. The sign of
        ``z`` is opposite there, and the tables start with a pass over the data.
    """
    for name, count in (("num_upper", num_upper), ("num_lower", num_lower)):
        if not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(
                f"`saba` keeps a table row for each sample, so `{name}` is a whole "
                f"number >= 1, e.g. `samples.mask.shape[1]`; got {count!r}."
            )

    def init(x, y):
        z = jax.tree.map(jnp.zeros_like, y)
        upper, lower = UpperTerms(x=x, y=y), LowerTerms(y, hessian=y, cross=x)
        return z, SabaState(_empty(upper, num_upper), _empty(lower, num_lower))

    def directions(key, x, y, z, memory, batch):
        del key
        upper, lower = split_levels(batch)
        _check(upper, "upper", num_upper)
        _check(lower, "lower", num_lower)
        now = _per_sample(lambda one: upper_terms(problem, x, y, one), upper.data)
        upper_mean, upper_table = _refresh(memory.upper, upper, now)
        now = _per_sample(lambda one: lower_terms(problem, x, y, z, one), lower.data)
        lower_mean, lower_table = _refresh(memory.lower, lower, now)
        state = SabaState(upper_table, lower_table)
        return assemble(upper_mean, lower_mean), state

    return Oracle(init, directions, SOBA_CALLS)


def _empty(terms, num) -> Table:
    def zeros(leaf):
        return jnp.zeros((num, *jnp.shape(leaf)), jnp.result_type(leaf))

    nothing = jax.tree.map(jnp.zeros_like, terms)
    return Table(jax.tree.map(zeros, terms), nothing, nothing)


def _check(part, level, num):
    if not isinstance(part, Indexed):
        raise ValueError(
            f"`saba` must know which samples of the {level} level it sees, so it takes "
            f"`dbo.Indexed(indices, data, size)` there; got {type(part).__name__}. "
            "Draw both with `samplers.paired(samplers.indexed(upper_samples, 1), "
            "samplers.indexed(lower_samples, 1))` from `dbo.tasks`."
        )
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(part.data)]
    length = jnp.shape(part.indices)[:1]
    if jnp.ndim(part.indices) != 1 or any(s[:1] != length for s in shapes):
        raise ValueError(
            f"`Indexed` of the {level} level needs one index per sample at each node, "
            "`indices` (b,) and leaves of `data` (b, ...); got "
            f"{jnp.shape(part.indices)} and {shapes}."
        )
    if not 1 <= length[0] <= num:
        raise ValueError(
            f"A batch holds 1 to num_{level}={num} distinct samples of the {level} "
            f"level; got {length[0]}."
        )


def _per_sample(terms, data):
    """Terms of each sample by itself; objectives want a sample axis, of length one."""

    def alone(tree):
        return jax.tree.map(lambda leaf: leaf[None], tree)

    if all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(data)):
        return alone(terms(data))  # mapped, a large sample would be laid out anew
    return jax.vmap(lambda one: terms(alone(one)))(data)


def _refresh(table, drawn, now):
    """Estimated mean of each term, and the table that knows the drawn samples."""

    def read(last):
        # Out of range, an index would be clamped in silence: let NaN tell.
        return last.at[drawn.indices].get(mode="fill", fill_value=jnp.nan)

    def step(change, rest):
        share = len(drawn.indices) / jnp.asarray(drawn.size, change.dtype)
        return share * change + rest

    def write(last, new, old):
        # Not `set`, for which a loop on CPU copies the whole table at every step.
        return last.at[drawn.indices].add(new - old)

    # Once: to read the old table after rows of it are written would take a copy of it.
    old = jax.tree.map(read, table.last)
    last = jax.tree.map(write, table.last, now, old)
    # Not `now`, which compiled into its readers may round differently in each.
    rows = jax.tree.map(lambda last, old: read(last) - old, last, old)
    changes = trees.node_mean(rows)
    estimate = jax.tree.map(jnp.add, table.mean, changes)
    # Compensated summation: by its own rounding a running mean drifts away from its
    # table, and nothing would ever bring it back.
    steps = jax.tree.map(step, changes, table.rest)
    mean = jax.tree.map(jnp.add, table.mean, steps)
    rest = jax.tree.map(lambda s, new, old: s - (new - old), steps, mean, table.mean)
    return estimate, Table(last, mean, rest)
