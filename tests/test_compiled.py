"""Compiled programs outlive the process that made them."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import dbojax as dbo

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def settings():
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_what_was_compiled_is_found_again(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = dbo.devices.keep_compiled(least_seconds=0)
    assert folder == tmp_path / "dbojax"

    def program(v):
        return jnp.sin(v) @ v + 0.125

    v = np.arange(5.0)
    first = jax.jit(program)(v)
    kept = {path for path in folder.iterdir() if "program" in path.name}
    assert kept
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    try:
        jax.clear_caches()
        np.testing.assert_array_equal(jax.jit(program)(v), first)
    finally:
        jax.monitoring.clear_event_listeners()
    assert "/jax/compilation_cache/cache_hits" in hits
    assert kept == {path for path in folder.iterdir() if "program" in path.name}


def test_a_folder_that_is_not_ones_own_is_refused(tmp_path, settings):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ValueError, match=r"Others may write into .*chmod go-w"):
        dbo.devices.keep_compiled(shared)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        dbo.devices.keep_compiled(tmp_path / "file")
    with pytest.raises(ValueError, match="least_seconds"):
        dbo.devices.keep_compiled(tmp_path / "own", least_seconds=-1)
    assert jax.config.jax_compilation_cache_dir != str(shared)


@pytest.mark.skipif(os.name != "posix", reason="owners are POSIX's")
def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch, settings):
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    if os.geteuid() == 0:
        os.chown(other, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        dbo.devices.keep_compiled(other)
    assert jax.config.jax_compilation_cache_dir != str(other)
