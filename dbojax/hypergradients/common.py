"""What all estimators share: checks before any computation, and a safe end."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees
from dbojax.base import Calls, Cost, Info, Problem, Rounds, State, Tree
from dbojax.hypergradients.inner import (
    Inner,
    Solver,
    lower_batch,
    scalar,
    upper_batch,
)


def no_state(x: Tree, y: Tree) -> tuple[()]:
    """State of an estimator that remembers nothing."""
    del x, y
    return ()


def check_positive(value, name: str, factory: str, zero: bool = False) -> None:
    """Refuse what is no positive number; ``zero`` may be allowed, arrays are."""
    if isinstance(value, numbers.Real):
        number = float(value)
        good = math.isfinite(number) and (number > 0 or (zero and number == 0))
    else:
        good = isinstance(value, jax.Array | np.ndarray)
    if not good:
        sign = ">=" if zero else ">"
        raise ValueError(
            f"`{factory}` needs {name} {sign} 0 and finite, got {value!r}."
        )


def check_state(state: State, init: Callable, x: Tree, y: Tree) -> None:
    """Refuse a state that another estimator made, or that other variables made."""
    like = jax.eval_shape(init, x, y)
    trees.check_like(state, like, "state", "hyper.init(x, y)")


def prepare(
    problem: Problem, x: Tree, y: Tree, batch: Tree, inner: Inner | Solver | None = None
) -> tuple[Tree, Tree]:
    """Both variables as arrays, or an error that says what is wrong with the call.

    Args:
        problem: objectives of one node.
        x: upper variable.
        y: lower variable, where the inner solver starts.
        batch: what the objectives get.
        inner: the solver that is going to be run, if any.

    Returns:
        x and y.

    Raises:
        ValueError: if a variable is not floating point or x is empty, an objective is
            not a scalar, the batch has too few rounds, or the inner solver starts with
            another structure than y.
    """
    x, y = (jax.tree.map(jnp.asarray, v) for v in (x, y))
    trees.check_floating(x, "x")
    trees.check_floating(y, "y")
    for name, v in (("x", x), ("y", y)):
        if not trees.size(v):
            raise ValueError(
                f"`{name}` must hold at least one number; got {v!r}. Write "
                "`jnp.zeros(())` for a variable that is not used."
            )
    steps = inner.steps if isinstance(inner, Inner) else 0
    if isinstance(batch, Rounds):
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch.inner)]
        held = {shape[0] if shape else 0 for shape in shapes}
        if any(count < steps for count in held):
            raise ValueError(
                f"`Rounds.inner` needs samples for each of {steps} inner steps on "
                f"axis 0; got {min(held)}."
            )
    if isinstance(inner, Inner):
        first = jax.eval_shape(
            lambda x, y: inner.read(inner.start(jax.random.key(0), x, y)), x, y
        )
        trees.check_like(first, y, "what the inner solver starts from", "y")
    # A solver may take another lower objective, or none.
    samples = {"upper": upper_batch(batch)}
    if inner is None:
        samples["lower"] = lower_batch(batch)
    for name, sample in samples.items():
        jax.eval_shape(scalar(problem, name), x, y, sample)
    return x, y


def cost(calls: Calls) -> Cost:
    """The same numbers, where they may depend on data."""
    return Cost(*(jnp.asarray(n, jnp.int32) for n in dataclasses.astuple(calls)))


def all_finite(*values: Tree) -> jax.Array:
    """Whether no entry of any leaf is infinite or NaN."""
    leaves = jax.tree.leaves(values)
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def finish(
    hypergrad: Tree,
    y: Tree,
    start: Tree,
    value: jax.Array,
    cost: Cost,
    ok: jax.Array | bool = True,
    residual: jax.Array | None = None,
    variance: jax.Array | None = None,
) -> tuple[Tree, Tree, Info]:
    """Put finite stand-ins where a result is not finite, and flag them.

    Args:
        hypergrad: the estimate, like x.
        y: where the inner solver ended.
        start: where it started; stands in for a y that is not finite.
        value: upper objective at ``(x, y)``.
        cost: what the estimate called.
        ok: whether the estimator met no other trouble.
        residual: of the linear system, relative.
        variance: of the estimate, from its sample; infinite if it is not finite.

    Returns:
        Hypergradient, y and what is known of them.

    Raises:
        ValueError: if y is not like its start.
    """
    trees.check_like(y, start, "the inner solver's result", "y")
    finite_y, finite = all_finite(y), all_finite(hypergrad)
    y = jax.tree.map(lambda a, b: jnp.where(finite_y, a, b), y, start)
    hypergrad = jax.tree.map(lambda g: jnp.where(finite, g, 0), hypergrad)
    ok = jnp.isfinite(value) & finite_y & finite & ok
    if variance is not None:  # nothing is known of what is not a number
        variance = jnp.where(jnp.isfinite(variance), variance, jnp.inf)
    return hypergrad, y, Info(value, ok, cost, residual, variance)
