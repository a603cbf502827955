"""Many steps: chunks of one compiled scan, with the host at work in between."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Algorithm, State, Tree
from dbojax.runner import feeds, history
from dbojax.runner.checkpoints import digest
from dbojax.runner.history import History
from dbojax.runner.peers import Peers, agree, peers_of, watched
from dbojax.runner.program import Program, inexact, own
from dbojax.runner.resume import File, begin, file_of

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
    measure: int = 1,
    checkpoint: str | os.PathLike | None = None,
    resume: bool | str = True,
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

    Where the state lies on a mesh, it keeps its placement, and what has none, keys and
    batches from the host included, goes to all devices. On a mesh over several
    processes, all of them call ``run`` with the same arguments; each gets the history.

    Args:
        method: the algorithm.
        key: one random key for the whole run.
        state: the start, from ``method.init``; it stays valid.
        batches: one stacked batch for all steps; or a sampler ``(key, step) ->
            batch``, traced, which always gets the same key; or
            ``from_host(batch_at)``; or an iterator of batches. A sampler may close over
            data on the mesh, which stay where they are; where they span processes,
            JAX forbids that inside a further ``jax.jit``.
        num_steps: how many steps, those before a resumed checkpoint included.
        evaluate: called with the state at each chunk's end, on the host; returns
            scores by name. It must copy what it keeps, since the next chunk reuses
            the memory of the state. Every process calls it, and gets the same scores.
        every: steps per chunk; a thousand at least where the host has nothing to do in
            between (no ``evaluate``, ``checkpoint``, host batches, or ``progress`` in
            any process).
        measure: take the metrics of every so manieth step alone, counted from 1; the
            others are NaN in the history. Their means over the nodes are the one thing
            that a compressed method on several devices sends in full.
        checkpoint: a file to write at each chunk's end and to resume from, on whatever
            devices or processes; the one before is kept as ``checkpoint +
            ".previous"``: to start afresh, delete both. Method, batches and
            ``evaluate`` are not in it: pass the same ones again. Several processes
            need a folder that all of them share, in which each writes its own part
            beside the file; to keep a copy, copy the file and its parts,
            ``checkpoint + ".*"``, into another folder. Where each of several processes
            has a run of its own, the last number in the file's name must be
            ``jax.process_index()``, so that no two write to one file.
        resume: whether to go on from an existing checkpoint; if not, an existing one
            is refused, never overwritten. True refuses a damaged one; ``"auto"`` warns
            and takes the older one in its place. Where only the older one is left, both
            warn and go on from it.
        progress: whether the first process shows a bar; needs tqdm. It may differ among
            the processes.
        stop_on_nonfinite: whether to stop at NaN and infinities; if not, e.g. in a
            sweep some of whose runs diverge, they are recorded.

    Returns:
        The state after ``num_steps`` steps, and the history.

    Raises:
        ValueError: before any step, if an argument is impossible, the start is not
            finite, the processes disagree, or the checkpoint is damaged or belongs to
            another run.
        DivergedError: at the end of a chunk that met a non-finite value.
        PeerLostError: if another process of the run is gone.

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
    num_steps, every, measure = _counts(
        num_steps=num_steps, every=every, measure=measure
    )
    feed, state = feeds.feed(batches), own(state)
    peers, file, stands = peers_of(state), None, None
    with watched(lambda: _left(checkpoint, stands)):
        settings = {
            "num_steps": num_steps,
            "every": every,
            "measure": measure,
            "resume": resume,
            "stop_on_nonfinite": bool(stop_on_nonfinite),
            "evaluate": evaluate is not None,
            "checkpoint": checkpoint is not None,
            "batches": [feed.on_host, feed.replayable],
        }
        _check_start(state, key, peers, stop_on_nonfinite, settings)
        file = file_of(checkpoint, feed, key, state, every, peers)
        looks = evaluate is not None or file is not None or feed.on_host
        if not (looks or peers.gather(np.array([bool(progress)]))[:, 0].any()):
            every = max(every, _UNDISTURBED)
        done, state, before = begin(file, state, num_steps, resume)
        stands = done
        program = Program(method, feed, key, peers, measure)
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
                    stands = done
                show(chunk, done)
    rows = history.columns(chunks, before)
    return state, History(rows, program.compile_seconds)


def _left(path, step: int | None) -> str:
    if path is not None and step is None:
        return f"Its checkpoint, {path}, had not been looked for yet."
    if not step:
        return "There is no checkpoint of it."
    return f"The last checkpoint, {path}, stands at step {step}."


def _counts(**counts: int) -> list[int]:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            kind = type(count).__name__
            raise ValueError(f"`{name}` counts steps: expected an int, got {kind}.")
        if count < 1:
            raise ValueError(f"`run` needs {name} >= 1, got {name}={count}.")
    # JSON, into which they go, knows no integers of NumPy.
    return [int(count) for count in counts.values()]


def _check_start(state: State, key, peers: Peers, stop: bool, settings) -> None:
    if peers.size > 1:
        agree(peers, key=digest(key), **settings)
    name = _first_nonfinite(state) if stop else None
    if name is not None:
        raise ValueError(
            f"The start must be finite, but `{name}` holds NaN or an infinity. "
            "Correct it, or pass `stop_on_nonfinite=False` if it is meant."
        )


def _first_nonfinite(state: State) -> str | None:
    return next((name for name, leaf in inexact(state) if not _all_finite(leaf)), None)


def _all_finite(leaf: jax.Array) -> bool:
    # NumPy where it can: each eager operation of JAX would be compiled per shape.
    library = np if leaf.is_fully_addressable else jnp
    return bool(library.isfinite(library.asarray(leaf)).all())


def _diverged(state, chunk, rows: History, file: File | None, done: int):
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
    quiet = jax.process_index() > 0
    with tqdm(total=num_steps, initial=done, unit="step", disable=quiet) as bar:

        def show(chunk, done):
            last = np.flatnonzero(chunk.measured)[-1:]
            loss = float(np.mean(chunk.metrics.upper[last])) if last.size else np.nan
            sent = done * chunk.metrics.traffic.total / 1e6
            bar.set_postfix(loss=f"{loss:.4g}", MB=f"{sent:.4g}", refresh=False)
            bar.update(chunk.length)

        yield show
