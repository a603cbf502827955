"""Many steps: chunks of one compiled scan, with the host at work in between."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Algorithm, State, Tree
from dbojax.runner import checkpoints, feeds, history
from dbojax.runner.history import History

_UNDISTURBED = 1000  # steps per chunk when nothing happens between chunks


class DivergedError(FloatingPointError):
    """A run met a NaN or an infinity and stopped.

    Args:
        message: what to tell the reader.
        history: the rows so far, those of the last chunk included.
        step: the first step that shows it, counted from 1 as in ``history["step"]``.
        quantity: where, e.g. ``consensus.y``, or a leaf of the state.
    """

    def __init__(self, message: str, history: History, step: int, quantity: str):
        super().__init__(message)
        self.history, self.step, self.quantity = history, step, quantity

    def __reduce__(self):
        return type(self), (*self.args, self.history, self.step, self.quantity)


def run(
    method: Algorithm,
    key: jax.Array,
    state: State,
    batches: Tree | Callable | feeds.HostBatches,
    num_steps: int,
    *,
    evaluate: Callable[[State], Mapping[str, Any]] | None = None,
    every: int = 50,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = True,
    progress: bool = False,
    stop_on_nonfinite: bool = True,
) -> tuple[State, History]:
    """Take many steps, and keep what they tell.

    Steps run on the device in chunks of ``every``, each one compiled scan; at a
    chunk's end the host looks for non-finite values, evaluates, writes the checkpoint
    and moves the progress bar. The result is a function of ``(key, start, batches)``:
    with ``a, b = jax.random.split(key)``, step ``t = 0, 1, ...`` receives
    ``fold_in(a, t)`` and a sampler ``(b, t)``. A run that was killed and resumed
    therefore ends with the same bits as one that was not.

    Args:
        method: the algorithm.
        key: one random key for the whole run.
        state: the start, from ``method.init``; it stays valid.
        batches: one stacked batch for all steps; or a sampler ``(key, step) ->
            batch``, traced, which always gets the same key; or
            ``from_host(batch_at)``; or an iterator of batches.
        num_steps: how many steps, those before a resumed checkpoint included.
        evaluate: called with the state at each chunk's end, on the host; returns
            scores by name. It must copy what it keeps, since the next chunk reuses
            the memory of the state.
        every: steps per chunk; a thousand at least where the host has nothing to do in
            between (no ``evaluate``, ``checkpoint``, ``progress`` or host batches).
        checkpoint: a file to write at each chunk's end and to resume from. Method,
            batches and ``evaluate`` are not in it: pass the same ones again.
        resume: whether to go on from an existing checkpoint; if not, an existing one
            is refused, never overwritten.
        progress: whether to show a bar; needs tqdm.
        stop_on_nonfinite: whether to stop at NaN and infinities; if not, e.g. in a
            sweep some of whose runs diverge, they are recorded.

    Returns:
        The state after ``num_steps`` steps, and the history.

    Raises:
        ValueError: before any step, if an argument is impossible, the start is not
            finite, or the checkpoint is damaged or belongs to another run.
        DivergedError: at the end of a chunk that met a non-finite value.

    Examples:
        >>> def step(key, state, batch):
        ...     zero = jnp.zeros(())
        ...     metrics = dbo.Metrics(
        ...         upper=jnp.sum(state**2),
        ...         hypergrad_norm=zero,
        ...         consensus=dbo.base.Consensus(zero, zero, zero),
        ...         traffic=dbo.Traffic(message=8, total=16, rounds=1),
        ...         calls=dbo.Calls(gradients=1),
        ...     )
        ...     return state - 0.5 * (state - batch), metrics
        >>> method = dbo.Algorithm(lambda x, y: x, step)
        >>> state, history = dbo.run(
        ...     method, jax.random.key(0), jnp.zeros(2), jnp.ones(2), num_steps=60
        ... )
        >>> state.tolist(), int(history["total_bytes"][-1])
        ([1.0, 1.0], 960)
    """
    _check_counts(num_steps=num_steps, every=every)
    feed = feeds.feed(batches)
    state = _own(state)
    if stop_on_nonfinite:
        _check_start(state)
    file = _file(checkpoint, feed, key, state, every)
    if evaluate is None and file is None and not (progress or feed.on_host):
        every = max(every, _UNDISTURBED)
    done, state, before = _begin(file, state, num_steps, resume)
    program = _Program(method, feed, key)
    chunks, scores = [], {name: column[-1] for name, column in before.items()}
    with _bar(progress, done, num_steps) as show:
        while done < num_steps:
            length = min(every - done % every, num_steps - done)
            state, chunk, finite = program(state, done, length)
            if stop_on_nonfinite and not finite:
                rows = history.columns([*chunks, chunk], before)
                rows = History(rows, program.compile_seconds)
                raise _diverged(state, chunk, rows, file, done)
            if evaluate is not None:
                chunk = history.scored(chunk, evaluate(state), scores)
                scores = {**scores, **(chunk.scores or {})}
            chunks.append(chunk)
            done += length
            if file is not None:
                before, chunks = history.columns(chunks, before), []
                file.save(state, done, before)
            show(chunk, done)
    rows = history.columns(chunks, before)
    return state, History(rows, program.compile_seconds)


class _Program:
    """The compiled programs of a run, one per chunk length."""

    def __init__(self, method: Algorithm, feed: feeds.Feed, key: jax.Array):
        self.method, self.feed, self.key = method, feed, key
        self.compiled: dict[int, Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, state, first: int, length: int):
        shared, scanned = self.feed.fetch(first, length)
        arguments = (state, self.key, shared, scanned, np.int32(first))
        if length not in self.compiled:
            start = time.perf_counter()
            self.compiled[length] = self.compile(length, arguments)
            self.compile_seconds += time.perf_counter() - start
        start = time.perf_counter()
        out = jax.block_until_ready(self.compiled[length](*arguments))
        seconds = time.perf_counter() - start
        state, metrics, finite = out
        return state, history.Chunk(metrics, seconds), bool(finite)

    def compile(self, length: int, arguments):
        steps = functools.partial(_steps, self.method, self.feed, length)
        placed = (jax.tree.map(_placement, arguments[0]), None, None)
        jitted = jax.jit(steps, donate_argnums=0, out_shardings=placed)
        return jitted.lower(*arguments).compile()


def _steps(method, feed, length, state, key, shared, scanned, first):
    step_key, batch_key = jax.random.split(key)

    def body(state, inputs):
        step, row = inputs
        batch = feed.read(shared, row, batch_key, step)
        return method.step(jax.random.fold_in(step_key, step), state, batch)

    steps = first + jnp.arange(length, dtype=jnp.int32)
    state, metrics = jax.lax.scan(body, state, (steps, scanned))
    return state, metrics, _finite(state) & _finite(metrics)


def _placement(leaf: jax.Array):
    # The next chunk was compiled for the placement of this one.
    return leaf.sharding if leaf.committed else None


def _own(state: State) -> State:
    def copy(leaf):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.copy(leaf)
        # Naming the dtype makes a weakly typed leaf strong: one program for all chunks.
        return jnp.array(leaf, leaf.dtype, copy=True)

    return jax.tree.map(copy, state)


def _finite(tree: Tree) -> jax.Array:
    good = [jnp.isfinite(leaf).all() for _, leaf in _inexact(tree)]
    return jnp.array(good, bool).all()


def _inexact(state: State) -> list[tuple[str, jax.Array]]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    return [
        ("state" + jax.tree_util.keystr(path), leaf)
        for path, leaf in pairs
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            kind = type(count).__name__
            raise ValueError(f"`{name}` counts steps: expected an int, got {kind}.")
        if count < 1:
            raise ValueError(f"`run` needs {name} >= 1, got {name}={count}.")


def _check_start(state: State) -> None:
    name = _first_nonfinite(state)
    if name is not None:
        raise ValueError(
            f"The start must be finite, but `{name}` holds NaN or an infinity. "
            "Correct it, or pass `stop_on_nonfinite=False` if it is meant."
        )


def _first_nonfinite(state: State) -> str | None:
    return next((name for name, leaf in _inexact(state) if not _all_finite(leaf)), None)


def _all_finite(leaf: jax.Array) -> bool:
    # NumPy where it can: each eager operation of JAX would be compiled per shape.
    library = np if leaf.is_fully_addressable else jnp
    return bool(library.isfinite(library.asarray(leaf)).all())


class _File(NamedTuple):
    """A checkpoint, and what tells its run from others."""

    path: Path
    meta: dict[str, Any]

    def save(self, state: State, done: int, columns: history.Columns) -> None:
        meta = {**self.meta, "step": done}
        checkpoints.save(self.path, state, meta, columns)


def _file(checkpoint, feed: feeds.Feed, key, state, every: int) -> _File | None:
    if checkpoint is None:
        return None
    if not feed.replayable:
        raise ValueError(
            "A run with a `checkpoint` cannot take its batches from an iterator, "
            "which cannot be replayed from the middle. Pass `from_host(batch_at)`, "
            "or a sampler `(key, step) -> batch`."
        )
    path = Path(checkpoint)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"`checkpoint` must name a file in an existing folder, got {path}. "
            "Make the folder first."
        )
    start = {"key": checkpoints.digest(key), "start": checkpoints.digest(state)}
    return _File(path, {**start, "every": int(every)})


def _begin(file: _File | None, state, num_steps: int, resume: bool):
    if file is None or not file.path.exists():
        return 0, state, {}
    if not resume:
        raise ValueError(
            f"The checkpoint {file.path} exists and would be overwritten. Pass "
            "`resume=True` to go on from it, or another path, or delete it."
        )
    saved = checkpoints.load(file.path, like=state)
    _check_same(file, saved.meta)
    if saved.meta["step"] > num_steps:
        raise ValueError(
            f"The checkpoint {file.path} is at step {saved.meta['step']}, beyond "
            f"num_steps={num_steps}. Ask for at least as many steps, or pass another "
            "path."
        )
    return saved.meta["step"], saved.tree, saved.columns


def _check_same(file: _File, meta: dict[str, Any]) -> None:
    texts = {
        "key": "its run had another `key`",
        "start": "its run had another start (the shapes agree, the values do not)",
        "every": f"its run had every={meta.get('every')}, this one has "
        f"every={file.meta['every']}",
    }
    for name, text in texts.items():
        if meta.get(name) != file.meta[name]:
            raise ValueError(
                f"The checkpoint {file.path} belongs to another run: {text}. Pass "
                f"the same `{name}`, or another `checkpoint`."
            )


def _diverged(state, chunk, rows: History, file: _File | None, done: int):
    step, quantity = _offender(state, chunk)
    kept = ""
    if file is not None and done:
        kept = f" The last good checkpoint, {file.path}, stands at step {done}."
    return DivergedError(
        f"`{quantity}` is not finite from step {done + step} on.{kept} Lower the step "
        "sizes first, then the channels' gamma; a larger penalty needs smaller steps. "
        "`error.history` holds the rows so far.",
        rows,
        done + step,
        quantity,
    )


def _offender(state: State, chunk: history.Chunk) -> tuple[int, str]:
    measured = history.quantities(chunk.metrics)
    bad = {name: np.argwhere(~np.isfinite(rows)) for name, rows in measured.items()}
    bad = {name: where for name, where in bad.items() if len(where)}
    if not bad:
        return chunk.length, str(_first_nonfinite(state))
    name = min(bad, key=lambda name: bad[name][0][0])
    step, *index = bad[name][0]
    return int(step) + 1, name + "".join(f"[{i}]" for i in index)


@contextlib.contextmanager
def _bar(progress: bool, done: int, num_steps: int):
    if not progress:
        yield lambda chunk, done: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "`progress=True` needs tqdm: pip install dbojax[run]"
        ) from error
    with tqdm(total=num_steps, initial=done, unit="step") as bar:

        def show(chunk, done):
            loss = float(np.mean(chunk.metrics.upper[-1]))
            sent = done * chunk.metrics.traffic.total / 1e6
            bar.set_postfix(loss=f"{loss:.4g}", MB=f"{sent:.4g}", refresh=False)
            bar.update(chunk.length)

        yield show
