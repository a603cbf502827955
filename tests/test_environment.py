"""The first start: what it installs, when it does not, and what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """The module with a root of its own, and pip and restarts recorded."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import environment

    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "STAMP", tmp_path / ".venv/dbojax.json")
    monkeypatch.delenv(environment.RESTARTED, raising=False)
    monkeypatch.setattr(environment, "calls", [], raising=False)

    def call(command, **_):
        environment.calls.append(command)
        return 0

    def make_venv():
        python = environment._venv_python()
        python.parent.mkdir(parents=True)
        python.touch()

    monkeypatch.setattr(environment.subprocess, "call", call)
    monkeypatch.setattr(environment, "_make_venv", make_venv)
    return environment


def test_an_environment_that_has_everything_is_left_alone(environment, monkeypatch):
    monkeypatch.setattr(environment, "_is_this_checkout", lambda: True)
    monkeypatch.setattr(environment, "_missing", lambda project, extras: [])
    assert environment.interpreter(["test"]) is None
    assert environment.ensure(["test"]) is None
    assert environment.calls == []


def test_the_second_start_installs_nothing(environment):
    first = environment.interpreter(["tasks"])
    assert first == environment._venv_python()
    assert len(environment.calls) == 1
    assert environment.interpreter(["tasks"]) == first
    assert len(environment.calls) == 1


def test_another_extra_is_added_to_those_that_are_there(environment):
    environment.interpreter(["tasks"])
    environment.interpreter(["plots"])
    assert environment.calls[-1][-1].endswith("[plots,tasks]")
    environment.interpreter(["tasks"])
    assert len(environment.calls) == 2


def test_a_changed_pyproject_installs_again(environment):
    environment.interpreter(["tasks"])
    with (environment.ROOT / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    environment.interpreter(["tasks"])
    assert len(environment.calls) == 2


def test_an_interrupted_installation_is_taken_up_again(environment, monkeypatch):
    monkeypatch.setattr(environment.subprocess, "call", lambda *_, **__: 1)
    with pytest.raises(SystemExit, match="If there is no network"):
        environment.interpreter(["tasks"])
    assert not environment.STAMP.exists()


def test_a_damaged_stamp_counts_as_none(environment):
    environment.interpreter(["tasks"])
    environment.STAMP.write_text("{")
    environment.interpreter(["tasks"])
    assert len(environment.calls) == 2
    assert json.loads(environment.STAMP.read_text())["extras"] == ["tasks"]


def test_the_script_starts_again_with_its_arguments_and_only_once(
    environment, monkeypatch
):
    started = []
    monkeypatch.setattr(environment, "_replace_process", started.append)
    monkeypatch.setattr(environment.sys, "orig_argv", ["python3", "demo.py", "--fast"])
    environment.ensure(["tasks"])
    assert started == [[str(environment._venv_python()), "demo.py", "--fast"]]
    with pytest.raises(SystemExit, match="still cannot be used"):
        environment.ensure(["tasks"])


def test_an_old_python_is_told_what_is_needed(environment, monkeypatch):
    monkeypatch.setattr(environment, "OLDEST", (99, 0))
    with pytest.raises(SystemExit, match=r"needs Python 99\.0 or later"):
        environment.interpreter(["tasks"])


def test_an_unknown_extra_is_named(environment):
    with pytest.raises(SystemExit, match="no extra 'task'"):
        environment.interpreter(["task"])


def test_extras_bring_the_extras_they_name(environment):
    project = environment._read_project()
    dev = environment._closure(project, ["dev"])
    assert dev >= {"dev", "test", "notebooks", "tasks", "run", "plots", "graphs"}
    assert environment._closure(project, ["tasks"]) == {"tasks"}


@pytest.mark.parametrize(
    ("line", "met"),
    [
        ("pytest>=1.0", True),
        ("pytest", True),
        ("pytest>=9999", False),
        ("pytest==0.1", False),
        ("numpy[some]>=1.2.3", True),
        ("no-such-distribution>=1", False),
    ],
)
def test_requirements_are_compared_by_version(environment, line, met):
    assert environment._is_met(line) == met


def test_it_runs_before_anything_is_installed():
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import environment;"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert not {"numpy", "jax", "pip"} & set(found.stdout.split())
