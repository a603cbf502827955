import csv
import itertools
import json
import pickle
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runner_methods import CALLS, TRAFFIC, exploding, noisy, sampler, start

import dbojax as dbo
from dbojax.base import Consensus
from dbojax.runner import peers


@pytest.fixture
def x():
    return jnp.arange(12.0).reshape(4, 3) / 10


@pytest.fixture
def batch():
    return jnp.ones((4, 3))


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    # Else none of these short runs would ever see a second chunk.
    monkeypatch.setattr("dbojax.runner.loop._UNDISTURBED", 1)


def bits(tree):
    return [
        np.asarray(jax.random.key_data(a) if a.dtype == jax.random.key(0).dtype else a)
        for a in jax.tree.leaves(tree)
    ]


def same(a, b):
    return all(
        p.tobytes() == q.tobytes() for p, q in zip(bits(a), bits(b), strict=True)
    )


def columns_same(a, b, but=("seconds",)):
    assert list(a) == list(b)
    return all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes()
        for name in a
        if name not in but
    )


def by_hand(method, key, state, batch_at, steps):
    step_key, batch_key = jax.random.split(key)
    step, rows = jax.jit(method.step), []
    for t in range(steps):
        batch = batch_at(batch_key, t)
        state, row = step(jax.random.fold_in(step_key, t), state, batch)
        rows.append(row)
    return state, rows


def test_equals_a_python_loop_of_steps(key, x):
    state, history = dbo.run(noisy(), key, start(x), sampler, 13, every=5)
    expected, rows = by_hand(noisy(), key, start(x), sampler, 13)
    chex.assert_trees_all_close(bits(state), bits(expected), rtol=1e-12)
    for name in ("upper", "hypergrad_norm"):
        column = [getattr(row, name) for row in rows]
        np.testing.assert_allclose(history[name], column, rtol=1e-12)
    for name in "xyz":
        column = [getattr(row.consensus, name) for row in rows]
        np.testing.assert_allclose(history[f"consensus_{name}"], column, rtol=1e-12)


def test_the_chunk_length_does_not_matter(key, x):
    expected = dbo.run(noisy(), key, start(x), sampler, 30, every=30)
    for every in (6, 29):
        found = dbo.run(noisy(), key, start(x), sampler, 30, every=every)
        # A chunk of one step may be compiled otherwise: same numbers, not same bits.
        chex.assert_trees_all_close(bits(found[0]), bits(expected[0]), rtol=1e-12)
        for name in found[1].keys() - {"seconds"}:
            np.testing.assert_allclose(found[1][name], expected[1][name], 1e-12, 1e-12)


def test_another_key_gives_another_run(key, x, batch):
    one, _ = dbo.run(noisy(), key, start(x), batch, 3)
    other, _ = dbo.run(noisy(), jax.random.key(8), start(x), batch, 3)
    assert not jnp.any(one.x == other.x)


@pytest.mark.parametrize(("steps", "traces"), [(30, 1), (33, 2), (4, 1)])
def test_one_trace_per_chunk_length(key, x, batch, steps, traces):
    count = []

    def step(key, state, batch):
        count.append(None)
        return noisy().step(key, state, batch)

    method = dbo.Algorithm(lambda x, y: start(x), step)
    dbo.run(method, key, start(x), batch, steps, every=10)
    assert len(count) == traces


@pytest.mark.parametrize(("watched", "chunks"), [(False, 1), (True, 3)])
def test_chunks_are_long_unless_the_host_wants_to_look(
    key, x, batch, monkeypatch, watched, chunks
):
    monkeypatch.setattr("dbojax.runner.loop._UNDISTURBED", 1000)
    looks = {"evaluate": lambda state: {"one": 1.0}} if watched else {}
    _, history = dbo.run(noisy(), key, start(x), batch, 30, every=10, **looks)
    # Time is spread evenly inside a chunk: one rate per chunk.
    rates = np.diff(history["seconds"], prepend=0.0)
    assert len(np.unique(rates.round(12))) == chunks


def test_the_caller_keeps_the_start(key, x, batch):
    state = start(x)
    before = bits(state)
    dbo.run(noisy(), key, state, batch, 10, every=2)
    chex.assert_trees_all_equal(bits(state), before)


