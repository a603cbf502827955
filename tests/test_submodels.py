"""Cutting sub-models out and putting them back; layouts read off networks; fleets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo

S = dbo.submodels
UNITS = {"a": 3, "b": 4}
LABELS = {"matrix": "a b", "blocks": "b _", "vector": "a", "whole": "_", "scalar": ""}
KEPT = {"a": np.array([2, 0]), "b": np.array([3, 1])}


def variable(rng):
    shapes = {"matrix": (3, 4), "blocks": (8, 2), "vector": (3,), "whole": (5,)}
    return {name: rng.normal(size=shapes.get(name, ())) for name in LABELS}


def test_take_reads_the_units_that_are_kept():
    v = variable(np.random.default_rng(0))
    cut = S.take(LABELS, UNITS, v, KEPT)
    np.testing.assert_array_equal(cut["matrix"], v["matrix"][np.ix_([2, 0], [3, 1])])
    # Two blocks of four units each: the units come fastest.
    np.testing.assert_array_equal(cut["blocks"], v["blocks"][[3, 1, 7, 5]])
    np.testing.assert_array_equal(cut["vector"], v["vector"][[2, 0]])
    np.testing.assert_array_equal(cut["whole"], v["whole"])
    np.testing.assert_array_equal(cut["scalar"], v["scalar"])


def test_put_is_the_adjoint_and_the_inverse_of_take():
    rng = np.random.default_rng(1)
    v = variable(rng)

    @jax.jit
    def all_of_them(v, kept):
        cut = S.take(LABELS, UNITS, v, kept)
        return (
            cut,
            S.put(LABELS, UNITS, cut, kept),
            S.masked(LABELS, UNITS, kept, v),
            S.mask(LABELS, UNITS, kept, v),
            S.replaced(LABELS, UNITS, jax.tree.map(jnp.zeros_like, cut), kept, v),
        )

    cut, back, masked, held, replaced = all_of_them(v, KEPT)
    for name in LABELS:
        np.testing.assert_array_equal(back[name], masked[name])
        np.testing.assert_array_equal(masked[name], np.where(held[name], v[name], 0))
        np.testing.assert_array_equal(replaced[name], np.where(held[name], 0, v[name]))
        assert np.sum(held[name]) == cut[name].size
    other = jax.tree.map(lambda a: rng.normal(size=a.shape), cut)
    put = S.put(LABELS, UNITS, other, KEPT)
    left = sum(np.vdot(cut[name], other[name]) for name in LABELS)
    assert np.isclose(left, sum(np.vdot(v[name], put[name]) for name in LABELS))


def test_groups_that_are_left_out_stay_whole():
    v = np.arange(12.0).reshape(3, 4)
    cut = S.take("a b", UNITS, v, {"b": np.array([1])})
    np.testing.assert_array_equal(cut, v[:, [1]])
    np.testing.assert_array_equal(S.take("a b", UNITS, v, {}), v)


# --- layouts -------------------------------------------------------------------------


class Linen(nn.Module):
    """Two dense layers with norms, or a skip, as asked."""

    norm: str = "none"
    skip: bool = False

    @nn.compact
    def __call__(self, inputs):
        first = nn.tanh(nn.Dense(6)(inputs))
        second = nn.Dense(6)(first)
        if self.norm == "each unit":
            second = nn.GroupNorm(num_groups=None, group_size=1)(second[:, None])[:, 0]
        if self.norm == "the batch":
            second = nn.BatchNorm(use_running_average=False)(second)
        if self.norm == "all units":
            second = nn.LayerNorm()(second)
        return nn.tanh(second + first if self.skip else second)


def read_off(module, inputs=None, **more):
    inputs = np.ones((2, 5)) if inputs is None else inputs
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    x = variables["params"]

    def features(x, inputs):
        found = module.apply({"params": x}, inputs, **more)
        return found[0] if more else found

    width = jax.eval_shape(features, x, inputs).shape[-1]
    y = {"kernel": np.ones((width, 3)), "bias": np.ones(3)}

    def apply(x, y, inputs):
        return features(x, inputs) @ y["kernel"] + y["bias"][None]

    return S.layers(apply, x, y, inputs), x, y


@pytest.mark.parametrize("norm", ["none", "each unit"])
def test_layers_of_a_flax_module(norm):
    found, x, _ = read_off(Linen(norm))
    assert found.units == {"layer0": 6, "layer1": 6}
    assert found.x["Dense_0"] == {"bias": "layer0", "kernel": "_ layer0"}
    assert found.x["Dense_1"] == {"bias": "layer1", "kernel": "layer0 layer1"}
    assert found.y == {"bias": "_", "kernel": "layer1 _"}
    assert found.lower_groups == ("layer1",)
    if norm == "each unit":
        assert found.x["GroupNorm_0"] == {"bias": "layer1", "scale": "layer1"}
    assert jax.tree.structure(found.x) == jax.tree.structure(x)


def test_statistics_of_a_batch_are_refused():
    with pytest.raises(ValueError, match="depends on the rest of the batch"):
        read_off(Linen("the batch"), np.ones((4, 5)), mutable=["batch_stats"])


def test_ten_layers_come_in_the_order_of_use():
    found, *_ = read_off(dbo.tasks.mlp(tuple(range(12, 1, -1))))
    assert list(found.units.values()) == list(range(12, 1, -1))


@pytest.mark.parametrize("module", [Linen(skip=True), Linen("all units")])
def test_networks_in_which_cut_units_have_an_influence_are_refused(module):
    with pytest.raises(ValueError, match="no chain of layers"):
        read_off(module)


def test_layouts_are_checked():
    x, y = jnp.ones((4, 6)), jnp.ones(6)
    cases = {
        "Nothing can be cut": (x, y, "_ _", "_"),
        "multiples of its number of units": (x, y, "h h", "_"),
        "needs a label of 2 words": (x, y, "h", "h"),
        "needs the structure of `y`": (x, y, "_ h", {"a": "h"}),
        "names groups that cut neither": (x, y, "_ h", "h", "_ f"),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            S.layout(*arguments)
    with pytest.raises(ValueError, match="cuts vectors"):
        S.coordinates(x, y)
    with pytest.raises(ValueError, match="at least two kernels"):
        S.layers(lambda x, y, i: i @ x + y[None], x, y, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="does not use the parameters"):
        S.layers(lambda x, y, i: i @ x, x, y, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="batch_stats"):
        S.layers(None, {"params": {}, "batch_stats": {}}, y, x)


# --- fleets --------------------------------------------------------------------------


def vectors(size=16):
    return S.coordinates(np.ones(size), np.ones(size))


def test_participants_are_shared_out_by_largest_remainders():
    capacities = np.repeat([1, 0.5, 0.25, 0.125], [5, 10, 25, 60])
    shares = [level.participants for level in fleet_of(capacities, 10).levels]
    assert shares == [1, 1, 2, 6]
    # Someone of full capacity is always there.
    rare = fleet_of([1.0] + [0.1] * 99, 10)
    assert [level.participants for level in rare.levels] == [1, 9]
    given = fleet_of(capacities, {1.0: 2, 0.125: 3})
    assert [(v.capacity, v.participants) for v in given.levels] == [(1, 2), (0.125, 3)]


def fleet_of(capacities, participants=None, **more):
    return S.fleet(vectors(), capacities, participants=participants, **more)


@pytest.mark.parametrize(
    ("capacities", "more", "message"),
    [
        ([1.0, 0.0], {}, "can hold nothing takes no part"),
        ([1.0, 1.5], {}, r"in \(0, 1\]"),
        ([1.0, float("nan")], {}, r"in \(0, 1\]"),
        ([0.5, 0.5], {}, "write minimum=0"),
        ([1.0, 0.5], {"participants": 3}, "from 1 to 2"),
        ([1.0, 0.5], {"participants": 1, "minimum": 2}, "no room for minimum=2"),
        ([1.0, 0.5], {"participants": {0.5: 1}}, "fewer than minimum=1"),
        ([1.0, 0.5], {"participants": {0.3: 1}}, "maps capacities"),
        ([1.0, 0.5], {"frozen": ("h",)}, "`frozen` names groups"),
        ([1.0, 0.5], {"frozen": ("x0",), "rule": S.magnitude()}, "ranks them anew"),
        ([1.0, 0.9, 0.8, 0.7], {"participants": 2}, "would never take part"),
    ],
)
def test_impossible_fleets_are_refused(capacities, more, message):
    with pytest.raises(ValueError, match=message):
        S.fleet(vectors(), capacities, **more)


def test_all_clients_of_a_level_take_part_alike():
    fleet = fleet_of([1.0] + [0.5] * 6, {1.0: 1, 0.5: 2})
    keys = jax.random.split(jax.random.key(0), 3000)
    _, half = jax.jit(jax.vmap(lambda key: S.draw(fleet, key, 0)))(keys)
    clients = np.asarray(half.clients)
    assert (clients[:, 0] != clients[:, 1]).all()
    counts = np.bincount(clients.ravel(), minlength=7)
    assert counts[0] == 0
    # Each client is in a third of the rounds; five standard deviations.
    assert np.abs(counts[1:] - 1000).max() < 5 * np.sqrt(3000 * 2 / 9)


def test_masks_follow_from_the_round_and_the_client_alone():
    fleet = fleet_of([1.0] + [0.5] * 6, {1.0: 1, 0.5: 2}, frozen=("y0",))
    draw = jax.jit(lambda key, turn: S.draw(fleet, key, turn)[1])
    seen = {}
    for turn in (0, 1):
        for seed in range(8):
            part = draw(jax.random.key(seed), turn)
            for i, x, y in zip(part.clients, *part.kept.values(), strict=True):
                kept = x.tolist(), y.tolist()
                assert seen.setdefault((turn, int(i)), kept) == kept
    both = [i for i in range(7) if (0, i) in seen and (1, i) in seen]
    assert both
    for i in both:
        assert seen[0, i][0] != seen[1, i][0]
        assert seen[0, i][1] == seen[1, i][1], "frozen groups stay"


def test_scores_are_the_norms_of_what_goes_with_a_unit():
    rng = np.random.default_rng(0)
    x = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    y = rng.normal(size=(8, 2))
    found = S.layout(x, y, {"kernel": "_ h", "bias": "h"}, "h _")
    wanted = [
        np.sqrt(
            np.sum(x["kernel"][:, u] ** 2) + x["bias"][u] ** 2 + np.sum(y[u::4] ** 2)
        )
        for u in range(4)
    ]
    np.testing.assert_allclose(S.scores(found, x, y)["h"], wanted)
