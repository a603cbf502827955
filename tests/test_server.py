"""Channels with a server against loops over workers, and their laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbojax as dbo

N, D, K = 4, 6, 2
MIX = dbo.mixing.averaging(N)
TOP = dbo.compressors.top_k(K)
# Unbiased in law when the key says which half to keep; here it is told to be so, which
# gives DIANA its rate of 1/2.
HALF = dbo.compressors.random_k(D // 2)
C = dbo.channels
CHANNELS = {
    "server": C.server(MIX, TOP),
    "server both ways": C.server(MIX, TOP, TOP),
    "ef14": C.ef14(MIX, TOP),
    "ef14 both ways": C.ef14(MIX, TOP, TOP),
    "ef21": C.ef21(MIX, TOP),
    "two_way": C.two_way(MIX, TOP),
    "diana": C.diana(MIX, TOP, rate=0.5),
    "diana, new memory": C.diana(MIX, TOP, rate=0.5, gain=None),
    "diana both ways": C.diana(MIX, TOP, TOP, rate=0.5),
    "smoothed": C.smoothed(C.ef21(MIX, TOP), 0.25),
}


def _values(steps=5, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, N, D))


def _top(v):
    kept = np.argsort(-np.abs(v), kind="stable")[:K]
    sent = np.zeros_like(v)
    sent[kept] = v[kept]
    return sent


def _loop(name, values, here):
    """What all workers hold after each round, worker by worker."""
    kind, both = name.split(",")[0].split(" ")[0], "both" in name or name == "two_way"
    kind = {"two_way": "ef21", "smoothed": "ef21"}.get(kind, kind)
    memory, average = np.zeros((2, N, D))
    started = np.zeros(N, bool)
    at_server, down = np.zeros((2, D))
    rate, held = (0.5 if kind == "diana" else 1.0), []
    for v, present in zip(values, here, strict=True):
        total = np.zeros(D)
        for i in np.flatnonzero(present):
            u = v[i]
            if name == "smoothed":
                u = 0.75 * average[i] + 0.25 * u if started[i] else u
                average[i], started[i] = u, True
            if kind == "server":
                sent = _top(u)
            elif kind == "ef14":
                sent = _top(u + memory[i])
                memory[i] = u + memory[i] - sent
            else:
                sent = _top(u - memory[i])
                memory[i] = memory[i] + rate * sent
            total = total + sent
        estimate = total / present.sum()
        if kind in ("ef21", "diana"):
            moved = at_server + rate * total / N
            new = kind == "ef21" or "new" in name
            estimate, at_server = moved if new else at_server + estimate, moved
        if both and kind == "server":
            estimate = _top(estimate)
        elif both and kind == "ef14":
            target = estimate + down
            estimate = _top(target)
            down = target - estimate
        elif both:
            down = down + _top(estimate - down)
            estimate = down
        held.append(estimate)
    return np.stack(held), memory, at_server


def _run(channel, values, masks):
    state, send, held = channel.init(jnp.zeros((N, D))), jax.jit(channel.send), []
    for step, (v, mask) in enumerate(zip(values, masks, strict=True)):
        got, state, traffic = send(jax.random.key(step), v, state, mask)
        got = np.asarray(got)
        np.testing.assert_array_equal(got, np.broadcast_to(got[:1], got.shape))
        held.append(got[0])
    return np.stack(held), state, traffic


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("name", CHANNELS)
def test_channels_equal_loops_over_workers(name, count):
    values = _values()
    keys = jax.random.split(jax.random.key(9), len(values))
    masks = [count and dbo.participation(key, N, count) for key in keys]
    here = [np.ones(N, bool) if m is None else np.asarray(m.mask) for m in masks]
    held, state, _ = _run(CHANNELS[name], values, masks)
    slow, memory, at_server = _loop(name, values, here)
    np.testing.assert_allclose(held, slow, atol=1e-12)
    if name != "smoothed" and not name.startswith("server"):
        np.testing.assert_allclose(state.up.sender, memory, atol=1e-12)
    if name.startswith(("ef21", "diana", "two_way")):
        np.testing.assert_allclose(state.up.receiver, at_server, atol=1e-12)
        mean = np.asarray(state.up.sender).mean(0)
        np.testing.assert_allclose(state.up.receiver, mean, atol=1e-12)


def test_the_server_needs_messages_alone():
    """Decode what crossed the links, and nothing else, and hold the same memory."""
    channel, values = C.diana(MIX, HALF), _values(8)
    state, memory = channel.init(jnp.zeros((N, D))), np.zeros(D)
    send, encode = jax.jit(channel.send), jax.jit(HALF.compress)
    decode = jax.jit(HALF.decompress)
    for step, v in enumerate(values):
        key = jax.random.key(step)
        workers = jax.random.split(key)[0]
        for i in range(N):
            own = jax.random.fold_in(workers, i)
            payload, _ = encode(own, v[i] - state.up.sender[i], ())
            memory = memory + 0.5 * np.asarray(decode(payload, v[i])) / N
        _, state, _ = send(key, v, state)
        np.testing.assert_allclose(state.up.receiver, memory, atol=1e-12)


@pytest.mark.parametrize("name", ["two_way", "diana both ways"])
def test_both_ends_of_the_downlink_hold_the_same_bits(name):
    _, state, _ = _run(CHANNELS[name], _values(), [None] * 5)
    np.testing.assert_array_equal(state.down.sender, state.down.receiver)


@pytest.mark.parametrize("name", ["ef21", "two_way", "diana", "diana, new memory"])
def test_memories_catch_up_with_values_that_stay(name):
    v = _values(1)[0]
    held, _, _ = _run(CHANNELS[name], [v] * 120, [None] * 120)
    np.testing.assert_allclose(held[-1], v.mean(0), atol=1e-8)


@pytest.mark.parametrize("name", ["ef14", "ef14 both ways"])
def test_error_feedback_loses_nothing(name):
    values = _values(12)
    held, state, _ = _run(CHANNELS[name], values, [None] * 12)
    left = np.asarray(state.up.sender).mean(0)
    if "both" in name:
        left = left + np.asarray(state.down.sender)
    np.testing.assert_allclose(held.sum(0) + left, values.mean(1).sum(0), atol=1e-12)


def test_an_unbiased_uplink_gives_unbiased_estimates():
    """Mean and variance over 20 000 exchanges, at fixed memories."""
    v = jnp.asarray(_values(1)[0])
    for channel, off in ((C.server(MIX, HALF), v), (C.diana(MIX, HALF), v - 1.0)):
        state = channel.init(v - off)
        keys = jax.random.split(jax.random.key(3), 20_000)
        held = jax.jit(jax.vmap(lambda k, s=state, c=channel: c.send(k, v, s)[0][0]))
        drawn = np.asarray(held(keys))
        mean = np.asarray(v).mean(0)
        error = drawn.mean(0) - mean
        assert np.abs(error / (drawn.std(0) / len(keys) ** 0.5)).max() < 5
        # Rand-K with half the entries: omega = 1, exactly.
        variance = float(((drawn - mean) ** 2).sum(1).mean())
        assert variance == pytest.approx(float((off**2).sum()) / N**2, rel=0.05)


def test_all_sets_of_participants_average_out():
    v, channel = jnp.asarray(_values(1)[0]), C.server(MIX)
    state, held = channel.init(v), []

    @jax.jit
    def send(mask):
        there = dbo.Participation(mask, 2)
        return channel.send(jax.random.key(0), v, state, there)[0][0]

    for chosen in itertools.combinations(range(N), 2):
        held.append(send(np.isin(np.arange(N), chosen)))
    np.testing.assert_allclose(np.mean(held, 0), v.mean(0), atol=1e-14)


def test_participants_are_drawn_alike_and_counted():
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key: dbo.participation(key, N, 3).mask))
    drawn = np.asarray(draw(keys))
    assert (drawn.sum(1) == 3).all()
    share = drawn.mean(0)
    assert np.abs(share - 0.75).max() < 5 * (0.75 * 0.25 / 4000) ** 0.5
    for count in (0, N + 1, 1.5):
        with pytest.raises(ValueError, match="whole number from 1 to 4"):
            dbo.participation(keys[0], N, count)


# (8 + 1) bytes for each of two float64 entries up; 6 x 8 down, or compressed.
TRAFFIC = {
    "server": (18, 48, 3 * (18 + 48)),
    "server both ways": (18, 18, 3 * 18 + 4 * 18),
    "ef14": (18, 48, 3 * (18 + 48)),
    "two_way": (18, 18, 3 * 18 + 4 * 18),
    "diana": (18, 48, 3 * (18 + 48)),
    "smoothed": (18, 48, 3 * (18 + 48)),
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_bytes_up_and_down(name):
    """Absent workers send nothing; what they must not miss they hear nevertheless."""
    up, down, with_three = TRAFFIC[name]
    mask = dbo.participation(jax.random.key(0), N, 3)
    _, _, traffic = _run(CHANNELS[name], _values(1), [mask])
    assert traffic == dbo.Traffic(up, with_three, rounds=2, down=down)
    _, _, traffic = _run(CHANNELS[name], _values(1), [None])
    assert traffic == dbo.Traffic(up, N * (up + down), rounds=2, down=down)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", CHANNELS)
def test_memories_are_wide_and_keep_their_types(name, dtype):
    channel, v = CHANNELS[name], jax.ShapeDtypeStruct((N, D), dtype)
    state = jax.eval_shape(channel.init, v)
    held, after, _ = jax.eval_shape(channel.send, jax.random.key(0), v, state)
    assert held.dtype == dtype
    kinds = [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert kinds == [leaf.dtype for leaf in jax.tree.leaves(after)]
    assert all(kind in (jnp.float32, bool) for kind in kinds)


@pytest.mark.parametrize("name", CHANNELS)
def test_a_first_state_may_be_donated(name):
    """No leaf shares its buffer with another or with what the caller gave."""
    v = jnp.ones((N, D))
    state = CHANNELS[name].init(v)
    held = jax.jit(CHANNELS[name].send, donate_argnums=2)(jax.random.key(0), v, state)
    assert bool(jnp.isfinite(held[0]).all())
    assert float(v.sum()) == N * D


def test_a_contraction_moves_the_copies_by_all_it_sends():
    both = TOP._replace(omega=lambda d: 1.0)
    v, channel = _values(1)[0], C.two_way(MIX, both)
    _, state, _ = _run(channel, [v], [None])
    np.testing.assert_array_equal(state.up.sender, [_top(row) for row in np.asarray(v)])


def test_trees_travel_like_vectors():
    tree = {"a": jnp.asarray(_values(1)[0][:, :2]), "b": jnp.ones((N, 2, 2))}
    channel = C.ef21(MIX, TOP)

    @jax.jit
    def send(v):
        zero = jax.tree.map(jnp.zeros_like, v)
        return channel.send(jax.random.key(0), v, channel.init(zero))[0]

    held = send(tree)
    flat = np.concatenate([tree["a"], np.reshape(tree["b"], (N, -1))], axis=1)
    want = np.asarray(send(flat))
    np.testing.assert_array_equal(held["a"], want[:, :2])
    np.testing.assert_array_equal(held["b"].reshape(N, -1), want[:, 2:])


def test_bad_input_says_what_to_write():
    ring = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(N)))
    biased = TOP._replace(delta=None)
    v = jnp.ones((N, D))
    for make in (C.server, C.ef14, C.ef21, C.diana):
        with pytest.raises(ValueError, match=r"needs `dbo.mixing.averaging\(n\)`"):
            make(ring, TOP)
        with pytest.raises(TypeError, match=r"must be a Compressor.* got int"):
            make(MIX, 3)
        name = f"`{make.__name__}"
        with pytest.raises(TypeError, match=rf"{name}\(uplink\)` must be a Compressor"):
            make(MIX, 0)
        with pytest.raises(
            TypeError, match=rf"{name}\(mix\)`.*averaging\(n\)`; got int"
        ):
            make(N, TOP)
    with pytest.raises(
        TypeError, match=r"`server\(downlink\)` must be .* got function"
    ):
        C.server(MIX, TOP, dbo.compressors.sign)
    with pytest.raises(ValueError, match="`two_way` needs a contraction"):
        C.two_way(MIX, HALF)
    with pytest.raises(ValueError, match=r"this one\s+declares neither"):
        C.diana(MIX, HALF, biased)
    for weight in (2, np.float32(2)):
        with pytest.raises(ValueError, match="0 < weight <= 1, got 2"):
            C.smoothed(C.server(MIX), weight)
    for name, channel in CHANNELS.items():
        with pytest.raises(ValueError, match="`v` holds 3 nodes"):
            channel.send(jax.random.key(0), v[:3], channel.init(v))
        if not name.startswith("server"):
            for other, what in ((v[:, :1], "shapes"), ({"a": v}, "structure")):
                with pytest.raises(ValueError, match=f"`v` must have the {what} of"):
                    channel.send(jax.random.key(0), other, channel.init(v))
    for make in (C.ef14, C.ef21):
        with pytest.raises(ValueError, match=r"Wrap an unbiased one as .*scaled"):
            make(MIX, HALF)
        with pytest.raises(ValueError, match="declares no `delta`"):
            make(MIX, TOP, biased)
    with pytest.raises(ValueError, match="`diana` takes its rate from `omega`"):
        C.diana(MIX, TOP)
    with pytest.raises(TypeError, match="must be a Channel"):
        C.smoothed(MIX, 0.5)
    with pytest.raises(ValueError, match="holds 3 nodes"):
        C.server(MIX).init(v[:3])
    with pytest.raises(TypeError, match=r"Participation, e.g. .*participation\(key"):
        C.server(MIX).send(jax.random.key(0), v, (), jnp.ones((N, 1), bool))
    mask = dbo.participation(jax.random.key(0), N + 1, 2)
    with pytest.raises(ValueError, match=r"of 4 workers who takes part.*\(5,\)"):
        C.server(MIX).send(jax.random.key(0), v, (), mask)
    for n in (0, 2.0):
        with pytest.raises(ValueError, match="whole number n >= 1"):
            dbo.mixing.averaging(n)
        with pytest.raises(ValueError, match="whole number n >= 1"):
            dbo.mixing.along("workers", n)
    with pytest.raises(ValueError, match="for an axis of length 3; this one has 4"):
        jax.vmap(dbo.mixing.along("w", 3).apply, axis_name="w")(v[:, None])
