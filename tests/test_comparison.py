"""The comparison: its one program against single runs, its rules by hand."""

import csv
import functools
import re
import sys

import jax
import numpy as np
import pytest

import dbojax as dbo
from dbojax import cli, comparison
from dbojax.comparison import Cell, Entry, Grid, Plan, Study, tables
from dbojax.comparison.tuning import laid_out
from dbojax.tasks import data

GRAPHS = {
    "ring": dbo.topology.metropolis(dbo.topology.ring(4)),
    "star": dbo.topology.metropolis(dbo.topology.star(4)),
}
STEPS = (0.3, 0.2)


def deal(seed, h):
    """Blobs in shares of unequal size, unlike for every seed: cases must be padded."""
    rng = np.random.default_rng(3)
    labels = np.arange(90) % 3
    inputs = rng.normal(size=(90, 4)) + labels[:, None]
    dataset = data.Dataset(inputs, labels, 3, "blobs")
    how = functools.partial(data.split_dirichlet, alpha=1.0 - h)
    shards = data.distribute(dataset, n=4, deal=how, seed=seed)
    return dbo.tasks.coefficient_tuning(shards)


def d_soba(mix, problem, steps):
    channel = dbo.channels.exact(mix)
    return dbo.algorithms.d_soba(
        problem, channel=channel, upper_step=steps[0], lower_step=steps[1]
    )


def c2dfb(mix, problem, steps):
    top = dbo.compressors.top_k(0.4)
    return dbo.algorithms.c2dfb(
        problem,
        outer=dbo.channels.exact(mix, gamma=0.6),
        inner=dbo.channels.reference_point(mix, top, 0.3),
        inner_steps=2,
        upper_step=steps[0],
        lower_step=steps[1],
    )


ROSTER = {
    "d-soba": Entry("D-SOBA", "dense", d_soba, STEPS, pace=3),
    "c2dfb": Entry("C²DFB", "top 40 %", c2dfb, STEPS, dense=False),
}
PLAN = Plan(
    GRAPHS,
    hs=(0.2, 0.8),
    seeds=(0, 1),
    tuning_seeds=(7, 8),
    steps=4,
    every=2,
    grid=Grid((1.0,), (1.0, 0.5), rounds=1),
)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def outcomes():
    return dict(comparison.outcomes(Study("blobs", deal), ROSTER, PLAN, KEY))


def alone(entry, cell, seed):
    """The same run by itself, with the mixer that suits its graph."""
    task = deal(seed, cell.h)
    method = entry.make(
        dbo.mixing.mixer(GRAPHS[cell.graph]), task.problem, cell.settings
    )

    @jax.jit
    def start():
        return method.init(*dbo.replicate((task.x0, task.y0), task.n))

    _, history = dbo.run(
        method,
        jax.random.fold_in(KEY, seed),
        start(),
        task.batch,
        PLAN.steps * entry.pace,
        evaluate=task.evaluate,
        every=PLAN.every * entry.pace,
    )
    return history.evaluated()


@pytest.mark.parametrize("name", ROSTER)
def test_one_program_equals_single_runs_with_their_own_mixers(outcomes, name):
    cells = {cell.place: cell for cell in outcomes[name].cells}
    assert len(cells) == 4
    # Not seed 0 at h = 0.8: a node there lacks two of the three classes, its gradients
    # are the same for both, and rounding decides which of two equals top-k keeps.
    for graph, seed, h in (("ring", 1, 0.8), ("star", 0, 0.2)):
        cell = cells["blobs", graph, h]
        single = alone(ROSTER[name], cell, seed)
        for column in (
            *("step", "message_bytes", "total_bytes", "rounds"),
            *("gradients", "products"),
        ):
            np.testing.assert_array_equal(cell.history[column], single[column], column)
        for column in (
            *("upper", "hypergrad_norm", "consensus_x", "consensus_y"),
            *("validation_loss", "test_loss", "test_accuracy"),
        ):
            ours = cell.history[column][:, cell.seeds.index(seed)]
            np.testing.assert_allclose(ours, single[column], 1e-10, 1e-13, column)


def test_seeds_graphs_and_heterogeneity_make_a_difference(outcomes):
    cells = outcomes["c2dfb"].cells
    ends = np.stack([cell.history["validation_loss"][-1] for cell in cells])
    assert len(np.unique(ends)) == ends.size == 8


