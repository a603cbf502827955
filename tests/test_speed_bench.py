"""The bookkeeping of `benchmarks/speed`: floors, fits, baselines; nothing is timed."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks/speed"


@pytest.fixture
def speed(monkeypatch):
    """Imports a module of that folder; all are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("baseline", "floors", "records"):
        sys.modules.pop(name, None)


def line(
    case="a", ratio=(1.0, 1.1, 1.2), operations=100.0, size=10.0, jax="1", turns=9
):
    low, middle, high = ratio
    return {
        "group": "g",
        "case": case,
        "ratio": middle,
        "ratio low": low,
        "ratio high": high,
        "turns": turns,
        "operations": operations,
        "bytes": size,
        "jax": jax,
    }


def test_a_ratio_is_worse_only_beyond_noise(speed):
    compare = speed("baseline").compare
    before = [line()]
    assert compare([line(ratio=(1.43, 1.6, 1.8))], before) == []  # quartiles touch
    (said,) = compare([line(ratio=(1.45, 1.6, 1.8))], before)
    assert "g: a: ratio 1.6, was 1.1" in said
    assert compare([line(ratio=(0.2, 0.3, 0.4))], before) == []  # better is not worse
    few = line(ratio=(1.45, 1.6, 1.8), turns=4)  # their quartiles say nothing
    assert compare([few], before) == compare([line(ratio=(9, 9, 9))], [few]) == []


def test_counts_of_the_compiler_count_at_the_same_version_only(speed):
    compare = speed("baseline").compare
    assert compare([line(operations=119.0, size=12.0)], [line()]) == []
    said = compare([line(operations=121.0, size=13.0)], [line()])
    assert [text.split()[2] for text in said] == ["operations", "bytes"]
    assert compare([line(operations=121.0, jax="2")], [line()]) == []
    unknown = line(operations=float("nan"))
    assert compare([unknown], [line()]) == compare([line()], [unknown]) == []


def test_new_lines_and_exponents_are_not_compared(speed):
    compare = speed("baseline").compare
    slow = line(ratio=(9.0, 9.0, 9.0))
    assert compare([{**slow, "case": "new"}], [line()]) == []
    fits = [{**x, "group": "exponents"} for x in (slow, line())]
    assert compare(fits[:1], fits[1:]) == []


def test_a_baseline_keeps_the_groups_that_were_not_measured(speed, tmp_path):
    module, path = speed("baseline"), tmp_path / "new/device.csv"
    assert module.load(path) == []
    other = {**line(), "group": "h"}
    module.save(path, [line("a"), line("b"), other])
    module.save(path, [line("c", operations=float("nan"))])
    found = {(x["group"], x["case"]): x for x in module.load(path)}
    assert set(found) == {("h", "a"), ("g", "c")}
    assert found["h", "a"] == other
    assert np.isnan(found["g", "c"]["operations"])


def test_a_device_names_its_file(speed):
    class Device:
        platform, device_kind = "cpu", "cpu"

    name = speed("baseline").device_name
    assert name(Device, cpus=2) == "cpu-2-cores"
    Device.platform, Device.device_kind = "gpu", "NVIDIA H100 80GB"
    assert name(Device) == "gpu-nvidia-h100-80gb"


def test_exponents_of_powers_are_exact(speed):
    sizes = [10, 100, 1000]
    seconds = np.array([[n**1.5, 3 * n, 7.0] for n in sizes])
    np.testing.assert_allclose(
        speed("records").exponents(sizes, seconds), [1.5, 1, 0], atol=1e-12
    )


def test_long_steps_are_repeated_less_and_short_ones_more(speed):
    floors = speed("floors")
    repeats = [floors.repeats_for(s) for s in (2.0**-20, 1e-3, 0.03, 10.0)]
    assert repeats == [5242, floors.REPEATS, 3, 1]


def test_a_program_takes_the_steps_it_is_told_and_counts_one(speed):
    floors = speed("floors")
    v = jnp.arange(6.0).reshape(2, 3)
    steps = {
        "add": (lambda v, i: v + i, v),
        "beside": (floors.elsewhere(lambda v: v[::-1]), (v, jnp.zeros_like(v))),
    }
    add = floors.looped(*steps["add"])
    np.testing.assert_allclose(add.run(jnp.copy(v), jnp.int32(4)), v + 6)
    beside = floors.looped(*steps["beside"])
    kept, out = beside.run(jax.tree.map(jnp.copy, steps["beside"][1]), jnp.int32(3))
    np.testing.assert_allclose(kept, v)
    np.testing.assert_allclose(out, v[::-1])
    assert not np.isnan(add.operations)


def test_a_target_is_met_by_its_worst_figure(speed):
    target = speed("records").Target
    found = [(1.0, "a"), (3.0, "b")]
    assert target("at most", 3, found).met
    assert not target("at most", 2.9, found).met
    assert target("at most", 2.9, found).worst == (3.0, "b")
    assert target("at least", 1, found, at_least=True).met
    assert not target("at least", 2, found, at_least=True).met


def test_ratios_are_taken_within_a_turn(speed, monkeypatch):
    floors = speed("floors")
    found = {
        "floor": (None, np.array([1.0, 2.0])),
        "work": (None, np.array([3.0, 8.0])),
        "other floor": (None, np.array([2.0, 2.0])),
    }
    monkeypatch.setattr(floors, "measured", lambda *given: found)
    ratios = floors.against_floor({}, jnp.ones((2, 3)))["work"][1]
    np.testing.assert_allclose(ratios, [3, 4])
