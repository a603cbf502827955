"""Settings and fixtures shared by the tests and the doctests."""

import os
from importlib.metadata import version
from pathlib import Path

# Nearly all time goes into compiling small programs, many of them alike: optimise them
# less, in one piece each, and keep what was compiled.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
    if version("jaxlib").startswith("0.10."):
        # Half the time of a program. Later versions know it no more, and would stop.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

CACHE = Path(__file__).parent / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Notebooks that compute more than they compile. A kernel has the flags of its start.
LONG = {"02_choose_a_method.ipynb"}
HASTE = ("--xla_backend_optimization_level", "--xla_llvm_disable_expensive_passes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):  # noqa: D103
    flags = os.environ["XLA_FLAGS"]
    if item.path.name in LONG:
        thorough = (f for f in flags.split() if not f.startswith(HASTE))
        os.environ["XLA_FLAGS"] = " ".join(thorough)
    try:
        return (yield)
    finally:
        os.environ["XLA_FLAGS"] = flags


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    import dbojax

    doctest_namespace.update(dbo=dbojax, jax=jax, jnp=jnp, np=np, optax=optax)


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
    # chex knows a function by call stack and source, so parametrised cases share one.
    chex.clear_trace_counter()


@pytest.fixture
def key():  # noqa: D103
    return jax.random.key(7)
