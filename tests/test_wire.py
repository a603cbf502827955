"""Bytes read off programs whose collectives are written by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo

MESH = dbo.devices.mesh(8)
WIDTH = 6
ROW = WIDTH * 4  # bytes of a device's share


def sent(f, mesh=MESH):
    """What `f` on one device's row sends."""
    lifted = jax.shard_map(
        f, mesh=mesh, in_specs=jax.P("nodes"), out_specs=jax.P("nodes"), check_vma=False
    )
    v = jax.device_put(
        np.ones((8, WIDTH), np.float32), jax.NamedSharding(mesh, jax.P("nodes"))
    )
    return dbo.devices.wire(jax.jit(lifted).lower(v).compile())


def shift(v, pairs=((0, 1), (1, 2), (5, 5))):
    return jax.lax.ppermute(v, "nodes", pairs)


def test_a_permutation_sends_one_operand_for_each_pair_of_unlike_devices():
    assert sent(shift) == {"collective-permute": 2 * ROW}


def test_a_gathering_brings_each_operand_to_all_others():
    def gather(v):
        return jax.lax.all_gather(v, "nodes").sum(0)

    assert sent(gather) == {"all-gather": 8 * 7 * ROW}


def test_a_reduction_goes_there_and_back():
    assert sent(lambda v: jax.lax.psum(v, "nodes")) == {"all-reduce": 2 * 7 * ROW}


def test_groups_count_by_themselves():
    mesh = dbo.devices.mesh(4, model=2)

    def gather(v):
        return jax.lax.all_gather(v, "nodes").sum(0)

    # Two rows on each of four devices, and both halves of the mesh do the same.
    assert sent(gather, mesh) == {"all-gather": 2 * 4 * 3 * 2 * ROW}


def test_loops_count_as_often_as_they_run():
    def twice(v):
        def inner(_, v):
            return shift(v) + 1

        return jax.lax.fori_loop(
            0, 5, lambda _, v: jax.lax.fori_loop(0, 3, inner, v), v
        )

    assert sent(twice) == {"collective-permute": 15 * 2 * ROW}


def test_of_branches_the_one_that_sends_most_counts():
    def either(v):
        less = shift(v, ((0, 1),))
        return jax.lax.cond(v.sum() > 0, lambda: shift(shift(less)), lambda: less)

    assert sent(either) == {"collective-permute": (1 + 2 * 2) * ROW}


def test_a_loop_of_unknown_length_is_refused():
    def until(v):
        return jax.lax.while_loop(lambda v: (v < 9).all(), lambda v: shift(v) + 1, v)

    with pytest.raises(ValueError, match="does not tell how often it runs"):
        sent(until)


def test_a_condition_counts_with_its_loop():
    def until(v):
        return jax.lax.while_loop(
            lambda v: jax.lax.psum(v.sum(), "nodes") > 1, lambda v: v / 2, v
        )

    with pytest.raises(ValueError, match="does not tell how often it runs"):
        sent(until)


HEAD = "ENTRY %main (p: f32[6]) -> f32[6] {\n"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "%s = (f32[1,6]{1,0}, f32[1,6]{1,0}, u32[], u32[]) "
            "collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            {"collective-permute": 2 * ROW},
        ),
        (
            "%s = (f32[1,6]{1,0}, f32[4,6]{1,0}) all-gather-start(%p), "
            "replica_groups=[2,4]<=[8], dimensions={0}",
            {"all-gather": 2 * 3 * 4 * ROW},
        ),
        (
            "%s = f32[4,6]{1,0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}",
            {"all-gather": 2 * 3 * 4 * ROW},
        ),
        (
            "%s = pred[4]{0} all-gather(%p), replica_groups=mesh['a'=4,'b'=2] {'a'}",
            {"all-gather": 2 * 3 * 4},
        ),
        (
            "%s = (f32[8,6]{1,0}, f32[1,6]{1,0}) reduce-scatter-start(%p), "
            "replica_groups=[1,8]<=[8]",
            {"reduce-scatter": 8 * 7 * ROW},
        ),
        (
            "%s = f32[6]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8]",
            {"reduce-scatter": 8 * 7 * ROW},
        ),
    ],
)
def test_lines_of_other_back_ends_are_read(line, found):
    program = SimpleNamespace(as_text=lambda: HEAD + "  " + line + "\n}\n")
    assert dbo.devices.wire(program) == found


def test_a_line_that_does_not_tell_its_groups_is_refused():
    text = HEAD + "  %s = f32[6]{0} all-reduce(%p), to_apply=%add\n}\n"
    with pytest.raises(ValueError, match="does not tell its groups"):
        dbo.devices.wire(SimpleNamespace(as_text=lambda: text))


def test_what_is_not_compiled_is_refused():
    lowered = jax.jit(jnp.cumsum).lower(jnp.ones(4))
    with pytest.raises(ValueError, match="`wire` reads compiled programs"):
        dbo.devices.wire(lowered)


def test_nothing_travels_on_one_device():
    v = jnp.ones(4)
    assert dbo.devices.wire(jax.jit(jnp.cumsum).lower(v).compile()) == {}
