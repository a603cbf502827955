r"""Laws of random directions, all with :math:`E[v v^\top] = I`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Numbers (r,) of directions -> those directions, (r, N), as `trees.ravel` orders x.
Draw = Callable[[jax.Array], jax.Array]

_DIRECTIONS = 0x6469_7265  # far from the small numbers by which solvers fold keys


class Law(NamedTuple):
    """How the directions of one estimate are drawn.

    ``draw(key, size, count, dtype)`` returns the function that gives the directions of
    some numbers below ``count``. Direction i depends on the key and i alone (under
    orthogonal laws on ``count`` too), never on what it is drawn together with, so that
    devices can share the numbers and draw any of them again.
    """

    draw: Callable[[jax.Array, int, int, Any], Draw]
    orthogonal: bool = False  # whether the directions of one sample are


def direction_key(key: jax.Array, guides: int = 0) -> jax.Array:
    """The key of the directions of an estimate.

    The inner solver gets the key of the estimate itself, as under estimators that draw
    no directions, so all of them see the same inner randomness. So does a guide, whose
    directions must yet be others than those of the estimate that it guides.

    Args:
        key: of the estimate.
        guides: how many guides in a row stand behind it.

    Returns:
        A key.
    """
    own = jax.random.fold_in(key, _DIRECTIONS)
    return jax.random.fold_in(own, guides) if guides else own


def _independent(one: Callable[[jax.Array, int, Any], jax.Array]) -> Law:
    """Independent directions, the i-th from a key of its own."""

    def draw(key, size, count, dtype):
        del count

        def numbered(i):
            return one(jax.random.fold_in(key, i), size, dtype)

        return jax.vmap(numbered)

    return Law(draw)


def _signs(key, size, dtype):
    # One word of the generator serves 32 entries: drawing a word for each costs
    # several times as much as all else that is done with a direction.
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return 1 - 2 * bits.reshape(-1)[:size].astype(dtype)


def _on_sphere(key, size, dtype):
    wide = jnp.promote_types(dtype, jnp.float32)  # a sum of squares overflows early
    v = jax.random.normal(key, (size,), wide)
    return (v * (size**0.5 / jnp.linalg.norm(v))).astype(dtype)


def _basis(entries: jax.Array, size: int, dtype) -> jax.Array:
    hits = entries[:, None] == jnp.arange(size)[None]
    return jnp.where(hits, jnp.asarray(size**0.5, dtype), 0)


def _coordinates(key, size, count, dtype):
    del count

    def entry(i):
        return jax.random.randint(jax.random.fold_in(key, i), (), 0, size)

    return lambda indices: _basis(jax.vmap(entry)(indices), size, dtype)


def _distinct_coordinates(key, size, count, dtype):
    _check_fits(count, size, "coordinates_without_replacement")
    entries = jax.random.permutation(key, size)[:count]
    return lambda indices: _basis(entries[indices], size, dtype)


def _haar(key, size, count, dtype):
    _check_fits(count, size, "orthogonal")
    wide = jnp.promote_types(dtype, jnp.float32)
    q, r = jnp.linalg.qr(jax.random.normal(key, (size, count), wide))
    # Only with the signs of r's diagonal are the columns of q uniform: Mezzadri (2007),
    # arXiv:math-ph/0609050.
    rows = (q * jnp.where(jnp.diagonal(r) < 0, -1, 1)[None]).T
    return lambda indices: (size**0.5 * rows[indices]).astype(dtype)


def _check_fits(count: int, size: int, name: str) -> None:
    if count > size:
        raise ValueError(
            f"`{name}` draws at most as many directions as x has entries, {size}; got "
            f"directions={count}. Write directions={size}, or take `rademacher`."
        )


# Entries +-1. Of all laws of independent entries the least error: relative mean squared
# error (N - 1) / b for N entries and b directions.
rademacher = _independent(_signs)

# Standard normal entries; (N + 1) / b.
gaussian = _independent(lambda key, size, dtype: jax.random.normal(key, (size,), dtype))

# Uniform on the sphere of radius sqrt(N); (N - 1) / b.
sphere = _independent(_on_sphere)

# sqrt(N) e_j with a uniform j; (N - 1) / b.
coordinates = Law(_coordinates)

# sqrt(N) e_j with distinct j; (N - b) / b.
coordinates_without_replacement = Law(_distinct_coordinates, orthogonal=True)

# sqrt(N) times orthonormal vectors, uniform among such; (N - b) / b. The whole block is
# held, (b, N).
orthogonal = Law(_haar, orthogonal=True)


def sample_variance(law: Law, w: jax.Array, squares: jax.Array) -> jax.Array:
    r"""Unbiased estimate of :math:`E|\hat g - g|^2`, :math:`\hat g = \frac1b \sum w v`.

    .. math:: \frac1{b^2} \sum_i w_i^2 \, (|v_i|^2 - c)

    with c = 1 for independent directions and c = b for orthogonal ones, since
    :math:`E[w^2] = |g|^2` under every law.

    Args:
        law: of the directions.
        w: slopes along them, :math:`w_i = \langle g, v_i \rangle`, (b,).
        squares: :math:`|v_i|^2`, (b,).

    Returns:
        A scalar.
    """
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    taken = w.size if law.orthogonal else 1
    return jnp.mean(jnp.square(wide) * (squares - taken)) / w.size


def check_directions(directions: int, chunk: int, devices: int, name: str) -> None:
    """Refuse directions that do not form whole chunks, as many on each device."""
    if directions % (chunk * devices):
        parts = f"chunk * devices = {chunk} * {devices}"
        good = -(-directions // (chunk * devices)) * chunk * devices
        raise ValueError(
            f"`{name}` needs directions that are a multiple of {parts}, got "
            f"{directions}. Write directions={good}, or another chunk."
        )
