"""Many runs of one algorithm in one program."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dbojax import trees
from dbojax.base import Algorithm, Tree


def sweep(
    build: Callable[[Tree], Algorithm], settings: Tree, *, batch_axis: int | None = 0
) -> Algorithm:
    """Run one algorithm under many settings at once.

    Args:
        build: makes the algorithm of one run from one row of ``settings``.
        settings: step sizes, penalties, mixing matrices: leaves ``(runs, ...)``.
        batch_axis: 0 where each run has its own batch, None where they share one.

    Returns:
        An algorithm whose start, state and metrics have an axis of runs in front, and
        in which run ``i`` uses ``fold_in(key, i)``.

    Raises:
        ValueError: if the leaves of ``settings`` disagree on the number of runs.

    Examples:
        >>> def build(rate):
        ...     def step(key, state, batch):
        ...         return state - rate * (state - batch), None
        ...     return dbo.Algorithm(lambda x, y: x, step)
        >>> both = sweep(build, jnp.array([0.0, 1.0]), batch_axis=None)
        >>> state, _ = both.step(jax.random.key(0), jnp.zeros(2), jnp.array(3.0))
        >>> state.tolist()
        [0.0, 3.0]
    """
    runs = trees.num_nodes(settings, "settings")

    def init(x, y):
        return jax.vmap(lambda row, x, y: build(row).init(x, y))(settings, x, y)

    def step(key, state, batch):
        def one(key, row, state, batch):
            return build(row).step(key, state, batch)

        axes = (0, 0, 0, batch_axis)
        keys = trees.node_keys(key, runs)
        return jax.vmap(one, in_axes=axes)(keys, settings, state, batch)

    return Algorithm(init, step)


def vmapped(method: Algorithm, runs: int, *, batch_axis: int | None = 0) -> Algorithm:
    """Run one algorithm several times at once, e.g. for error bars over seeds.

    Args:
        method: the algorithm of one run.
        runs: how many.
        batch_axis: 0 where each run has its own batch, None where they share one.

    Returns:
        An algorithm whose start, state and metrics have an axis of ``runs`` in front,
        and in which run ``i`` uses ``fold_in(key, i)``; traffic and oracle calls stay
        those of one run.

    Raises:
        ValueError: if ``runs`` is not positive.

    Examples:
        >>> noise = dbo.Algorithm(
        ...     init=lambda x, y: x,
        ...     step=lambda key, state, batch: (jax.random.normal(key), None),
        ... )
        >>> state, _ = vmapped(noise, 3).step(
        ...     jax.random.key(0), jnp.zeros(3), jnp.zeros(3)
        ... )
        >>> len(set(state.tolist()))
        3
    """
    if runs < 1:
        raise ValueError(f"`vmapped(method, runs)` needs runs >= 1, got runs={runs}.")
    return sweep(lambda row: method, jnp.arange(runs), batch_axis=batch_axis)
