"""Settings and fixtures shared by the tests and the doctests."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


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
