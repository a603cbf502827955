import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

import dbojax as dbo


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def history(factor=1.0, rows=4, runs=None):
    upper = factor * 2.0 ** -np.arange(rows)
    if runs:
        upper = upper[:, None] * np.arange(1.0, runs + 1)
    score = np.full(rows, np.nan)
    score[1::2] = np.arange(rows // 2)
    return dbo.History(
        {
            "step": np.arange(1, rows + 1),
            "total_bytes": np.arange(1, rows + 1) * 3_000_000,
            "upper": upper,
            "score": score,
        }
    )


def test_one_history_is_one_line_without_a_legend():
    ax = dbo.plots.curves(history())
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [3, 6, 9, 12]
    assert line.get_ydata().tolist() == [1, 0.5, 0.25, 0.125]
    assert ax.get_xlabel() == "sent over all links (MB)"
    assert ax.get_ylabel() == "upper loss"
    assert ax.get_yscale() == "log"
    assert ax.get_legend() is None
    assert not ax.collections


def test_labels_go_into_the_legend_with_colours_of_their_own():
    many = {f"method {i}": history(i + 1) for i in range(10)}
    ax = dbo.plots.curves(many, x="step", logy=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(many)
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(looks) == 10
    assert ax.get_yscale() == "linear"


def test_an_axis_of_runs_is_a_median_and_a_band():
    ax = dbo.plots.curves({"seeds": history(runs=3)})
    assert ax.lines[0].get_ydata().tolist() == [2, 1, 0.5, 0.25]
    (band,) = ax.collections
    ups = band.get_paths()[0].vertices[:, 1]
    assert (ups.min(), ups.max()) == (0.125, 3)


def test_a_list_of_histories_is_the_same_as_an_axis_of_runs():
    one = dbo.plots.curves({"seeds": [history(f) for f in (1, 2, 3)]})
    other = dbo.plots.curves({"seeds": history(runs=3)})
    for a, b in zip(one.lines, other.lines, strict=True):
        np.testing.assert_array_equal(a.get_xydata(), b.get_xydata())
    np.testing.assert_array_equal(
        one.collections[0].get_paths()[0].vertices,
        other.collections[0].get_paths()[0].vertices,
    )


def test_rows_without_a_value_are_skipped():
    ax = dbo.plots.curves(history(), x="step", y="score", logy=False)
    assert ax.lines[0].get_xydata().tolist() == [[2, 0], [4, 1]]


def test_a_diverged_run_leaves_the_band():
    broken = history(runs=3)
    broken["upper"][2:, 2] = np.nan
    ax = dbo.plots.curves(broken)
    assert ax.lines[0].get_ydata().tolist() == [2, 1, 0.375, 0.1875]


def test_it_draws_on_given_axes_and_leaves_global_style_alone():
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2)
    before = dict(matplotlib.rcParams)
    assert dbo.plots.curves(history(), ax=right) is right
    assert not left.lines
    assert dict(matplotlib.rcParams) == before


REFUSED = {
    "column": (history(), {"y": "loss"}, "no column 'loss'; it has.*'score'"),
    "empty": ({}, {}, "needs a history"),
    "lengths": (
        {"a": [history(), history(rows=5)]},
        {},
        r"as many rows each; those of 'a' have \[4, 5\]",
    ),
    "blank": (history(rows=1), {"y": "score"}, "'score'.*holds no number"),
}


@pytest.mark.parametrize(("what", "how", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_drawn_is_refused(what, how, message):
    with pytest.raises(ValueError, match=message):
        dbo.plots.curves(what, **how)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install dbojax\[plots\]"):
        dbo.plots.curves(history())


def test_a_file_is_written_without_a_display(tmp_path):
    code = (
        "import sys, numpy as np, dbojax as dbo\n"
        "h = {'total_bytes': np.arange(1, 4), 'upper': np.ones(3)}\n"
        "dbo.plots.curves({'a': h}).figure.savefig(sys.argv[1])"
    )
    unset = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    path = tmp_path / "curves.png"
    subprocess.run([sys.executable, "-c", code, path], check=True, env=env)
    assert path.read_bytes().startswith(b"\x89PNG")
