"""Time a kernel against the floor: a copy of the same array under the same conditions.

A jitted call that allocates its result costs up to nine times as much as one that
writes into memory it was given. So everything here, floor and work alike, runs inside a
donated scan of many repeats; programs take turns, and a ratio is taken within a turn.
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Program(NamedTuple):
    """A compiled scan over ``repeats`` steps, and what the compiler says of it."""

    run: object  # carry -> carry, donated
    repeats: int
    compile_seconds: float
    operations: float  # of one step: the compiler counts the body of a loop once
    bytes: float  # touched by one step
    temporary: int  # bytes beyond arguments and results


def scanned(step, carry, repeats=20):
    """Compile ``repeats`` steps ``(carry, i) -> carry`` as one donated program."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry):
        def body(carry, i):
            return step(carry, i), None

        return jax.lax.scan(body, carry, jnp.arange(repeats, dtype=jnp.int32))[0]

    start = time.perf_counter()
    compiled = run.lower(carry).compile()
    seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    return Program(
        compiled,
        repeats,
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


def in_turns(programs, carries, turns=20):
    """Seconds per step of each program, ``{label: (turns,)}``; all in turns.

    Args:
        programs: of :func:`scanned`, by label.
        carries: what each starts from; they are copied, since programs are donated.
        turns: how often each is timed, after one turn that warms up.
    """
    held = {label: jax.tree.map(jnp.copy, carries[label]) for label in programs}
    jax.block_until_ready(held)
    seconds = {label: [] for label in programs}
    for turn in range(turns + 1):
        for label, program in programs.items():
            start = time.perf_counter()
            held[label] = jax.block_until_ready(program.run(held[label]))
            spent = (time.perf_counter() - start) / program.repeats
            if turn:
                seconds[label].append(spent)
    return {label: np.array(values) for label, values in seconds.items()}


def against_floor(steps, v, repeats=20, turns=20):
    """Time steps beside the floor of ``v``: ``{label: (Program, ratios, seconds)}``.

    Args:
        steps: ``{label: (step, carry)}``.
        v: the stacked array whose copy is the floor.
        repeats: steps in a scan.
        turns: ratios taken.

    Returns:
        Per label the program, its ratios to the floor of the same turn and its seconds
        per step; the floor itself under ``"floor"``, the one that writes another array
        under ``"other floor"``.
    """
    other = other_copy_step, (v, jnp.zeros_like(v))
    steps = {"floor": (copy_step, v), "other floor": other, **steps}
    programs = {
        label: scanned(step, carry, repeats) for label, (step, carry) in steps.items()
    }
    carries = {label: carry for label, (_, carry) in steps.items()}
    seconds = in_turns(programs, carries, turns)
    floor = seconds["floor"]
    return {
        label: (programs[label], seconds[label] / floor, seconds[label])
        for label in programs
    }


def round_trip(compressor, key):
    """Encode every node's vector, decode it and add a little of it: ``(v, i) -> v``.

    In place, as the memories of a channel are kept; what is sent stays alike from step
    to step.
    """

    def one(key, v):
        payload, _ = compressor.compress(key, v, compressor.init(v))
        if compressor.add:
            return compressor.add(payload, 0.01, v)
        return v + np.asarray(0.01, v.dtype) * compressor.decompress(payload, v)

    def step(v, i):
        nodes = jnp.arange(len(v))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(key, i), nodes
        )
        return jax.vmap(one)(keys, v)

    return step
