"""An algorithm from an oracle and the phases in which its variables move."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dbojax import trees
from dbojax.base import (
    Algorithm,
    Calls,
    Clock,
    Consensus,
    Metrics,
    Oracle,
    Problem,
    Rounds,
    State,
    Strategy,
    Traffic,
    Tree,
    by_level,
)

_LEVELS = ("x", "y", "z")


Step = float | jax.Array | optax.Schedule | optax.GradientTransformation


def local_step(step: Step) -> optax.GradientTransformation:
    """A step size or schedule as plain gradient descent; a transform as it is."""
    if isinstance(step, optax.GradientTransformation):
        return step
    if not callable(step) and not isinstance(step, numbers.Real | np.ndarray | Array):
        raise TypeError(
            "A step is a number, a schedule or an optax transform, e.g. `0.1` or "
            f"`optax.adam(1e-3)`; got {step!r}."
        )
    return optax.sgd(step)


def local_steps(upper: Step, lower: Step, linear: Step | None) -> list:
    """Transforms of x, y and z; that of z is by default that of y."""
    linear = lower if linear is None else linear
    return [local_step(step) for step in (upper, lower, linear)]


class Phase(NamedTuple):
    """Some variables move at once along directions taken at the same point.

    A variable whose strategy is None stands still.
    """

    x: Strategy | None = None
    y: Strategy | None = None
    z: Strategy | None = None
    times: int = 1  # rounds in a row, each with new directions
    restart: bool = False  # forget the strategies' memories before the first round

    @property
    def moves(self) -> dict[str, Strategy]:
        """The strategies that act, by the name of their variable."""
        return {name: s for name in _LEVELS if (s := getattr(self, name)) is not None}


class BilevelState(NamedTuple):
    """State of a composed algorithm; x, y and z are stacked."""

    x: Tree
    y: Tree
    z: Tree
    memory: State  # of the oracle
    strategies: dict[str, State]
    step: jax.Array  # steps done, int32


def compose(
    problem: Problem,
    oracle: Oracle,
    *phases: Phase,
    participants: int | None = None,
) -> Algorithm:
    """Build an algorithm that runs ``phases`` one after the other in each step.

    Args:
        problem: objectives of one node, for the reported upper loss.
        oracle: local directions of x, y and z.
        phases: who moves when; each of x, y and z appears in exactly one phase.
        participants: workers that take part in a step, drawn anew each time; for server
            channels. None is all.

    Returns:
        An algorithm on stacked trees. ``step`` takes one stacked batch, or `Rounds`
        with a fresh batch for each repeated round.

    Raises:
        ValueError: if a variable moves in no phase or in several, a phase repeats less
            than once, or less than one worker takes part; from ``init``, if ``x`` and
            ``y`` have different node counts or are not floating point; from ``step``,
            if the batch has another node count or too few rounds, or an objective is
            not a scalar.
        TypeError: if a part is of another kind.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_type(oracle, Oracle, "oracle", "dbo.oracles.soba(problem)")
    _check_phases(phases)
    lift = _lift(phases)
    directions_at, upper_of = lift(oracle.directions), lift(problem.upper)
    if participants is not None and (
        not isinstance(participants, numbers.Integral) or participants < 1
    ):
        raise ValueError(
            "A whole number of workers, at least one, takes part in a step; got "
            f"participants={participants!r}. Write None for all."
        )

    def init(x, y):
        x, y = (jax.tree.map(jnp.asarray, v) for v in (x, y))
        trees.check_floating(x, "x")
        trees.check_floating(y, "y")
        if trees.num_nodes(x, "x") != trees.num_nodes(y, "y"):
            raise ValueError(
                f"`x` holds {trees.num_nodes(x)} nodes on axis 0 and `y` "
                f"{trees.num_nodes(y)}. Stack both for the same nodes with "
                "`dbo.replicate(value, n)`."
            )
        z, memory = lift(oracle.init)(x, y)
        starts = {"x": x, "y": y, "z": z}
        strategies = {
            name: strategy.init(starts[name])
            for phase in phases
            for name, strategy in phase.moves.items()
        }
        step = jnp.zeros((), jnp.int32)
        return _own(BilevelState(x, y, z, memory, strategies, step))

    def step(key, state, batch):
        trees.check_type(state, BilevelState, "state", "method.init(x, y)")
        _check_batch(problem, phases, state, batch)
        traffic, calls, norm = Traffic(), Calls(), None
        *keys, key_mask = _split(key, len(phases) + 1)
        mask = None
        if participants is not None:
            mask = trees.participation(key_mask, trees.num_nodes(state.x), participants)
        for phase, key_phase in zip(phases, keys, strict=True):
            state, sent, phase_norm = _run_phase(
                directions_at, phase, key_phase, state, batch, mask
            )
            traffic += sent * phase.times
            costs = (oracle.calls[_LEVELS.index(name)] for name in phase.moves)
            calls += sum(costs, start=Calls()) * phase.times
            norm = phase_norm if phase.x is not None else norm
        state = state._replace(step=state.step + 1)
        return state, _metrics(upper_of, state, batch, norm, traffic, calls)

    return Algorithm(init, step)


