"""The compiled scan of a chunk, on one device, on a mesh, or over many processes."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from dbojax import trees
from dbojax.base import Algorithm, State, Tree
from dbojax.runner import feeds, history
from dbojax.runner.peers import Peers, barrier, wait


class Program:
    """The compiled programs of a run, one per chunk length."""

    def __init__(
        self, method: Algorithm, feed: feeds.Feed, key, peers: Peers, measure: int = 1
    ):
        self.method, self.feed, self.key, self.peers = method, feed, key, peers
        self.measure = measure
        self.compiled: dict[int, Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, state, first: int, length: int):
        """Take a chunk of steps: state, what it left behind, whether all is finite."""
        shared, scanned = self.feed.fetch(first, length)
        arguments = (state, self.key, shared, scanned, np.int32(first))
        if length not in self.compiled:
            start = time.perf_counter()
            self.compiled[length] = self._compile(length, arguments)
            self.compile_seconds += time.perf_counter() - start
            # Processes compile at different speeds, and new links give up after 30 s.
            barrier(self.peers)
        start = time.perf_counter()
        state, metrics, good = self.compiled[length](*arguments)
        if self.peers.size > 1:
            wait(good)
        jax.block_until_ready((state, metrics, good))
        seconds = time.perf_counter() - start
        measured = (first + 1 + np.arange(length)) % self.measure == 0
        return state, history.Chunk(metrics, seconds, measured=measured), bool(good)

    def _compile(self, length: int, arguments):
        state = arguments[0]
        steps = functools.partial(_steps, self.method, self.feed, length, self.measure)
        placed = (jax.tree.map(_placement, state), *[everywhere(state)] * 2)
        compiled = functools.partial(jax.jit, donate_argnums=0, out_shardings=placed)
        traced = compiled(steps).trace(*arguments)
        consts = traced.jaxpr.consts
        if not any(_spread_alike(const, state) for const in consts):
            return traced.lower().compile()
        # Data on a mesh that the method or the sampler closes over: as constants each
        # device would get all of them, and other processes could not be reached.
        flat = _with_consts(traced.jaxpr.jaxpr, jax.tree.structure(traced.out_info))
        hoisted = compiled(flat).lower(*arguments, consts).compile()
        return lambda *arguments: hoisted(*arguments, consts)


def _with_consts(jaxpr, structure):
    def steps(*arguments):
        *arguments, consts = arguments
        leaves = jax.tree.leaves(arguments)
        out = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*leaves)
        return jax.tree.unflatten(structure, out)

    return steps


def _spread_alike(const, state: State) -> bool:
    like = everywhere(state)
    return (
        like is not None
        and isinstance(const, jax.Array)
        and isinstance(const.sharding, jax.NamedSharding)
        and const.sharding.device_set == like.device_set
    )


def _steps(method, feed, length, measure, state, key, shared, scanned, first):
    step_key, batch_key = jax.random.split(key)

    def body(state, inputs):
        step, row = inputs
        batch = feed.read(shared, row, batch_key, step)

        def measured(state):
            return method.step(jax.random.fold_in(step_key, step), state, batch)

        def bare(state):
            # Nobody reads these metrics, so the compiler leaves out what they cost.
            state, metrics = measured(state)
            return state, jax.tree.map(jnp.zeros_like, metrics)

        if measure == 1:
            return measured(state)
        return jax.lax.cond((step + 1) % measure == 0, measured, bare, state)

    steps = first + jnp.arange(length, dtype=jnp.int32)
    state, metrics = jax.lax.scan(body, state, (steps, scanned))
    return state, metrics, finite(state) & finite(metrics)


def _placement(leaf: jax.Array):
    # The next chunk was compiled for the placement of this one.
    return leaf.sharding if leaf.committed else None


def everywhere(state: State) -> jax.NamedSharding | None:
    """A copy for every device of the mesh on which a state lies, if it does."""
    for leaf in jax.tree.leaves(state):
        placed = isinstance(leaf, jax.Array) and leaf.committed
        if placed and isinstance(leaf.sharding, jax.NamedSharding):
            return jax.NamedSharding(leaf.sharding.mesh, jax.P())
    return None


def own(state: State) -> State:
    """A copy to be donated; leaves without a place go to all devices of the mesh."""
    state = jax.tree.map(jnp.asarray, state)
    common = everywhere(state)
    if common is None:
        return _copy(state)
    places = jax.tree.map(lambda leaf: _placement(leaf) or common, state)
    return jax.jit(_copy, out_shardings=places)(state)


def _copy(state: State) -> State:
    def copy(leaf):
        if trees.is_key(leaf):
            return jnp.copy(leaf)
        # Naming the dtype makes a weakly typed leaf strong: one program for all chunks.
        return jnp.array(leaf, leaf.dtype, copy=True)

    return jax.tree.map(copy, state)


def finite(tree: Tree) -> jax.Array:
    """Whether no leaf holds NaN or an infinity."""
    good = [jnp.isfinite(leaf).all() for _, leaf in inexact(tree)]
    return jnp.array(good, bool).all()


def inexact(state: State) -> list[tuple[str, jax.Array]]:
    """The leaves that could hold NaN, by name."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    return [
        ("state" + jax.tree_util.keystr(path), leaf)
        for path, leaf in pairs
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
