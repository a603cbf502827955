from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbojax.runner import PeerLostError, peers

# What JAX 0.10 said when another process was killed, and when it did not come.
LOST = [
    "UNKNOWN: Gloo collective permute failed: [external/gloo/gloo/transport/tcp/"
    "pair.cc:538] Read error [127.0.0.1]:23431: Connection reset by peer",
    "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
    "Connection closed by peer [127.0.0.1]:400",
    "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() "
    "timed out with key: cpu:gloo/0,2048/1 and duration: 29.999999928s",
    "UNKNOWN: Gloo context initialization failed: [external/gloo/gloo/transport/tcp/"
    "pair.h:311] Connect timeout [none]",
]
OTHERS = [
    "UNKNOWN: Gloo all-reduce failed: unsupported element type",
    "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes",
    "the database timed out",
]


@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
@pytest.mark.parametrize("text", LOST)
def test_a_lost_process_is_told_in_a_sentence(text, kind):
    with (
        pytest.raises(
            PeerLostError, match=r"is gone or unreachable.* At step 5. Start"
        ) as e,
        peers.watched(lambda: "At step 5."),
    ):
        raise kind(text)
    assert isinstance(e.value, ConnectionError)
    assert str(e.value.__cause__) == text


@pytest.mark.parametrize("text", OTHERS)
def test_other_errors_pass_unchanged(text):
    with pytest.raises(ValueError, match=text) as caught, peers.watched(lambda: ""):
        raise ValueError(text)
    assert caught.value.__cause__ is None


SETTINGS = {
    "key": "Make it in the same way everywhere",
    "evaluate": "in all of them or in none: not `... if dbo.devices.is_first()",
    "checkpoint": "in all of them or in none: not `... if dbo.devices.is_first()",
    "batches": "the same kind everywhere, e.g. `from_host",
    "stop_on_nonfinite": "Pass one value everywhere",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_differs_among_processes_is_named(name):
    # Of another process that was told the same things but one.
    others = []

    def gather(words):
        others.append(peers.padded(words))
        return np.stack(others)

    two = peers.Peers(size=2, gather=gather)
    same = dict.fromkeys([*SETTINGS, "a", "b", "c", "d"], True)
    peers.agree(two, **same)
    with pytest.raises(ValueError, match=f"need the same `{name}`.*") as caught:
        peers.agree(two, **same | {name: False})
    assert SETTINGS[name] in str(caught.value)


def test_an_error_on_one_device_does_not_wait_for_the_others():
    def fail():
        raise ValueError("this device noticed")

    def hang():
        raise AssertionError("this one would wait for ever")

    parts = [
        SimpleNamespace(is_ready=lambda: False, block_until_ready=hang),
        SimpleNamespace(is_ready=lambda: True, block_until_ready=fail),
    ]
    shards = [SimpleNamespace(data=part) for part in parts]
    with pytest.raises(ValueError, match="this device noticed"):
        peers.wait(SimpleNamespace(addressable_shards=shards))


def test_one_process_is_alone_wherever_its_arrays_lie():
    mesh = jax.make_mesh((4,), ("nodes",))
    spread = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P("nodes")))
    alone = peers.peers_of([spread, np.ones(2), 3.0])
    assert (alone.rank, alone.size) == (0, 1)
    told = peers.together(alone, "nothing", lambda: [5, 6])
    assert told[0, :3].tolist() == [5, 6, 0]
