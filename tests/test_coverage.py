import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo
from dbojax.submodels import (
    Drawn,
    Group,
    aligned,
    counts,
    coverage_aware,
    per_layer,
    smallest,
)
from dbojax.submodels.coverage import over_rounds
from dbojax.submodels.phases import meetings, search
from dbojax.submodels.rules import shifts

UNITS = {"a": 4, "b": 6, "c": 3}
LABELS = {
    "kernel": "_ _ a b",
    "bias": "b",
    "flat": "b c",
    "square": "c c",
    "cube": "a b c",
    "head": "c _",
    "whole": "_ _",
    "scale": "",
}
SHAPES = {
    "kernel": (2, 3, 4, 6),
    "bias": (6,),
    "flat": (18, 3),  # three blocks of b, units fastest
    "square": (3, 6),  # and a multiple on the second axis
    "cube": (4, 6, 3),
    "head": (3, 5),
    "whole": (2, 2),
    "scale": (),
}
LIKE = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()
}


class Meeting(NamedTuple):
    units: dict
    x: object
    y: object


def draws(seed):
    """Three levels: whole clients, ones that keep b whole, and small ones."""
    rng = np.random.default_rng(seed)

    def pick(group, clients, k):
        rows = [rng.permutation(UNITS[group])[:k] for _ in range(clients)]
        return jnp.array(rows, jnp.int32)

    return (
        Drawn(jnp.arange(1), {}),
        Drawn(jnp.arange(3), {"a": pick("a", 3, 2), "c": pick("c", 3, 2)}),
        Drawn(
            jnp.arange(2), {g: pick(g, 2, k) for g, k in [("a", 1), ("b", 2), ("c", 1)]}
        ),
    )


def by_loops(drawn):
    """Add one dense mask per client."""
    total = {name: np.zeros(shape, np.int32) for name, shape in SHAPES.items()}
    for level in drawn:
        for client in range(len(level.clients)):
            for name, shape in SHAPES.items():
                held = np.ones(shape, np.int32)
                for axis, group in enumerate(LABELS[name].split()):
                    if group in level.kept:
                        unit = np.arange(shape[axis]) % UNITS[group]
                        one = np.isin(unit, level.kept[group][client])
                        view = [1] * len(shape)
                        view[axis] = -1
                        held *= one.reshape(view)
                total[name] += held
    return total


@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_a_loop_over_dense_masks(seed):
    drawn = draws(seed)
    found = jax.jit(lambda drawn: counts(LABELS, UNITS, drawn, LIKE))(drawn)
    chex.assert_trees_all_equal(found, by_loops(drawn))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("int32")}
    least = min(leaf.min() for leaf in by_loops(drawn).values())
    assert smallest(found) == least
    assert smallest(found).dtype == jnp.int32


def test_no_mask_per_client_is_built():
    like = {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    kept = {"a": jnp.zeros((50, 8), jnp.int32)}

    def count(kept):
        drawn = [Drawn(jnp.arange(50), kept)]
        return counts({"kernel": "a b"}, {"a": 64, "b": 64}, drawn, like)

    jaxpr = jax.make_jaxpr(count)(kept).jaxpr
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) <= 64 * 64


def test_an_entry_of_the_smallest_coverage_is_found_in_any_leaf():
    assert smallest({"a": jnp.array([3, 2]), "b": jnp.array([[5], [1]])}) == 1
    assert smallest({"a": jnp.zeros((0,), jnp.int32), "b": jnp.array(4)}) == 4
    with pytest.raises(ValueError, match="without entries"):
        smallest({})


def chain(*sizes):
    """A network whose last hidden layer meets y, as a layout."""
    names = [f"h{i}" for i in range(len(sizes))]
    kernels = [f"{a} {b}" for a, b in itertools.pairwise(names)]
    x = {"kernels": kernels, "biases": names, "first": f"_ {names[0]}"}
    return Meeting(dict(zip(names, sizes, strict=True)), x, {"head": f"{names[-1]} _"})


def worst_pair(layout, phases, capacities, rounds):
    """Coverage of the least covered pair over the window, by counting."""
    clients = len(capacities)
    marks = {}
    for name, size in layout.units.items():
        phase = phases[name]
        first = phase.stride * np.arange(rounds)[:, None] + shifts(phase, size, clients)
        k = np.ceil(np.array(capacities) * size)
        apart = (np.arange(size) - first[..., None]) % size
        marks[name] = (apart < k[:, None]).reshape(-1, size).astype(float)
    return min((marks[a].T @ marks[b]).min() for a, b in meetings(layout))


SETTINGS = {
    "quarters": ((16, 16, 16), [0.25] * 6),
    "eighths": ((32, 32), [0.125] * 16),
    "few small ones": ((32, 32, 32), [0.0625] * 20),
    "unlike sizes": ((12, 24, 48), [0.5, 0.25, 0.25, 0.125]),
    "one full": ((16, 16), [1.0, 0.25, 0.25, 0.125, 0.0625]),
}


