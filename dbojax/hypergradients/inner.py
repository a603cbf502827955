"""Inner solvers: how the lower variable is made from the upper one."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import trees
from dbojax.base import Calls, Problem, Rounds, State, Tree, by_level

# A solver whose steps are not known: (key, x, y, batch) -> y, from the start y.
Solver = Callable[[jax.Array, Tree, Tree, Tree], Tree]
# One pass through the inner problem: (key, x, y, batch) -> (f(x, y_T), y_T).
Objective = Callable[[jax.Array, Tree, Tree, Tree], tuple[jax.Array, Tree]]


class Inner(NamedTuple):
    """An inner solver as a number of equal steps.

    Everything that a step changes is part of its state, the optimiser's memories too,
    so that derivatives take all of it along.
    """

    start: Callable[[jax.Array, Tree, Tree], State]  # (key, x, y) -> state
    # (key, state, x, t, batch) -> state; batch is what the lower level sees at step t
    step: Callable[[jax.Array, State, Tree, jax.Array, Tree], State]
    read: Callable[[State], Tree]  # state -> y
    steps: int
    calls: Calls = Calls(gradients=1)  # of one step


class DescentState(NamedTuple):
    """State of an optax optimiser at work on the lower objective."""

    y: Tree
    optimizer: optax.OptState


def descent(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    steps: int,
    start: Callable[[jax.Array, Tree, Tree], Tree] | None = None,
) -> Inner:
    r"""Minimise the lower objective with an optax optimiser.

    .. math:: y_t = \Omega_t(y_{t-1}, x), \quad t = 1, \dots, T

    Under Adam set ``eps_root > 0``: the derivative of its square root at zero is
    infinite.

    Args:
        problem: objectives of one node.
        optimizer: acts on gradients in y; its state starts anew in each estimate.
        steps: T.
        start: ``(key, x, y) -> y_0``; by default y as it was given. ``lambda key, x, y:
            x`` adapts shared parameters, as in MAML.

    Returns:
        An inner solver; a batch of type ``Rounds`` gives each step its own samples.

    Raises:
        ValueError: if ``steps`` is not a whole number, at least one.

    Examples:
        >>> p = dbo.Problem(lambda x, y, b: y, lambda x, y, b: (y - x) ** 2 / 2)
        >>> inner = descent(p, optax.sgd(0.5), steps=3)
        >>> float(solver(inner)(jax.random.key(0), 2.0, jnp.zeros(()), None))
        1.75
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_type(
        optimizer, optax.GradientTransformation, "optimizer", "optax.sgd(0.1)"
    )
    check_count(steps, "steps", "descent")

    def first(key, x, y):
        y = jax.tree.map(jnp.asarray, y if start is None else start(key, x, y))
        return DescentState(y, optimizer.init(y))

    lower = scalar(problem, "lower")

    def step(key, state, x, t, batch):
        del key, t
        gradient = jax.grad(lower, 1)(x, state.y, batch)
        updates, memory = optimizer.update(gradient, state.optimizer, state.y)
        return DescentState(optax.apply_updates(state.y, updates), memory)

    return Inner(first, step, lambda state: state.y, int(steps))


def check_count(value, name: str, factory: str, least: int = 1) -> None:
    """Refuse a setting that is not a whole number of at least ``least``."""
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(
            f"`{factory}` needs a whole number {name} >= {least}, got {value!r}."
        )


def scalar(problem: Problem, name: str) -> Callable:
    """One of the objectives, refused while it is traced if it cannot be derived."""

    def objective(x, y, batch):
        value = getattr(problem, name)(x, y, batch)
        got = jax.eval_shape(lambda: value)
        if getattr(got, "shape", None) != ():
            raise ValueError(
                f"`problem.{name}(x, y, batch)` must return a scalar, e.g. with "
                f"`jnp.mean`; got {got}."
            )
        if not jnp.issubdtype(got.dtype, jnp.floating):
            raise ValueError(
                f"`problem.{name}(x, y, batch)` must return a real floating-point "
                f"number; got {got.dtype}. Convert it, e.g. with "
                "`.astype(jnp.float32)`."
            )
        return value

    return objective


def upper_batch(batch: Tree) -> Tree:
    """What the upper objective sees of a batch, one for each step or one for all."""
    return by_level(batch.outer if isinstance(batch, Rounds) else batch)[0]


def lower_batch(batch: Tree) -> Tree:
    """What the lower objective sees of a batch when no step is under way."""
    return by_level(batch.outer if isinstance(batch, Rounds) else batch)[1]


def schedule(batch: Tree, first: int, last: int) -> tuple[jax.Array, Tree | None]:
    """Numbers of the steps ``first .. last - 1``, and of ``Rounds`` their samples."""
    steps = jnp.arange(first, last)
    if not isinstance(batch, Rounds):
        return steps, None
    return steps, jax.tree.map(lambda leaf: leaf[first:last], batch.inner)


def stepper(inner: Inner, key: jax.Array, x: Tree, batch: Tree) -> Callable:
    """The body of a scan over a :func:`schedule`; step t has a key of its own."""

    def body(state, scheduled):
        t, own = scheduled
        samples = by_level(batch if own is None else own)[1]
        return inner.step(jax.random.fold_in(key, t), state, x, t, samples), None

    return body


def run(
    inner: Inner,
    key: jax.Array,
    state: State,
    x: Tree,
    batch: Tree,
    first: int = 0,
    last: int | None = None,
) -> State:
    """Take the steps ``first .. last - 1`` of an inner solver; all, if not told."""
    last = inner.steps if last is None else last
    body = stepper(inner, key, x, batch)
    return jax.lax.scan(body, state, schedule(batch, first, last))[0]


def check_inner(inner: Inner | Solver) -> None:
    """Refuse what is no inner solver."""
    if not isinstance(inner, Inner) and not callable(inner):
        raise TypeError(
            "`inner` must be an Inner, e.g. `dbo.hypergradients.descent(problem, "
            "optax.sgd(0.1), 10)`, or a function (key, x, y, batch) -> y; got "
            f"{type(inner).__name__}."
        )


def solver(inner: Inner | Solver) -> Solver:
    """All steps of an inner solver as one function; a function as it is."""
    check_inner(inner)
    if not isinstance(inner, Inner):
        return inner

    def solve(key, x, y, batch):
        key_start, key_steps = jax.random.split(key)
        state = inner.start(key_start, x, y)
        return inner.read(run(inner, key_steps, state, x, batch))

    return solve


def objective(problem: Problem, inner: Inner | Solver) -> Objective:
    r""":math:`h(x) = f(x, y_T(x))` and :math:`y_T`, as a function of ``(key, x, y,
    batch)``.
    """  # noqa: D205
    solve = solver(inner)

    def evaluate(key, x, y, batch):
        y = solve(key, x, y, batch)
        return problem.upper(x, y, upper_batch(batch)), y

    return evaluate


def solve_calls(inner: Inner | Solver) -> Calls:
    """What one run of an inner solver costs."""
    check_inner(inner)
    steps = inner.calls * inner.steps if isinstance(inner, Inner) else Calls()
    return steps + Calls(solves=1)


def num_steps(inner: Inner | Solver) -> int:
    """Steps of an inner solver; one that does not tell them counts as one."""
    return inner.steps if isinstance(inner, Inner) else 1
