"""Time a kernel against the floor: a copy of the same array under the same conditions.

A jitted call that allocates its result costs up to nine times as much as one that
writes into memory it was given. So everything here, floor and work alike, runs inside a
donated loop of many repeats; programs take turns, and a ratio is taken within a turn.
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

REPEATS = 20  # steps in a call, at least, unless a step takes long
SHORTEST = 5e-3  # seconds of a call; a step of microseconds is repeated more often
LONGEST = 0.1  # seconds of a call; a step of more than 5 ms is repeated less
FEWEST = 5  # turns, whatever the time that is left


class Program(NamedTuple):
    """A compiled loop over any number of steps, and what the compiler says of it."""

    run: object  # (carry, repeats) -> carry, donated
    compile_seconds: float
    operations: float  # of one step: the compiler counts the body of a loop once
    bytes: float  # touched by one step
    temporary: int  # bytes beyond arguments and results


def looped(step, carry):
    """Compile a loop over steps ``(carry, i) -> carry`` as one donated program."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, repeats):
        return jax.lax.fori_loop(0, repeats, lambda i, carry: step(carry, i), carry)

    start = time.perf_counter()
    compiled = run.lower(carry, jnp.int32(0)).compile()
    seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    return Program(
        compiled,
        seconds,
        cost.get("flops", float("nan")),
        cost.get("bytes accessed", float("nan")),
        memory.temp_size_in_bytes if memory else 0,
    )


def copy_step(v, i):
    """The floor: read an array and write it, ``v * 1.01``."""
    del i
    return jax.tree.map(lambda leaf: leaf * np.asarray(1.01, leaf.dtype), v)


def other_copy_step(carry, i):
    """The floor of work that cannot be done in place: read one array, write another.

    It moves the same bytes as :func:`copy_step` and needs twice the cache.
    """
    v, _ = carry
    return v, v * (1 + 1e-3 * i.astype(v.dtype))


def elsewhere(function):
    """A step that writes ``function(v)`` into another array: ``((v, out), i)``.

    ``v <- function(v)`` would have to copy ``v`` first wherever an entry of the result
    hangs on more than the same entry of ``v``. The condition always holds, which the
    compiler cannot know, so it does not take the work out of the loop; where a branch
    waits for the host, a factor that it cannot know to be one does the same.
    """

    def branch(v, i):
        return jax.lax.cond(i >= 0, function, lambda v: v, v)

    def factor(v, i):
        return function(v * (1 + 1e-30 * i.astype(v.dtype)))

    def step(carry, i):
        v, _ = carry
        return v, jax.lax.platform_dependent(v, i, cpu=branch, default=factor)

    return step


def repeats_for(seconds):
    """How many steps of so many seconds a call takes."""
    many = max(REPEATS, SHORTEST / seconds)
    return int(np.clip(LONGEST / seconds, 1, many))


def in_turns(programs, carries, turns=20, budget=float("inf"), alike=()):
    """Seconds per step of each program, ``{label: (turns,)}``; all in turns.

    Args:
        programs: of :func:`looped`, by label.
        carries: what each starts from; they are copied, since programs are donated.
        turns: how often each is timed, after calls that warm up and set its repeats.
        budget: seconds after which no further turn begins, once there are ``FEWEST``.
        alike: groups of labels whose calls take as many steps as that with the fewest.
            A call gets the memory of its temporaries from the system, page by page, so
            that steps of large programs look slower the fewer there are in a call.
    """
    held = {label: jax.tree.map(jnp.copy, carries[label]) for label in programs}
    jax.block_until_ready(list(held.values()))
    repeats = dict.fromkeys(programs, 1)
    seconds = {label: [] for label in programs}

    def timed(label):
        run, count = programs[label].run, jnp.int32(repeats[label])
        start = time.perf_counter()
        held[label] = jax.block_until_ready(run(held[label], count))
        return (time.perf_counter() - start) / repeats[label]

    for label in programs:
        if timed(label) < LONGEST:
            repeats[label] = repeats_for(timed(label))
            repeats[label] = repeats_for(timed(label))
    for group in alike:
        repeats |= dict.fromkeys(group, min(repeats[label] for label in group))
    end = time.perf_counter() + budget
    for turn in range(turns):
        if turn >= FEWEST and time.perf_counter() > end:
            break
        for label in programs:
            seconds[label].append(timed(label))
    return {label: np.array(values) for label, values in seconds.items()}


def compiled(step, carry):
    """:func:`looped`, but for a floor that has been seen at these shapes."""
    if step not in (copy_step, other_copy_step):
        return looped(step, carry)
    leaves, tree = jax.tree.flatten(carry)
    return _floor(step, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))


@functools.cache
def _floor(step, tree, kinds):
    return looped(step, tree.unflatten(jax.ShapeDtypeStruct(*kind) for kind in kinds))


def measured(steps, turns=20, budget=float("inf"), alike=()):
    """Compile and time ``{label: (step, carry)}``: ``{label: (Program, seconds)}``."""
    programs = {label: compiled(*parts) for label, parts in steps.items()}
    carries = {label: carry for label, (_, carry) in steps.items()}
    seconds = in_turns(programs, carries, turns, budget, alike)
    return {label: (programs[label], seconds[label]) for label in programs}


def against_floor(steps, v, turns=20, budget=float("inf")):
    """Time steps beside the floor of ``v``: ``{label: (Program, ratios, seconds)}``.

    Args:
        steps: ``{label: (step, carry)}``.
        v: the stacked array whose copy is the floor.
        turns: ratios taken.
        budget: seconds, as for :func:`in_turns`.

    Returns:
        Per label the program, its ratios to the floor of the same turn and its seconds
        per step; the floor itself under ``"floor"``, the one that writes another array
        under ``"other floor"``.
    """
    other = other_copy_step, (v, jnp.zeros_like(v))
    steps = {"floor": (copy_step, v), "other floor": other, **steps}
    found = measured(steps, turns, budget)
    floor = found["floor"][1]
    return {
        label: (program, seconds / floor, seconds)
        for label, (program, seconds) in found.items()
    }


def round_trip(compressor, key, v):
    """Encode every node's vector, decode it and add a little: a step and its carry.

    In place, as the memories of a channel are kept; what is sent stays alike from step
    to step.
    """

    def one(key, v, memory):
        payload, memory = compressor.compress(key, v, memory)
        if compressor.add:
            return compressor.add(payload, 0.01, v), memory
        sent = compressor.decompress(payload, v)
        return v + np.asarray(0.01, v.dtype) * sent, memory

    def step(carry, i):
        return jax.vmap(one)(node_keys(key, i, len(v)), *carry)

    return step, (v, jax.vmap(compressor.init)(v))


def node_keys(key, i, n):
    """A key for each node at step ``i``."""
    key = jax.random.fold_in(key, i)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
