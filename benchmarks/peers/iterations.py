"""Iterations of bilevel solvers beside JAX by hand and benchopt's benchmark."""

from collections.abc import Callable
from typing import NamedTuple

import benchopt_solvers
import bilevel
import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import turns
from report import quartiles

STEPS = 32 * bilevel.BLOCKS  # of one scan


class Contender(NamedTuple):
    """A scan that goes on with each call, and where it stands."""

    call: Callable
    point: Callable  # () -> (x, y)
    cost: dict | None = None  # the compiled program's own count of one step


def contender(step, draws, start, arrays, point):
    key = jax.random.key(0)
    scan = jax.jit(bilevel.scanned(step, draws, STEPS), donate_argnums=0)
    program = scan.lower(start, key, *arrays).compile()
    call, state = turns.donated(program, start, key, *arrays)
    one = key, start, *arrays, jnp.zeros(draws, jnp.int32)
    compiled = jax.jit(step, donate_argnums=1).lower(*one).compile()
    return Contender(call, lambda: point(state()), compiled.cost_analysis())


def ours(name, dtype, metrics=False):
    x, y, *arrays = bilevel.arguments(dtype)
    solver = bilevel.SOLVERS[name](bilevel.problem(*arrays))
    start = solver.method.init(x[None], y[None])
    step = bilevel.step_of(name, metrics)
    return contender(step, solver.draws, start, arrays, lambda s: (s.x[0], s.y[0]))


def hand(name, dtype):
    begin, step = by_hand.SOLVERS[name]
    x, y, *arrays = bilevel.arguments(dtype)
    return contender(step, 2, begin(x, y), arrays, lambda s: (s.x, s.y))


def makers(name, benchopt):
    """Who takes part -> function of a dtype that makes it."""
    found = {
        "dbojax": lambda dtype: ours(name, dtype),
        "dbojax with its metrics": lambda dtype: ours(name, dtype, metrics=True),
    }
    if name in by_hand.SOLVERS:
        found["by hand"] = lambda dtype: hand(name, dtype)
    if benchopt is not None:
        found["benchopt"] = lambda dtype: Contender(
            *benchopt_solvers.call(benchopt, name, dtype, STEPS)
        )
    return found


def error(make):
    """Of x after one scan in float32, to the same in float64; draws are the same."""
    ends = []
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            one = make(dtype)
            one.call()
            ends.append(np.asarray(one.point()[0]))
    return turns.distance(*ends)


def upper_loss(point):
    *_, above, _ = bilevel.arguments(jnp.float32)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), above)
    return float(bilevel.upper(*point, flat))


def count(of, base, name):
    if of is None or base is None:
        return ""
    return f"{of[name] / base[name]:.3f}"


def rows(repeats, benchopt=None):
    if benchopt is not None and not turns.is_there("benchopt"):
        benchopt = None
    if benchopt is None:
        print("No --benchopt PATH: the solvers of benchopt's benchmark are left out.")
    for name in bilevel.SOLVERS:
        found = makers(name, benchopt)
        made = {who: make(jnp.float32) for who, make in found.items()}
        calls = {who: one.call for who, one in made.items()}
        times = turns.taken_in_turns(calls, repeats)
        base = made["by hand"].cost if "by hand" in made else None
        for who, one in made.items():
            yield {
                "solver": name,
                "who": who,
                "us / iteration": quartiles(np.multiply(times[who], 1e6 / STEPS), 1),
                "time / dbojax": turns.times_base(times, who, "dbojax"),
                "operations / by hand": count(one.cost, base, "flops"),
                "bytes / by hand": count(one.cost, base, "bytes accessed"),
                "upper loss": f"{upper_loss(one.point()):.4f}",
                "error to float64": f"{error(found[who]):.0e}",
            }