@pytest.mark.parametrize(("sizes", "capacities"), SETTINGS.values(), ids=SETTINGS)
def test_searched_phases_cover_pairs_best(sizes, capacities):
    layout = chain(*sizes)
    groups = [
        Group(name, index, size, size, len(capacities))
        for index, (name, size) in enumerate(layout.units.items())
    ]
    found = [
        worst_pair(layout, phases, capacities, max(sizes))
        for phases in (
            search(layout, capacities),
            {g.name: per_layer(g) for g in groups},
            {g.name: aligned(g) for g in groups},
        )
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] >= 1


def test_search_cures_what_strides_of_layers_leave():
    layout, capacities = chain(32, 32, 32), [0.0625] * 8
    groups = [Group(f"h{i}", i, 32, 32, 8) for i in range(3)]
    default = {g.name: per_layer(g) for g in groups}
    assert worst_pair(layout, default, capacities, 32) == 0
    assert worst_pair(layout, search(layout, capacities), capacities, 32) >= 1


def test_half_clients_cover_every_pair_in_every_round():
    layout = chain(4, 4)
    phases = search(layout, [0.5] * 4)
    for rounds in (1, 2, 5):
        # Once per round and pair at least: C* = 1 without a full client.
        assert worst_pair(layout, phases, [0.5] * 4, rounds) == rounds


def test_large_groups_are_searched_through_cells():
    layout, capacities = chain(256, 256), [0.25] * 5
    phases = search(layout, capacities)
    assert phases == search(layout, capacities)
    assert worst_pair(layout, phases, capacities, 256) > 0


def test_groups_that_meet_in_one_variable_or_across_the_two():
    layout = Meeting({"a": 2, "b": 2, "c": 2}, {"k": "_ a b", "n": "a"}, ["b c", "c _"])
    assert meetings(layout) == {("a", "b"), ("b", "c")}


def test_a_searched_rule_keeps_what_its_phases_say():
    layout, capacities = chain(16, 16), [0.25] * 4
    phases = search(layout, capacities, rounds=10)
    rule = coverage_aware(layout, capacities, rounds=10)
    group = Group("h1", 1, 16, 4, 4)
    start = (3 * phases["h1"].stride + shifts(phases["h1"], 16, 4)[2]) % 16
    wanted = (start + np.arange(4)) % 16
    chex.assert_trees_all_equal(np.asarray(rule.keep(3, 2, group)), wanted)


def test_what_cannot_be_searched_is_refused():
    layout = chain(4, 4)
    for rounds in (0, 2.5):
        with pytest.raises(ValueError, match="whole number of rounds"):
            coverage_aware(layout, [0.5], rounds)
    for capacities in ([], [0.0], [1.5], [[0.5]], [np.nan]):
        with pytest.raises(ValueError, match="one number in"):
            coverage_aware(layout, capacities)


def network(width):
    x = [jnp.zeros((3, width)), jnp.zeros((width, width))]
    y = jnp.zeros((width, 2))
    return x, y, dbo.submodels.layout(x, y, ["_ a", "a b"], "b _")


def test_coverage_over_rounds_equals_a_loop():
    x, y, layout = network(6)
    capacities = [1.0, 0.5, 0.5, 0.5]
    some = dbo.submodels.fleet(layout, capacities, participants={0.5: 2}, minimum=0)
    key = jax.random.key(3)
    found = jax.jit(lambda key: over_rounds(key, some, x, y, rounds=5))(key)
    labels, each, total = (layout.x, layout.y), [], 0
    draw = jax.jit(lambda q: dbo.submodels.draw(some, jax.random.fold_in(key, q), q))
    count = jax.jit(lambda drawn: counts(labels, layout.units, drawn, (x, y)))
    for q in range(5):
        held_x, held_y = count(draw(q))
        each.append((min(leaf.min() for leaf in held_x), held_y.min()))
        total += np.array([*map(np.ravel, (held_x[1], held_y))], object)
    assert list(zip(*map(np.asarray, found.rounds), strict=True)) == each
    # No first kernel is held less often than the second, which needs both units.
    assert [found.total.x, found.total.y] == [row.min() for row in total]


@pytest.mark.parametrize(
    ("rule", "covered"),
    {
        "aligned": (dbo.submodels.staggered(aligned), False),
        "static": (dbo.submodels.static(), False),
        "magnitude": (dbo.submodels.magnitude(), False),
        "per layer": (dbo.submodels.staggered(), True),
    }.values(),
)
def test_small_clients_alone_reach_every_weight_with_moving_phases_only(rule, covered):
    x, y, layout = network(8)
    quarters = dbo.submodels.fleet(layout, [0.25] * 4, rule, minimum=0)
    found = over_rounds(jax.random.key(0), quarters, x, y, rounds=8)
    assert found.rounds.x.max() == 0
    assert bool(found.total.x > 0) == covered


def test_over_rounds_refuses_what_is_no_window():
    x, y, layout = network(4)
    full = dbo.submodels.fleet(layout, [1.0])
    with pytest.raises(ValueError, match="whole number of rounds from 1 on, got 0"):
        over_rounds(jax.random.key(0), full, x, y, rounds=0)
    with pytest.raises(TypeError, match="`fleet` must be a Fleet"):
        over_rounds(jax.random.key(0), layout, x, y, rounds=1)