def test_leaves_that_share_memory_or_are_weak_or_numpy(key):
    x = jnp.ones(3)

    def step(key, state, batch):
        _, metrics = noisy().step(key, start(x), batch)
        return {**state, "b": state["a"], "c": state["c"] * 0.5}, metrics

    state = {"a": x, "b": x, "c": 1.0, "d": np.ones(2), "e": x}
    final, _ = dbo.run(
        dbo.Algorithm(lambda x, y: x, step), key, state, jnp.ones(3), 4, every=2
    )
    assert final["c"] == 0.5**4
    assert isinstance(state["d"], np.ndarray)
    assert x.sum() == 3


def test_all_sources_of_batches_agree(key, x):
    rows = np.random.default_rng(0).normal(size=(15, 4, 3))
    table = jnp.asarray(rows)
    sources = {
        "sampler": lambda key, step: table[step],
        "from_host": dbo.from_host(lambda step: rows[step]),
        "iterator": iter(rows),
        "generator": (row for row in rows),
    }
    runs = {
        name: dbo.run(noisy(), key, start(x), source, 15, every=5)
        for name, source in sources.items()
    }
    expected, _ = by_hand(noisy(), key, start(x), lambda _, t: table[t], 15)
    for state, history in runs.values():
        chex.assert_trees_all_close(bits(state), bits(expected), rtol=1e-12)
        assert columns_same(history, runs["sampler"][1])


def test_one_stacked_batch_is_used_at_every_step(key, x, batch):
    one, _ = dbo.run(noisy(), key, start(x), batch, 6, every=3)
    other, _ = dbo.run(noisy(), key, start(x), itertools.repeat(batch), 6, every=3)
    assert same(one, other)


def test_a_sampler_sees_one_key_and_every_step(key, x):
    def step(key, state, batch):
        state, metrics = noisy().step(key, state, jnp.ones((4, 3)))
        return state, metrics._replace(upper=batch["step"] + batch["draw"])

    def sampler(key, step):
        return {"step": step, "draw": jax.random.uniform(key)}

    method = dbo.Algorithm(lambda x, y: start(x), step)
    _, history = dbo.run(method, key, start(x), sampler, 11, every=4)
    draw = history["upper"] - np.arange(11)
    np.testing.assert_allclose(draw, draw[0], rtol=1e-12)


def test_counts_are_exact_and_cumulative(key, x, batch):
    _, history = dbo.run(noisy(), key, start(x), batch, 23, every=10)
    steps = list(range(1, 24))
    assert history["step"].tolist() == steps
    expected = {
        "message_bytes": TRAFFIC.message,
        "down_bytes": TRAFFIC.down,
        "total_bytes": TRAFFIC.total,
        "rounds": TRAFFIC.rounds,
        "gradients": CALLS.gradients,
        "products": CALLS.products,
    }
    for name, each in expected.items():
        assert history[name].dtype == np.int64
        assert history[name].tolist() == [each * t for t in steps]
    assert all(len(column) == 23 for column in history.values())


def test_metrics_of_some_steps_alone(key, x, batch):
    method = noisy()
    whole, all_rows = dbo.run(method, key, method.init(x, x), batch, 10, every=5)
    state, some = dbo.run(
        method, key, method.init(x, x), batch, 10, every=5, measure=3, progress=True
    )
    assert same(state, whole)
    taken = all_rows["step"] % 3 == 0
    for name, column in all_rows.items():
        if name == "seconds":
            continue
        measured = name.startswith(("upper", "hypergrad", "consensus"))
        expected = np.where(taken, column, np.nan) if measured else column
        np.testing.assert_array_equal(some[name], expected, err_msg=name)


def test_seconds_rise_and_leave_compiling_out(key, x, batch):
    _, history = dbo.run(noisy(), key, start(x), batch, 20, every=10)
    assert (np.diff(history["seconds"], prepend=0) > 0).all()
    assert history.compile_seconds > history["seconds"][-1]