def test_everybody_gets_the_same_number_of_tuning_runs(outcomes):
    for outcome in outcomes.values():
        assert [len(tuned.tried) for tuned in outcome.tuned] == [PLAN.grid.runs] * 2
        for tuned, h in zip(outcome.tuned, PLAN.hs, strict=True):
            assert tuned.loss == tuned.losses.min()
            assert tuned.settings in {tuple(pair) for pair in tuned.tried.tolist()}
            own = [cell for cell in outcome.cells if cell.h == h]
            assert {cell.settings for cell in own} == {tuned.settings}


def test_a_file_reads_back_to_the_same_bits(outcomes, tmp_path):
    cells = [cell for outcome in outcomes.values() for cell in outcome.cells]
    comparison.to_csv(cells, tmp_path / "cells.csv")
    again = comparison.read_csv(tmp_path / "cells.csv")
    assert len(again) == len(cells) == 8
    for one, other in zip(cells, again, strict=True):
        assert one[:-1] == other[:-1]
        assert list(one.history) == list(other.history)
        for name, column in one.history.items():
            np.testing.assert_array_equal(column, other.history[name])
            assert column.dtype == other.history[name].dtype
    with (tmp_path / "cells.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # methods, graphs, h, seeds, evaluations


def test_another_table_is_not_read(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of a comparison"):
        comparison.read_csv(tmp_path / "other.csv")


def cell(label, scores, dense=True, losses=1.0, graph="ring", **more):
    """A cell of two seeds with 1e6 bytes per evaluation."""
    scores = np.asarray(scores, float)
    rows = np.arange(1, len(scores) + 1)
    counts = ("step", "message_bytes", "total_bytes", "gradients", "products")
    history = dbo.History(
        {
            **{name: rows * 1_000_000 for name in counts},
            "seconds": rows * 0.5,
            "test_accuracy": scores,
            "validation_loss": np.broadcast_to(losses, scores.shape),
            "consensus_x": np.zeros_like(scores),
            "consensus_y": np.zeros_like(scores),
        }
    )
    facts = ("task", label, "dense" if dense else "few", dense, graph, 0.0, (0, 1))
    edge = more.get("edge", (False, False))
    return Cell(*facts, settings=(1.0, 0.1), edge=edge, history=history)


BEST = cell("best", [[0.4, 0.6], [0.8, 0.8], [0.9, 0.7]])
LESS = cell("less", [[0.1, 0.1], [0.2, 0.9], [0.6, 0.6]])
SPARSE = cell("sparse", [[0.7, 0.9], [0.9, 0.9], [1.0, 1.0]], dense=False)


def test_the_target_is_a_share_of_the_best_dense_mean_at_the_end():
    found = comparison.targets([LESS, BEST, SPARSE])
    assert found == {("task", "ring", 0.0): pytest.approx(0.98 * 0.8)}


def test_a_dense_method_that_lost_a_seed_sets_no_target():
    losses = np.ones((3, 2))
    losses[2, 0] = np.nan
    lost = cell("lost", [[0.9, 0.9]] * 3, losses=losses)
    place = ("task", "ring", 0.0)
    assert comparison.targets([lost, BEST])[place] == pytest.approx(0.98 * 0.8)
    assert np.isnan(comparison.targets([lost])[place])
    assert comparison.reached(lost, np.nan) == (None, 0)


def test_reached_is_of_the_mean_and_counts_the_seeds():
    assert comparison.reached(BEST, 0.784) == (1, 2)
    assert comparison.reached(LESS, 0.784) == (None, 1)
    assert comparison.reached(SPARSE, 0.784) == (0, 2)


def test_a_diverged_seed_takes_the_mean_with_it_and_is_named():
    losses = np.ones((3, 2))
    losses[1:, 1] = np.inf
    lost = cell("lost", [[0.5, 0.9], [0.9, 0.9], [0.9, 0.9]], losses=losses)
    assert comparison.reached(lost, 0.85) == (None, 2)
    [row] = tables.table([lost])
    assert row["final accuracy"] == "0.9000 ± 0.0000 (1 of 2 diverged)"


def test_tables_show_costs_flags_and_who_never_came():
    edged = SPARSE._replace(edge=(True, False))
    rows = {row["method"]: row for row in tables.table([BEST, LESS, edged])}
    assert rows["best, dense"]["MB/link"] == "2"
    assert rows["best, dense"]["seconds"] == "1"
    assert rows["sparse, few"]["steps up / low"] == "1* / 0.1"
    assert rows["less, dense"]["MB/link"] == "not reached"
    assert rows["less, dense"]["seeds"] == "1 of 2"
    other = cell("best", BEST.history["test_accuracy"], graph="star")
    assert tables.summary([BEST, LESS, other]) == [
        {"method": "best, dense", "ring, h = 0": "2", "star, h = 0": "2"},
        {"method": "less, dense", "ring, h = 0": "-", "star, h = 0": ""},
    ]
    with pytest.raises(ValueError, match="A table is of one"):
        tables.table([BEST, other])


def test_histories_by_label_can_be_drawn():
    import matplotlib.pyplot as plt

    histories = comparison.select([BEST, SPARSE], graph="ring")
    axes = dbo.plots.panels(histories, target=0.784, limits=(0, 1))
    assert [ax.get_xlabel() for ax in axes] == [
        "sent over one link (MB)",
        "time (s)",
        "step",
    ]
    assert axes[0].lines[0].get_xdata().tolist() == [1, 2, 3]
    assert axes[0].get_legend() is not None
    assert all(ax.get_legend() is None for ax in axes[1:])
    plt.close(axes[0].figure)
    with pytest.raises(ValueError, match="needs a column"):
        dbo.plots.panels(histories, xs=())
    with pytest.raises(ValueError, match="one task, graph and h"):
        comparison.select([BEST, cell("best", [[0, 0]], graph="star")])


def test_tuning_takes_the_smallest_mean_and_leaves_out_what_diverges():
    shapes = []

    def losses(pairs):
        shapes.append(pairs.shape)
        upper = pairs[..., 0]
        first = np.where(upper > 3, -np.inf, 1 / upper)  # the best, were it a number
        second = np.where(upper > 2, np.nan, np.abs(upper - 1.5))
        return np.stack([first, second], axis=1)

    grid = Grid(upper=(0.5, 1.0, 2.0, 4.0), lower=(1.0,), rounds=2)
    found = comparison.tune(losses, grid, (1.0, 0.1), groups=3)
    assert shapes == [(3, 4, 2)] * grid.rounds
    assert [len(one.tried) for one in found] == [grid.runs] * 3
    # First 2, of means 1.5, 0.75 and 0.5; then 2 / sqrt(2), of mean 0.396.
    assert found[0].settings == pytest.approx((2**0.5, 0.1))
    assert np.isinf(found[0].losses[found[0].tried[:, 0] > 2]).all()
    assert found[0].edge == (False, True)


def test_of_pairs_as_good_the_smallest_is_the_next_centre_and_the_least_is_chosen():
    seen = []

    def losses(pairs):
        seen.append(pairs[0])
        table = {1.0: 1.1, 2.0: 1.04, 4.0: 1.0, 8.0: 1.02}
        return np.vectorize(lambda u: table.get(u, 2.0))(pairs[..., 0])[:, None]

    grid = Grid(upper=(8.0, 4.0, 2.0, 1.0), lower=(2.0, 1.0))
    for slack, centre in ((0.05, 2.0), (0.0, 4.0), (0.2, 1.0)):
        [found] = comparison.tune(losses, grid._replace(slack=slack), (1.0, 0.3), 1)
        assert found.settings == (4.0, 0.3)
        assert seen[-1].min(0).tolist() == [centre, 0.3]


def test_tuning_apart_for_each_group():
    def losses(pairs):
        goals = np.array([1.0, 100.0])[:, None]
        return np.abs(np.log(pairs[..., 0] / goals))[:, None]

    grid = Grid(upper=(0.1, 1.0, 10.0), lower=(0.5, 1.0, 2.0), rounds=2)
    low, high = comparison.tune(losses, grid, (10.0, 1.0), groups=2)
    assert (low.settings[0], high.settings[0]) == pytest.approx((1.0, 100.0))
    assert low.edge[0] is high.edge[0] is False


def test_a_grid_where_all_diverge_is_told_by_its_loss():
    [found] = comparison.tune(lambda p: np.full((1, 1, 9), np.nan), Grid(), (1, 1), 1)
    assert found.loss == np.inf
    assert found.tried.min() > 0


BROKEN = {
    "seeds that tune": (PLAN._replace(tuning_seeds=(1,)), r"Seeds \[1\] would both"),
    "no graph": (PLAN._replace(graphs={}), "needs a graph"),
    "no mixing matrix": (PLAN._replace(graphs={"a": np.ones((4, 4))}), "stochastic"),
    "uneven evaluations": (PLAN._replace(every=3), "positive multiple of `every`"),
    "no factor": (PLAN._replace(grid=Grid(upper=())), "positive factors"),
}


@pytest.mark.parametrize(("plan", "message"), BROKEN.values(), ids=BROKEN)
def test_an_impossible_plan_is_refused_before_any_run(plan, message):
    with pytest.raises(ValueError, match=message):
        next(comparison.outcomes(Study("blobs", deal), ROSTER, plan, KEY))


def test_a_method_that_does_not_work_over_a_graph_says_so():
    directed = {"one way": dbo.topology.uniform(dbo.topology.exponential(4))}
    roster = {"e": comparison.roster()["sparkle-extra"]}
    plan = PLAN._replace(graphs=directed)
    with pytest.raises(ValueError, match="symmetric"):
        next(comparison.outcomes(Study("blobs", deal), roster, plan, KEY))


def test_what_cannot_be_stacked_is_refused():
    task = deal(0, 0.2)
    with pytest.raises(ValueError, match="judge="):
        comparison.stacked([dbo.tasks.quadratic()])
    with pytest.raises(ValueError, match="got none"):
        comparison.stacked([])
    with pytest.raises(ValueError, match="variables of one shape"):
        comparison.stacked([task, task._replace(x0=np.zeros(5))])
    with pytest.raises(ValueError, match="positive centre"):
        laid_out(Grid(), (0.0, 1.0), 0)


def test_all_entries_have_names_of_their_own():
    entries = comparison.roster()
    assert len({entry.label for entry in entries.values()}) == len(entries)
    assert {entry.pace for entry in entries.values()} == {1, 4, 10}


def test_the_command_writes_tables_files_and_pictures(tmp_path, capsys, monkeypatch):
    known = {"blobs": Study("blobs", deal)}
    monkeypatch.setattr(comparison, "studies", lambda fashion=None: known)
    monkeypatch.setattr(comparison, "roster", lambda scales=None: ROSTER)
    monkeypatch.setattr(cli, "NODES", 4)
    options = "--methods d-soba --graphs star --h 0.5 --seeds 1 --tuning-seeds 1"
    more = f"--steps 2 --rounds 1 --out {tmp_path}"
    assert cli.main(["compare", *options.split(), *more.split()]) == 0
    found = {path.name for path in tmp_path.iterdir()}
    files = {"cells.csv", "tuning.csv", "clock.csv", "compare.md", "plan.json"}
    assert found == files | {"blobs_star_h0.5.png"}
    text = (tmp_path / "compare.md").read_text("utf-8")
    assert "### star, h = 0.5: target" in text
    assert "D-SOBA, dense" in text
    assert text.strip() in capsys.readouterr().out
    [only] = comparison.read_csv(tmp_path / "cells.csv")
    assert only.place == ("blobs", "star", 0.5)
    with (tmp_path / "tuning.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert sum(int(row["chosen"]) for row in rows) == 1

    # What is done is not done again, and another plan is not mixed in.
    monkeypatch.setattr(comparison.drive, "seconds_per_step", None)
    again = ["compare", *options.split(), *more.split(), "--resume"]
    assert cli.main(again) == 0
    assert (tmp_path / "compare.md").read_text("utf-8") == text
    for other in (
        "--seeds 2",
        "--rounds 2",
        "--key 7",
        "--h 0.2",
        "--graphs star ring",
    ):
        assert cli.main([*again, *other.split()]) == 2
        assert "another plan" in capsys.readouterr().err
    assert comparison.read_csv(tmp_path / "cells.csv")[0].place == only.place


UNKNOWN = {
    "method": (["--methods", "sgd"], "No method is named 'sgd'; .*c2dfb, c2dfb-top20"),
    "graph": (["--graphs", "cube"], "No graph is named 'cube'; .*ring, two_hop"),
    "task": (["--task", "chess"], "No task is named 'chess'; .*coefficient_tuning"),
    "twice": (["--graphs", "ring", "ring"], "each graph once"),
    "h twice": (["--h", "0.5", "0.50"], "each h once"),
    "seeds": (["--seeds", "0"], "--seeds must be at least 1"),
    "every": (["--steps", "3"], "multiple of --every"),
}


@pytest.mark.parametrize(("options", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_the_command_says_what_it_knows(options, message, capsys, tmp_path):
    assert cli.main(["compare", *options, "--out", str(tmp_path / "none")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "none").exists()


def test_without_a_command_it_shows_how_to_use_it(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "compare" in capsys.readouterr().err


def test_fashion_mnist_is_one_study_more_where_its_folder_is(tmp_path, capsys):
    options = ["compare", "--fashion", str(tmp_path / "none"), "--no-plots"]
    assert cli.main(options) == 2
    assert "no folder" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    for part, count in {"train": 80, "t10k": 30}.items():
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(256, size=(count, 3, 2), dtype=np.uint8)
        for name, array in {"labels-idx1": labels, "images-idx3": images}.items():
            head = bytes([0, 0, 8, array.ndim])
            lengths = b"".join(size.to_bytes(4, "big") for size in array.shape)
            path = tmp_path / f"{part}-{name}-ubyte"
            path.write_bytes(head + lengths + array.tobytes())
    known = comparison.studies(tmp_path)
    assert [*known] == [*comparison.studies(), "fashion_representation"]
    task = known["fashion_representation"].deal(0, 0.8)
    assert task.n == 10
    assert task.held.inputs.shape == (30, 6)
    judged = jax.jit(task.judge)(task.x0, task.y0, task.batch, task.held)
    assert float(judged["test_loss"]) > 0


@pytest.mark.parametrize("name", comparison.roster())
def test_every_entry_takes_a_step_of_the_study(name):
    """Shapes alone: 18 compositions, none of which may be out of date."""
    task, entry = deal(0, 0.2), comparison.roster()[name]
    method = entry.make(dbo.mixing.mixer(GRAPHS["ring"]), task.problem, (0.1, 0.1))
    start = dbo.replicate((task.x0, task.y0), task.n)
    state = jax.eval_shape(lambda: method.init(*start))
    after, metrics = jax.eval_shape(method.step, jax.random.key(0), state, task.batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics.traffic.message > 0
    assert metrics.calls.gradients > 0


def test_a_chosen_pair_that_came_twice_is_marked_once():
    def losses(pairs):
        return np.abs(np.log(pairs)).sum(-1)[:, None]

    [found] = comparison.tune(losses, Grid(rounds=3), (1.0, 1.0), 1)
    assert sum(int(row["chosen"]) for row in tables.tried(found)) == 1
    assert (found.tried == np.array(found.settings)).all(1).sum() == 3


def test_what_can_be_known_before_is_refused_before():
    roster = {"a": ROSTER["d-soba"]}
    for plan, message in (
        (Plan(GRAPHS, hs=(0.5, 0.5)), "value of `hs` may come once"),
        (Plan(GRAPHS, seeds=(0, 0)), "value of `seeds` may come once"),
        (Plan(GRAPHS, steps=3), "multiple of `every`"),
        (Plan(GRAPHS, every=0), "multiple of `every`"),
        (Plan({**GRAPHS, "two": np.full((2, 2), 0.5)}), r"same nodes, got \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            next(comparison.outcomes(Study("b", deal), roster, plan, jax.random.key(0)))
    twins = roster | {"b": roster["a"]}
    one = Plan({"ring": GRAPHS["ring"]}, hs=(0.2,), seeds=(0,), tuning_seeds=(1,))
    with pytest.raises(ValueError, match="label may come once"):
        next(comparison.outcomes(Study("b", deal), twins, one, jax.random.key(0)))

    def silent(seed, h):
        return deal(seed, h)._replace(judge=lambda x, y, batch, held: {"loss": 0.0})

    with pytest.raises(ValueError, match=r"must give .*'test_accuracy'"):
        next(comparison.outcomes(Study("b", silent), roster, one, jax.random.key(0)))


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "cells.csv"
    scores = {name: np.full((2, 1), 0.5) for name in ("validation_loss", "a")}
    history = dbo.History({"step": np.array([1, 2]), **scores})
    cell = Cell("t", "m", "dense", True, "ring", 0.0, (0,), (1.0, 1.0), (0, 0), history)
    comparison.to_csv([cell], path)
    assert comparison.read_csv(path)[0].history["a"].tolist() == [[0.5], [0.5]]
    path.write_text(path.read_text("utf-8")[:-9], "utf-8")
    with pytest.raises(ValueError, match="cut off"):
        comparison.read_csv(path)
    with pytest.raises(ValueError, match="got none"):
        comparison.to_csv([], path)


def test_names_are_listed_without_the_extras(monkeypatch, capsys):
    for name in ("flax", "sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert dbo.__version__ in capsys.readouterr().out
    assert len(comparison.studies()) == 3
