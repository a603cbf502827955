import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax.submodels.rules import (
    Group,
    Phase,
    aligned,
    magnitude,
    per_layer,
    random_units,
    rolling,
    staggered,
    static,
)

GROUP = Group("h", 1, size=12, kept=5, clients=7)
RULES = {
    "static": static(),
    "random": random_units(3),
    "rolling": rolling(),
    "rolling back": rolling(-5),
    "staggered": staggered(),
    "aligned": staggered(aligned),
    "phases": staggered({"h": Phase(stride=-3, spread=5, offset=-2)}),
    "magnitude": magnitude(),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SCORES = jnp.array([3.0, 1, 4, 1.5, 9, 2, 6, 5, 3.5, 5.8, 9.7, 9.3])


@functools.partial(jax.jit, static_argnums=(0, 1))
def sets(rule, group, rounds, scores=None):
    """Kept units, (rounds, clients, kept)."""

    def one(q, client):
        return rule.keep(q, client, group, scores)

    clients = jnp.arange(group.clients)
    return jax.vmap(lambda q: jax.vmap(lambda i: one(q, i))(clients))(rounds)


def held(kept, size):
    """Kept units as 0/1 marks, (rounds, clients, size)."""
    return (np.asarray(kept)[..., None] == np.arange(size)).sum(-2)


def coverage(phases, sizes, capacities, rounds):
    """How many clients hold each pair of units of two groups: (rounds, n_a, n_b)."""
    rule, clients, total = staggered(phases), len(capacities), 0
    for capacity in set(capacities):
        marks = []
        for index, size in enumerate(sizes):
            group = Group(f"h{index}", index, size, int(capacity * size), clients)
            kept = sets(rule, group, jnp.arange(rounds))
            marks.append(held(kept, size)[:, np.array(capacities) == capacity])
        total += np.einsum("qiu,qiv->quv", *marks)
    return total


@rules
def test_units_are_distinct_and_of_the_group(rule):
    kept = np.asarray(sets(rule, GROUP, jnp.arange(30), SCORES))
    assert kept.shape == (30, 7, 5)
    assert kept.dtype == np.int32
    assert kept.min() >= 0
    assert kept.max() < 12
    assert (held(kept, 12).max(-1) == 1).all()


@rules
def test_sets_depend_on_round_client_group_and_seed_alone(rule):
    first = rule.keep(4, 2, GROUP, SCORES)
    again = jax.jit(lambda q, i: rule.keep(q, i, GROUP, SCORES))(4, 2)
    chex.assert_trees_all_equal(first, again)
    chex.assert_trees_all_equal(first, sets(rule, GROUP, jnp.arange(5), SCORES)[4, 2])


@rules
def test_a_whole_group_is_kept_whole(rule):
    whole = GROUP._replace(kept=12)
    chex.assert_trees_all_equal(rule.keep(9, 3, whole, SCORES), np.arange(12))


def test_static_is_a_prefix_and_rolling_moves_by_its_stride():
    chex.assert_trees_all_equal(static().keep(8, 6, GROUP), np.arange(5))
    for stride in (1, 7, -5):
        kept = sets(rolling(stride), GROUP, jnp.arange(40))
        wanted = (stride * np.arange(40)[:, None] + np.arange(5)) % 12
        for client in range(7):
            chex.assert_trees_all_equal(np.asarray(kept[:, client]), wanted)


@pytest.mark.parametrize(
    ("phase", "size", "clients"),
    [
        (Phase(1, 1, 0), 12, 7),
        (Phase(7, 3, 5), 12, 5),
        (Phase(-4, -3, -1), 9, 4),
        # Products of these leave int32, and some leave int64 in float arithmetic.
        (Phase(99_991, 60_000, 77), 100_003, 70_001),
    ],
)
def test_starts_are_the_formula_in_exact_whole_numbers(phase, size, clients):
    group = Group("h", 0, size, kept=2, clients=clients)
    rule = staggered({"h": phase})
    keep = jax.jit(jax.vmap(lambda q, i: rule.keep(q, i, group)))
    rounds = [0, 1, 5, 46_341, 2**31 - 1]
    pairs = list(itertools.product(rounds, [0, 1, clients // 2, clients - 1]))
    q, i = (jnp.array(column, jnp.int32) for column in zip(*pairs, strict=True))
    for (turn, client), kept in zip(pairs, keep(q, i).tolist(), strict=True):
        spread = phase.spread * client * size // clients
        start = (phase.stride * turn + spread + phase.offset) % size
        assert kept == [start, (start + 1) % size]


def test_default_phases_differ_between_layers_and_keep_clients_apart():
    groups = [Group(f"h{i}", i, 64, 16, 4) for i in range(6)]
    phases = [per_layer(group) for group in groups]
    assert len({phase.stride for phase in phases}) == 6
    for group in groups:
        # Four clients of a quarter each hold every unit exactly once.
        marks = held(sets(staggered(), group, jnp.arange(3)), 64)
        assert (marks.sum(1) == 1).all()


def test_every_unit_is_held_by_two_of_four_half_clients():
    group = Group("h", 0, 4, 2, clients=4)
    for rule in (staggered(), staggered(aligned)):
        assert (held(sets(rule, group, jnp.arange(9)), 4).sum(1) == 2).all()


def test_aligned_layers_never_train_opposite_units():
    found = coverage(aligned, (4, 4), [0.5] * 4, rounds=8)
    apart = (np.arange(4)[:, None] - np.arange(4)) % 4
    wanted = np.array([2, 1, 0, 1])[apart]
    assert (found == wanted).all()
    assert found[0].mean() == 1
    assert found.min() == 0


def test_an_offset_moves_the_band_and_does_not_widen_it():
    phases = {"h0": Phase(1, 1, 0), "h1": Phase(1, 1, 2)}
    found = coverage(phases, (4, 4), [0.5] * 4, rounds=8).sum(0)
    assert (found == 0).sum() == 4


def test_different_strides_train_every_pair_within_a_window():
    found = coverage(per_layer, (4, 4), [0.5] * 4, rounds=4)
    assert found.sum(0).min() >= 1
    assert (found.mean((1, 2)) == 1).all()


def test_quarters_leave_over_half_of_an_aligned_matrix_out_for_ever():
    never = coverage(aligned, (16, 16), [0.25] * 4, rounds=16).sum(0) == 0
    assert never.mean() == 0.5625
    ever = coverage(per_layer, (16, 16), [0.25] * 4, rounds=16).sum(0)
    assert ever.min() >= 1


def test_widths_that_double_do_not_fall_into_step_again():
    # Strides 1 and 2 would: a turn of 16 units in 16 rounds, and one of 32.
    doubled = {"h0": Phase(1), "h1": Phase(2)}
    out_of_step = coverage(per_layer, (16, 32), [0.25] * 4, rounds=32).sum(0)
    in_step = coverage(doubled, (16, 32), [0.25] * 4, rounds=32).sum(0)
    assert out_of_step.min() >= 1
    assert (in_step == 0).mean() > 0.5


def test_pairs_are_covered_alike_over_a_full_period():
    # 16 clients x 16 rounds of a quarter: each pair 256 / 16 times.
    found = coverage(per_layer, (16, 16), [0.25] * 16, rounds=16)
    assert (found.sum(0) == 16).all()


def test_mean_coverage_is_the_sum_of_the_shares():
    capacities = [1.0, 0.5, 0.5, 0.25, 0.125]
    found = coverage(per_layer, (16, 8), capacities, rounds=6)
    wanted = sum(c * c for c in capacities)
    np.testing.assert_allclose(found.mean((1, 2)), wanted, rtol=1e-12)


def test_random_sets_are_uniform_and_independent_between_groups():
    rounds, k, size = 4000, 3, 8
    a, b = (Group(f"h{i}", i, size, k, clients=2) for i in range(2))
    rule = random_units(11)
    marks_a, marks_b = (held(sets(rule, g, jnp.arange(rounds)), size) for g in (a, b))
    share = k / size
    spread = np.sqrt(share * (1 - share) / rounds)
    assert np.abs(marks_a.mean(0) - share).max() < 5 * spread
    # A weight between the groups is held with probability share^2, by each client.
    pairs = np.einsum("qiu,qiv->iuv", marks_a, marks_b) / rounds
    bound = 5 * np.sqrt(share**2 * (1 - share**2) / rounds)
    assert np.abs(pairs - share**2).max() < bound
    # So do the two clients draw independently of each other.
    both = np.einsum("qu,qv->uv", marks_a[:, 0], marks_a[:, 1]) / rounds
    assert np.abs(both - share**2).max() < bound


def test_seed_and_group_make_other_random_sets():
    rounds = jnp.arange(20)
    first = sets(random_units(0), GROUP, rounds)
    assert (first != sets(random_units(1), GROUP, rounds)).any()
    assert (first != sets(random_units(0), GROUP._replace(number=0), rounds)).any()


def test_magnitude_keeps_the_largest():
    for client in range(3):
        kept = magnitude().keep(5, client, GROUP, SCORES)
        assert set(kept.tolist()) == set(np.argsort(np.asarray(SCORES))[-5:].tolist())
    assert magnitude().by_magnitude
    assert not staggered().by_magnitude


@pytest.mark.parametrize("seed", [0.5, -1, True, "0"])
def test_random_units_wants_a_whole_seed(seed):
    with pytest.raises(ValueError, match="whole number from 0 on"):
        random_units(seed)


@pytest.mark.parametrize("stride", [0, 0.5, True])
def test_rolling_wants_a_whole_stride(stride):
    with pytest.raises(ValueError, match="whole number of units per round"):
        rolling(stride)


def test_phases_are_checked():
    with pytest.raises(TypeError, match="function `Group -> Phase`"):
        staggered([Phase()])
    with pytest.raises(ValueError, match="'h' needs a Phase of whole numbers"):
        staggered({"h": Phase(stride=0.5)})
    with pytest.raises(ValueError, match="'h' needs a Phase"):
        staggered(lambda group: (1, 1, 0)).keep(0, 0, GROUP)
    with pytest.raises(ValueError, match="no phase for group 'h'"):
        staggered({"other": Phase()}).keep(0, 0, GROUP)


@pytest.mark.parametrize("kept", [0, 13])
def test_impossible_counts_are_refused(kept):
    with pytest.raises(ValueError, match=f"from 1 to all can be kept; got kept={kept}"):
        static().keep(0, 0, GROUP._replace(kept=kept))


def test_magnitude_wants_a_score_per_unit():
    with pytest.raises(ValueError, match="got none"):
        magnitude().keep(0, 0, GROUP, None)
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        magnitude().keep(0, 0, GROUP, jnp.ones(3))


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_windows_per_layer_never_stand_still(size):
    """A stride of whole turns would train the same units for ever."""
    rounds = jnp.arange(size)
    for number in range(5):
        group = Group("h", number, size=size, kept=1, clients=1)
        held = jax.vmap(
            functools.partial(staggered().keep, client=0, group=group, scores=None)
        )
        assert len(set(held(rounds)[:, 0].tolist())) > 1