def test_evaluate_runs_at_the_end_of_chunks(key, x, batch):
    seen = []

    def evaluate(state):
        seen.append(int(state.count))
        return {"count": state.count, "pair": jnp.full(2, len(seen))}

    _, history = dbo.run(noisy(), key, start(x), batch, 25, every=10, evaluate=evaluate)
    assert seen == [10, 20, 25]
    rows = history.evaluated()
    assert rows["step"].tolist() == rows["count"].tolist() == seen
    assert rows["pair"].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert np.isnan(history["count"]).sum() == 22
    assert history["pair"].shape == (25, 2)


def test_without_evaluate_no_row_counts_as_evaluated(key, x, batch):
    _, history = dbo.run(noisy(), key, start(x), batch, 3)
    assert len(history.evaluated()["step"]) == 0


def test_scores_must_keep_off_the_columns_and_keep_their_shape(key, x, batch):
    with pytest.raises(ValueError, match=r"must not name a score.*'upper'"):
        dbo.run(noisy(), key, start(x), batch, 3, evaluate=lambda s: {"upper": 1.0})
    shapes = iter([(), (2,)])
    with pytest.raises(
        ValueError, match=r"'a' of `evaluate` must keep its shape, \(\)"
    ):
        dbo.run(
            noisy(),
            key,
            start(x),
            batch,
            4,
            every=2,
            evaluate=lambda s: {"a": np.zeros(next(shapes))},
        )


@pytest.mark.parametrize(
    ("what", "quantity", "step"),
    [("x", "hypergrad_norm", 17), ("y", "consensus.y", 17), ("hidden", "state[2]", 20)],
)
def test_divergence_is_named_and_the_history_kept(key, x, batch, what, quantity, step):
    method = exploding(17, what)
    with pytest.raises(dbo.DivergedError, match="Lower the step sizes") as caught:
        dbo.run(method, key, method.init(x, x), batch, 100, every=10)
    error = caught.value
    assert isinstance(error, FloatingPointError)
    assert (error.quantity, error.step) == (quantity, step)
    assert f"`{quantity}`" in str(error)
    assert f"step {step}" in str(error)
    assert error.history["step"].tolist() == list(range(1, 21))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.step) == (str(error), error.step)
    assert columns_same(again.history, error.history)


def test_divergence_leaves_the_last_good_checkpoint(key, x, batch, tmp_path):
    path = tmp_path / "run.npz"
    method = exploding(17, "y")
    with pytest.raises(dbo.DivergedError, match=r"run\.npz, stands at step 10"):
        dbo.run(method, key, method.init(x, x), batch, 100, every=10, checkpoint=path)
    saved = dbo.checkpoints.load(path, like=method.init(x, x))
    assert saved.meta["step"] == 10
    assert jnp.isfinite(saved.tree[1]).all()


def test_a_sweep_may_record_what_diverges(key, x, batch):
    method = exploding(3, "y")
    start = method.init(x, x)
    _, history = dbo.run(method, key, start, batch, 9, every=4, stop_on_nonfinite=False)
    assert np.isnan(history["consensus_y"]).tolist() == [False] * 2 + [True] * 7


def test_a_start_that_is_not_finite_is_refused(key, x, batch):
    state = start(x)._replace(half=jnp.full(3, jnp.nan, jnp.bfloat16))

    def step(key, state, batch):
        raise AssertionError("must not be traced")

    method = dbo.Algorithm(lambda x, y: state, step)
    with pytest.raises(ValueError, match=r"`state.half` holds NaN or an infinity"):
        dbo.run(method, key, state, batch, 3)


