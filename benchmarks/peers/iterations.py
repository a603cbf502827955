"""Iterations of bilevel solvers beside JAX by hand and benchopt's benchmark."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import benchopt_solvers
import bilevel
import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import objectives
import turns
from report import quartiles

OURS, METRICS, HAND = "dbojax", "dbojax with its metrics", "by hand"
THEIRS = "benchopt"


class Contender(NamedTuple):
    """A scan that goes on with each call, and where it stands."""

    call: Callable
    point: Callable  # () -> (x, y)
    cost: dict | None = None  # the compiled program's own count of one step


class Entry(NamedTuple):
    """Who takes part with which writing of the objective."""

    who: str
    task: objectives.Task
    make: Callable  # dtype -> Contender


def contender(task, step, draws, start, arrays, point, count):
    key = jax.random.key(0)
    scan = jax.jit(bilevel.scanned(task, step, draws), donate_argnums=0)
    program = scan.lower(start, key, *arrays).compile()
    call, state = turns.donated(program, start, key, *arrays)
    cost = None
    if count:
        one = key, start, *arrays, jnp.zeros(draws, jnp.int32)
        compiled = jax.jit(step, donate_argnums=1).lower(*one).compile()
        cost = compiled.cost_analysis()
    return Contender(call, lambda: point(state()), cost)


def counted(name, task, dtype):
    """Whether to count operations: there is a step by hand to compare with."""
    return name in by_hand.SOLVERS and not task.theirs and dtype == jnp.float32


def ours(name, task, dtype, metrics=False):
    x, y, *arrays = task.arguments(dtype)
    solver = bilevel.made(name, task, *arrays)
    return contender(
        task,
        bilevel.step_of(name, task, metrics),
        solver.draws,
        solver.method.init(x[None], y[None]),
        arrays,
        lambda state: (state.x[0], state.y[0]),
        counted(name, task, dtype),
    )


def hand(name, task, dtype):
    begin, step = by_hand.SOLVERS[name]
    x, y, *arrays = task.arguments(dtype)
    return contender(
        task,
        functools.partial(step, task),
        2,
        begin(task, x, y),
        arrays,
        lambda state: (state.x, state.y),
        counted(name, task, dtype),
    )


def entries(name, task, benchopt):
    """Who takes part on one task."""
    found = {OURS: lambda dtype: ours(name, task, dtype)}
    if name in by_hand.SOLVERS:
        if task.metrics:
            found[METRICS] = lambda dtype: ours(name, task, dtype, metrics=True)
        found[HAND] = lambda dtype: hand(name, task, dtype)
    if benchopt is not None:
        found[THEIRS] = lambda dtype: Contender(
            *benchopt_solvers.call(benchopt, name, task, dtype)
        )
    return [Entry(who, task, make) for who, make in found.items()]


def after_one_scan(one):
    """x by then; draws are the same in every precision."""
    one.call()
    return np.asarray(one.point()[0])


def truths(found):
    """Who -> x after one scan in float64, of all writings the first.

    By hand has that of ours. benchopt's draws are its own, and so is its truth.
    """
    exact = {}
    with jax.enable_x64(True):
        for entry in found:
            if entry.who in (OURS, THEIRS) and entry.who not in exact:
                exact[entry.who] = after_one_scan(entry.make(jnp.float64))
    return exact | dict.fromkeys((METRICS, HAND), exact[OURS])


def upper_loss(task, point):
    *_, above, _ = task.arguments(jnp.float32)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), above)
    return float(task.upper(*point, flat))


def count(of, base, name):
    if of is None or base is None:
        return ""
    return f"{of[name] / base[name]:.3f}"


def compared(name, tasks, benchopt, repeats):
    """Rows of one solver on one problem; ratios are to dbojax on the last writing."""
    found = [entry for task in tasks for entry in entries(name, task, benchopt)]
    exact = truths(found)
    made = {(e.who, e.task.writing): e.make(jnp.float32) for e in found}
    errors = [
        turns.distance(after_one_scan(one), exact[who])
        for (who, _), one in made.items()
    ]
    calls = {label: one.call for label, one in made.items()}
    times = turns.taken_in_turns(calls, repeats)
    last = tasks[-1]
    for entry, error in zip(found, errors, strict=True):
        task, label = entry.task, (entry.who, entry.task.writing)
        one, base = made[label], made.get((HAND, task.writing))
        each = np.multiply(times[label], 1e6 / (task.epochs * task.blocks))
        yield {
            "problem": task.problem,
            "solver": name,
            "objective": task.writing,
            "who": entry.who,
            "us / iteration": quartiles(each, 1),
            "time / dbojax": turns.times_base(times, label, (OURS, last.writing)),
            "operations / by hand": count(one.cost, base and base.cost, "flops"),
            "bytes / by hand": count(one.cost, base and base.cost, "bytes accessed"),
            "upper loss": f"{upper_loss(last, one.point()):.4f}",
            "error to float64": f"{error:.0e}",
        }


def rows(repeats, benchopt=None):
    if benchopt is not None and not turns.is_there("benchopt"):
        benchopt = None
    if benchopt is None:
        print("No --benchopt PATH: the solvers of benchopt's benchmark are left out.")
    for tasks in ((objectives.logistic(),), objectives.quadratics()):
        for name in bilevel.SOLVERS:
            yield from compared(name, tasks, benchopt, repeats)
