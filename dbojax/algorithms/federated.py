"""Rounds of a server with clients that hold parts of the model.

The server keeps one copy of what all share; what is personal has a row per client.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbojax import submodels, trees
from dbojax.algorithms.compose import Step, local_step
from dbojax.algorithms.starts import (
    check_rows,
    check_settings,
    checked_start,
    mean_steps,
    one_row,
    row_each,
    steps_per_level,
)
from dbojax.algorithms.uplinks import part_bytes, uplink_of
from dbojax.algorithms.visits import Held, Sample, Work, check_work, visit
from dbojax.base import (
    Algorithm,
    Calls,
    Channel,
    Compressor,
    Consensus,
    Coverage,
    Metrics,
    Oracle,
    Problem,
    State,
    Traffic,
    Tree,
)
from dbojax.strategies import ball
from dbojax.submodels import Fleet, Layout

Divisor = Callable[[jax.Array, int], jax.Array]  # (|N_j|, participants) -> divisor


def covered(counts: jax.Array, participants: int) -> jax.Array:
    """Average an entry over the clients that hold it."""
    del participants
    return counts


def everyone(counts: jax.Array, participants: int) -> jax.Array:
    """Average an entry over all who take part; rarely held ones then move less."""
    return jnp.full_like(counts, participants)


class FederatedState(NamedTuple):
    """State of rounds with a server; shared variables have one row, personal ones M."""

    x: Tree  # (1, ...)
    y: Tree  # (1, ...) or (M, ...)
    z: Tree  # likewise
    uplink: State
    server: optax.OptState  # of the server's steps
    round: jax.Array  # rounds done, int32


def federated(
    problem: Problem,
    oracle: Callable[[Problem], Oracle],
    fleet: Fleet,
    *,
    upper_step: float | jax.Array,
    lower_step: float | jax.Array,
    linear_step: float | jax.Array | None = None,
    local_steps: int | Sequence[int] = 1,
    inner_steps: int = 0,
    personal: bool = False,
    radius: float | jax.Array = math.inf,
    server_steps: tuple[Step, Step, Step] = (1.0, 1.0, 1.0),
    uplink: Compressor | Channel | None = None,
    sample: Sample | None = None,
    extracted: bool = True,
    smaller: Callable[[Mapping[str, int]], Problem] | None = None,
    keep: bool = False,
    divide_by: Divisor = covered,
    normalise: bool = False,
) -> Algorithm:
    r"""Local steps on sub-models, averaged entry by entry over who holds it.

    Client i of the sampled set S starts from :math:`m_i \odot v` for v in (x, y, z),
    takes K steps along the oracle's directions on its own units, all three at the same
    point, and returns :math:`D_i`, start minus end. The server then moves

    .. math::
        v_j \leftarrow v_j - \frac{\gamma}{|N_j|} \sum_{i \in N_j} D_{i,j}, \qquad
        N_j = \{i \in S : m_{i,j} = 1\}

    and leaves an entry that nobody holds as it is.

    This simulates the server. On several devices it takes the same steps, but the
    compiler brings the participants' data together: keep private data out of it.

    Args:
        problem: objectives of one client.
        oracle: makes directions for objectives, e.g. ``dbo.oracles.soba``. Its memory
            starts anew in each round.
        fleet: who the clients are and what each one holds.
        upper_step: local step size of x.
        lower_step: of y.
        linear_step: of z; by default as ``lower_step``.
        local_steps: K, or one number per level of ``fleet``.
        inner_steps: steps of y alone, at the old x, before the others.
        personal: y and z stay at the client and are never sent.
        radius: z is scaled back to at most this length, at the server or, if personal,
            at the client after each step. Infinite for ``dbo.oracles.perturbed``, whose
            z is a lower solution.
        server_steps: gamma of x, y and z, or optax transforms.
        uplink: a compressor, which acts on what a client holds and remembers nothing,
            or a server channel over all clients, which acts on whole variables, zero
            where a client holds nothing; one with memory needs all of them in every
            round. None sends everything.
        sample: ``(key, one client's data) -> batch``, e.g.
            ``dbo.tasks.samplers.local(32)``, drawn anew for each local step; by default
            what comes as a batch is used at every one.
        extracted: cut out truly smaller variables, so that time, memory and operations
            fall; the objectives must then work at all widths. False computes at full
            width with zeros.
        smaller: ``{group: units} -> Problem``, for objectives that know their width,
            e.g. of flax modules.
        keep: do not zero what a client does not hold, but leave it at the server's
            values; for comparison, as it saves no memory. Needs ``extracted=False``.
        divide_by: :func:`covered` or :func:`everyone`.
        normalise: divide by each client's number of local steps and multiply by the
            mean of those of all who take part.

    Returns:
        An algorithm; ``init`` takes variables with one row or with one per client, and
        ``step`` a batch with one row per client. Only rows of clients that take part
        are read. ``message`` and ``down`` are the bytes of the largest client.

    Raises:
        ValueError: if a setting is impossible or the objectives do not take
            sub-models; from ``init`` and ``step``, if variables or batches do not fit.
        TypeError: if a part is of another kind.

    References:
        Our formulation of arXiv:2512.24667; averages by coverage as in HeteroFL,
        arXiv:2010.01264; local steps and the server's as in SimFBO, arXiv:2305.19442.
    """
    trees.check_type(problem, Problem, "problem", "dbo.Problem(upper=f, lower=g)")
    trees.check_type(fleet, Fleet, "fleet", "dbo.submodels.fleet(layout, capacities)")
    counts = steps_per_level(local_steps, fleet)
    check_settings(inner_steps, keep, extracted)
    layout, link = fleet.layout, uplink_of(uplink, fleet)
    moved = ("x",) if personal else Held._fields  # what the server moves
    servers = dict(zip(Held._fields, map(local_step, server_steps), strict=True))
    project = _projection(radius)
    steps_per_client = mean_steps(counts, fleet)
    work = Work(
        problem,
        oracle,
        Held(
            upper_step, lower_step, lower_step if linear_step is None else linear_step
        ),
        layout.units,
        Held(layout.x, layout.y, layout.y),
        layout.batch,
        inner_steps,
        project if personal else lambda z: z,
        sample,
        extracted,
        smaller,
        keep,
    )
    calls = _calls(oracle(problem), counts, inner_steps)

    def init(x, y):
        x = one_row(checked_start("x", x, fleet))
        y = checked_start("y", y, fleet)
        y = row_each(y, fleet.clients) if personal else one_row(y)
        first = _first(x)
        z, _ = jax.vmap(lambda own: oracle(problem).init(first, own))(y)
        held = Held(x, y, z)
        shared = {name: _first(getattr(held, name)) for name in moved}
        state = FederatedState(
            *held,
            {name: link.init(v) for name, v in shared.items()},
            {name: servers[name].init(v) for name, v in shared.items()},
            jnp.zeros((), jnp.int32),
        )
        return jax.tree.map(lambda a: jnp.array(a, a.dtype, copy=True), state)

    def step(key, state, batch):
        trees.check_type(state, FederatedState, "state", "method.init(x, y)")
        trees.check_batch(batch, fleet.clients, "batch")
        check_rows(state, fleet.clients if personal else 1)
        key_draw, key_local, key_up = jax.random.split(key, 3)
        server = Held(*map(_first, (state.x, state.y, state.z)))
        local = work._replace(labels=_labels(layout, server))
        check_work(local, fleet.levels, counts, server, batch)
        scores = None
        if fleet.rule.by_magnitude:
            # What is personal is unknown to the server.
            known = jax.tree.map(jnp.zeros_like, server.y) if personal else server.y
            scores = submodels.scores(layout, server.x, known)
        drawn = submodels.draw(fleet, key_draw, state.round, scores)

        def at_level(level, part, count):
            rows, axes = server, Held(None, None, None)
            if personal:
                rows = rows._replace(y=_at(state.y, part), z=_at(state.z, part))
                axes = axes._replace(y=0, z=0)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key_local, part.clients)
            run = functools.partial(visit, local, level, count)
            visits = jax.vmap(run, (0, 0, axes, 0))(
                keys, part.kept, rows, _at(batch, part)
            )
            if normalise:
                weight = steps_per_client / count
                moves = jax.tree.map(lambda m: trees.times(weight, m), visits.moves)
                visits = visits._replace(moves=moves)
            return visits

        visits = list(map(at_level, fleet.levels, drawn, counts))
        present = sum(level.participants for level in fleet.levels)
        holders = {
            name: submodels.counts(
                getattr(local.labels, name), layout.units, drawn, getattr(server, name)
            )
            for name in Held._fields
        }
        state = state._replace(round=state.round + 1)
        sizes, average = [0] * len(drawn), {}
        for number, name in enumerate(moved):
            total, memory, sent = link.total(
                jax.random.fold_in(key_up, number),
                getattr(local.labels, name),
                drawn,
                [getattr(one.moves, name) for one in visits],
                getattr(server, name),
                state.uplink[name],
            )
            average[name] = _divided(total, holders[name], divide_by, present)
            state = _server_step(state, name, servers[name], average[name], memory)
            sizes = [a + b for a, b in zip(sizes, sent, strict=True)]
        if personal:
            state = _write_back(state, local, drawn, visits)
        else:
            z = project(_first(state.z))
            state = state._replace(z=jax.tree.map(lambda a: a[None], z))
        down = _down_bytes(local, fleet, server, moved)
        scale = upper_step * steps_per_client
        metrics = Metrics(
            jnp.concatenate([one.upper for one in visits]).mean(),
            trees.norm(average["x"]) / scale,
            Consensus(*(jnp.zeros(()) for _ in Held._fields)),
            _traffic(fleet, sizes, down),
            calls,
            Coverage(
                submodels.smallest(holders["x"]), submodels.smallest(holders["y"])
            ),
        )
        return state, metrics

    return Algorithm(init, step)


def _server_step(state, name, optimizer, average, memory) -> FederatedState:
    old = _first(getattr(state, name))
    updates, moments = optimizer.update(average, state.server[name], old)
    new = trees.cast(optax.apply_updates(old, updates), old)
    return state._replace(
        uplink=state.uplink | {name: memory},
        server=state.server | {name: moments},
        **{name: jax.tree.map(lambda a: a[None], new)},
    )


def _write_back(state, work, drawn, visits) -> FederatedState:
    """Personal variables of those who took part; the others' rows are not touched."""
    found = {}
    for name in ("y", "z"):
        whole, labels = getattr(state, name), getattr(work.labels, name)
        put_back = functools.partial(submodels.replaced, labels, work.units)
        for part, one in zip(drawn, visits, strict=True):
            rows = jax.vmap(put_back)(
                getattr(one.ends, name), part.kept, _at(whole, part)
            )
            whole = jax.tree.map(
                lambda a, b, at=part.clients: a.at[at].set(b), whole, rows
            )
        found[name] = whole
    return state._replace(**found)


def _divided(total, holders, divide_by, present):
    def leaf(value, count):
        by = jnp.maximum(divide_by(count, present), 1).astype(value.dtype)
        return jnp.where(count > 0, value / by, 0)

    return jax.tree.map(leaf, total, holders)


def _labels(layout: Layout, held: Held) -> Held:
    """Labels of z are those of y, or nothing to cut where z is something else."""
    z = layout.y
    if jax.tree.map(jnp.shape, held.z) != jax.tree.map(jnp.shape, held.y):
        z = jax.tree.map(lambda a: " ".join(["_"] * a.ndim), held.z)
    return Held(layout.x, layout.y, z)


def _down_bytes(work, fleet, server, names) -> list[int]:
    parts = [
        part_bytes(fleet, getattr(work.labels, name), getattr(server, name))
        for name in names
    ]
    return list(map(sum, zip(*parts, strict=True)))


def _traffic(fleet, up, down) -> Traffic:
    shares = [level.participants for level in fleet.levels]
    both = zip(shares, up, down, strict=True)
    total = sum(count * (a + b) for count, a, b in both)
    return Traffic(max(up), total, rounds=2, down=max(down))


def _calls(oracle: Oracle, counts, inner_steps) -> Calls:
    """Of a client that takes the most steps."""
    each = sum(oracle.calls, start=Calls())
    return each * max(counts) + Calls(gradients=1) * inner_steps


def _projection(radius):
    if isinstance(radius, float) and radius == math.inf:
        return lambda z: z
    return ball(radius)


def _first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _at(tree, part):
    return jax.tree.map(lambda leaf: leaf[part.clients], tree)