REFUSED = {
    "steps": (dict(num_steps=0), "needs num_steps >= 1, got num_steps=0"),
    "every": (dict(every=0), "needs every >= 1, got every=0"),
    "float": (dict(num_steps=1e3), "`num_steps` counts steps.*got float"),
    "list": (dict(batches=["a"]), "`batches` must be one stacked batch.*got str"),
    "loader": (dict(batches=object()), "`batches` must be .*got object"),
    "short": (dict(batches=iter([])), "ended at step 0"),
    "ragged": (
        dict(batches=dbo.from_host(lambda t: np.ones((4, 3 + t)))),
        "one structure and one shape.*step 1",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_arguments_are_refused(key, x, change, message):
    settings = {"batches": jnp.ones((4, 3)), "num_steps": 5, **change}
    with pytest.raises(ValueError, match=message):
        dbo.run(noisy(), key, start(x), **settings)


def test_csv_and_jsonl_read_back_to_the_same_bits(key, x, batch, tmp_path):
    _, history = dbo.run(
        noisy(),
        key,
        start(x),
        batch,
        5,
        every=2,
        evaluate=lambda s: {"loss": jnp.sum(s.x), "row": s.x[0]},
    )
    history.to_csv(tmp_path / "h.csv")
    with open(tmp_path / "h.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [int(row["total_bytes"]) for row in rows] == history["total_bytes"].tolist()
    upper = np.array([float(row["upper"]) for row in rows])
    assert upper.tobytes() == history["upper"].tobytes()
    np.testing.assert_array_equal(
        [float(row["row[2]"]) for row in rows], history["row"][:, 2]
    )
    history.to_jsonl(tmp_path / "h.jsonl")
    lines = [
        json.loads(line) for line in (tmp_path / "h.jsonl").read_text().splitlines()
    ]
    assert [line["upper"] for line in lines] == history["upper"].tolist()
    assert lines[0]["loss"] is None
    assert lines[0]["row"] == [None] * 3
    assert lines[1]["row"] == history["row"][1].tolist()


def test_vmapped_runs_equal_single_runs(key, x):
    runs = 3
    starts = jax.vmap(noisy().init)(
        x[None] * jnp.arange(1.0, 4)[:, None, None], x[None] + jnp.zeros((runs, 1, 1))
    )
    rows = jnp.arange(runs * 12.0).reshape(runs, 4, 3)
    many, history = dbo.run(dbo.vmapped(noisy(), runs), key, starts, rows, 9, every=3)
    assert history["upper"].shape == (9, runs)
    assert history["total_bytes"][-1] == 9 * TRAFFIC.total
    for i in range(runs):

        def step(key, state, batch, i=i):
            return noisy().step(jax.random.fold_in(key, i), state, batch)

        one = dbo.Algorithm(noisy().init, step)
        state = jax.tree.map(lambda a, i=i: a[i], starts)
        state, single = dbo.run(one, key, state, rows[i], 9, every=3)
        expected = jax.tree.map(lambda a, i=i: a[i], many)
        chex.assert_trees_all_close(bits(state), bits(expected), rtol=1e-12)
        np.testing.assert_allclose(history["upper"][:, i], single["upper"], rtol=1e-12)


def test_vmapped_runs_have_their_own_noise_and_may_share_a_batch(key, x, batch):
    method = dbo.vmapped(noisy(), 2, batch_axis=None)
    state = method.init(jnp.stack([x, x]), jnp.stack([x, x]))
    state, _ = dbo.run(
        method, key, state, batch, 2, evaluate=lambda s: {"x": s.x[:, 0, 0]}
    )
    assert not jnp.any(state.x[0] == state.x[1])


def test_divergence_among_runs_names_the_run(key, x, batch):
    inner = exploding(4, "y")

    def build(broken):
        def step(key, state, batch):
            state, metrics = inner.step(key, state, batch)
            y = jnp.where(broken, metrics.consensus.y, 0.0)
            consensus = Consensus(metrics.consensus.x, y, metrics.consensus.z)
            return (state[0], state[0], *state[2:]), metrics._replace(
                consensus=consensus
            )

        return dbo.Algorithm(inner.init, step)

    method = dbo.sweep(build, jnp.array([False, True]), batch_axis=None)
    state = method.init(jnp.stack([x, x]), jnp.stack([x, x]))
    with pytest.raises(dbo.DivergedError) as caught:
        dbo.run(method, key, state, batch, 9)
    assert (caught.value.quantity, caught.value.step) == ("consensus.y[1]", 4)


def test_sweep_runs_each_setting(key, x, batch):
    rates = jnp.array([0.0, 0.3])
    method = dbo.sweep(noisy, rates, batch_axis=None)
    state = method.init(jnp.stack([x, x]), jnp.stack([x, x]))
    many, _ = dbo.run(method, key, state, batch, 3)
    for i, rate in enumerate(rates):

        def step(key, state, batch, i=i, rate=rate):
            return noisy(rate).step(jax.random.fold_in(key, i), state, batch)

        one, _ = dbo.run(dbo.Algorithm(start, step), key, start(x), batch, 3)
        np.testing.assert_allclose(many.x[i], one.x, rtol=1e-12)


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="needs runs >= 1, got runs=0"):
        dbo.vmapped(noisy(), 0)


def test_a_placed_state_stays_where_it_is(key, batch):
    mesh = jax.make_mesh((4,), ("nodes",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("nodes"))
    x = jnp.arange(12.0).reshape(4, 3)
    state = start(x)._replace(x=jax.device_put(x, rows), y=jax.device_put(x - 1, rows))
    found, _ = dbo.run(noisy(), key, state, jax.device_put(batch, rows), 6, every=3)
    expected, _ = dbo.run(noisy(), key, start(x), batch, 6, every=3)
    assert found.x.sharding.is_equivalent_to(rows, 2)
    chex.assert_trees_all_close(bits(found), bits(expected), rtol=1e-12)


def test_progress_shows_the_loss_and_what_was_sent(key, x, batch, capsys):
    dbo.run(noisy(), key, start(x), batch, 4, every=2, progress=True)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "loss=" in shown
    assert f"MB={4 * TRAFFIC.total / 1e6:.4g}" in shown


def asking(monkeypatch, others):
    """Let `run` believe in a second process, which tells it ``others(words)``."""
    asked = []

    def gather(words):
        asked.append(words)
        return np.stack([peers.padded(row) for row in (words, others(words))])

    two = peers.Peers(size=2, gather=gather)
    monkeypatch.setattr("dbojax.runner.loop.peers_of", lambda state: two)
    monkeypatch.setattr("dbojax.runner.program.wait", jax.block_until_ready)
    monkeypatch.setattr("dbojax.runner.loop._UNDISTURBED", 1000)
    return asked


@pytest.mark.parametrize("mine", [False, True])
def test_processes_agree_on_chunks_where_one_shows_progress(
    key, x, batch, monkeypatch, mine
):
    def others(words):
        return ~words if words.dtype == bool else words

    asking(monkeypatch, others)
    _, history = dbo.run(noisy(), key, start(x), batch, 4, every=2, progress=mine)
    assert len(np.unique(np.diff(history["seconds"], prepend=0.0).round(12))) == 2


@pytest.mark.parametrize(
    "change",
    [
        dict(evaluate=lambda state: {}),
        dict(checkpoint="run.npz"),
        dict(stop_on_nonfinite=False),
        dict(batches=dbo.from_host(lambda step: np.ones((4, 3)))),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_program_is_compared_among_processes(
    key, x, batch, monkeypatch, change
):
    def told(**settings):
        asked = asking(monkeypatch, lambda words: np.ones_like(words))
        settings = {"batches": batch, **settings}
        with pytest.raises(ValueError, match="All processes of a run need the same"):
            dbo.run(noisy(), key, start(x), num_steps=4, **settings)
        return asked[0].tolist()

    assert told() != told(**change)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [(None, "There is no checkpoint of it"), ("run.npz", "not been looked for yet")],
)
def test_a_loss_before_the_first_step_claims_nothing(
    key, x, batch, monkeypatch, path, sentence
):
    def lost(words):
        raise ValueError("Gloo AllGather failed: Connection closed by peer")

    asking(monkeypatch, lost)
    with pytest.raises(dbo.runner.PeerLostError, match=sentence):
        dbo.run(noisy(), key, start(x), batch, 4, checkpoint=path)


def test_names_of_scores_are_strings(key, x, batch):
    with pytest.raises(TypeError, match=r"scores by strings, got 3\. Write .*score_3"):
        dbo.run(noisy(), key, start(x), batch, 2, evaluate=lambda state: {3: 1.0})


def test_progress_without_tqdm_says_what_to_install(key, x, batch, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install dbojax\[run\]"):
        dbo.run(noisy(), key, start(x), batch, 4, progress=True)


def test_extras_are_not_imported_with_the_package():
    code = (
        "import sys, dbojax\n"
        "extras = {'tqdm', 'matplotlib', 'flax', 'sklearn', 'networkx'}\n"
        "sys.exit(str(extras & set(sys.modules)) if extras & set(sys.modules) else 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