def _own(state):
    """Copy each leaf: a state may be donated, and no leaf is weakly typed."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), state)


def _check_batch(problem, phases, state, batch):
    n = trees.num_nodes(state.y, "y")
    if isinstance(batch, Rounds):
        trees.check_batch(batch.inner, n, "batch.inner", axis=1)
        rounds = max(phase.times for phase in phases)
        held = {leaf.shape[0] for leaf in jax.tree.leaves(batch.inner)}
        if any(count < rounds for count in held):
            raise ValueError(
                f"`Rounds.inner` needs a batch for each of {rounds} rounds on axis 0; "
                f"got {min(held)}. Draw them, e.g. with "
                f"`dbo.tasks.samplers.fresh_rounds(sampler, {rounds})`."
            )
        batch = batch.outer
    trees.check_batch(batch, n, "batch")
    point = trees.one_node((state.x, state.y))
    for name, sample in zip(Problem._fields, by_level(batch), strict=True):
        shape = jax.eval_shape(getattr(problem, name), *point, trees.one_node(sample))
        if getattr(shape, "shape", None) != ():
            raise ValueError(
                f"`problem.{name}(x, y, batch)` must return a scalar, e.g. with "
                f"`jnp.mean`; got {shape}."
            )


def _check_phases(phases):
    moved = [name for phase in phases for name in phase.moves]
    if sorted(moved) != list(_LEVELS):
        raise ValueError(
            "Each of x, y and z needs a strategy in exactly one phase; these phases "
            f"move {moved}."
        )
    for phase in phases:
        if not isinstance(phase.times, numbers.Integral) or phase.times < 1:
            raise ValueError(
                f"A phase runs a whole number of times, at least once; got "
                f"times={phase.times!r}."
            )
        for name, strategy in phase.moves.items():
            example = "dbo.strategies.diffusion_cta(channel, optax.sgd(0.1))"
            trees.check_type(strategy, Strategy, f"Phase.{name}", example)


def _lift(phases) -> Callable:
    """How to map over nodes; left to the compiler, a mesh might gather their data."""
    lifts = [move.lift for phase in phases for move in phase.moves.values()]
    return next((lift for lift in lifts if lift is not jax.vmap), jax.vmap)


def _split(key, count):
    return [jax.random.fold_in(key, index) for index in range(count)]


def _run_phase(
    directions_at, phase, key, state, batch, mask
) -> tuple[BilevelState, Traffic, jax.Array | None]:
    """All rounds of a phase; also the traffic of one and, if x moves, the last norm."""
    if phase.restart:
        fresh = {
            name: _on_time(move.init(getattr(state, name)), state.strategies[name])
            for name, move in phase.moves.items()
        }
        state = state._replace(strategies=state.strategies | fresh)
    inner = None
    if isinstance(batch, Rounds):
        inner = jax.tree.map(lambda leaf: leaf[: phase.times], batch.inner)
        batch = batch.outer
    if phase.times == 1:
        return _round(directions_at, phase, key, state, batch, mask)

    def body(state, per_round):
        key, fresh = per_round
        fresh = batch if fresh is None else fresh
        state, traffic, norm = _round(directions_at, phase, key, state, fresh, mask)
        return state, (traffic, norm)

    keys = jax.random.split(key, phase.times)
    state, (traffic, norms) = jax.lax.scan(body, state, (keys, inner))
    return state, traffic, None if norms is None else norms[-1]


def _on_time(fresh, old):
    """A fresh memory whose clocks go on: a network changes whatever nodes forget."""

    def kept(new, before):
        return before if isinstance(new, Clock) else new

    return jax.tree.map(kept, fresh, old, is_leaf=lambda leaf: isinstance(leaf, Clock))


def _round(directions_at, phase, key, state, batch, mask):
    """Take directions at the current point and move all variables of the phase."""
    key_oracle, *key_moves = _split(key, 1 + len(phase.moves))
    keys = trees.node_keys(key_oracle, trees.num_nodes(state.x, "x"))
    point = (state.x, state.y, state.z)
    directions, memory = directions_at(keys, *point, state.memory, batch)
    if mask is not None:
        memory = trees.where(mask.mask, memory, state.memory)
    directions = dict(zip(_LEVELS, directions, strict=True))
    moved, strategies, traffic = {}, dict(state.strategies), Traffic()
    for (name, strategy), key_move in zip(phase.moves.items(), key_moves, strict=True):
        moved[name], strategies[name], sent = strategy.update(
            key_move, getattr(state, name), directions[name], strategies[name], mask
        )
        traffic |= sent
    state = state._replace(memory=memory, strategies=strategies, **moved)
    moves_x = "x" in phase.moves
    norm = trees.norm(trees.node_mean(directions["x"])) if moves_x else None
    return state, traffic, norm


def _metrics(upper_of, state, batch, norm, traffic, calls) -> Metrics:
    batch = batch.outer if isinstance(batch, Rounds) else batch
    upper = upper_of(state.x, state.y, by_level(batch)[0])
    errors = (trees.consensus_error(v) for v in (state.x, state.y, state.z))
    return Metrics(trees.node_mean(upper), norm, Consensus(*errors), traffic, calls)
