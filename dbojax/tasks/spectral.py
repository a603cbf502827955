"""Stiff equations in one space dimension, solved with Fourier modes and ETDRK4."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax import trees

# Values on a grid and its wave numbers are functions of these; both are (m,) or (k,).
Function = Callable[[jax.Array], jax.Array]


class Equation(NamedTuple):
    r"""An equation with one coefficient :math:`\nu`, for t from 0 to 1, s in [-1, 1].

    .. math:: v_t = \mathcal L_\nu v + \mathcal D\, g(s, v), \quad u = v + \text{offset}

    where v has the period ``period`` and u is read from the part over [-1, 1). Both
    operators are given by what they do to :math:`e^{\kappa s}`, with
    :math:`\kappa = i k` imaginary.
    """

    start: Function  # s -> v(0, s), (m,)
    linear: Callable[[jax.Array, jax.Array], jax.Array]  # (kappa, nu) -> symbol of L
    source: Callable[[jax.Array, jax.Array], jax.Array]  # (s, v) -> g
    operator: Function  # kappa -> symbol of D
    nu: float  # the coefficient that is to be found
    guess: float  # where to start looking for it
    points: int  # in [-1, 1), and steps from 0 to 1, that resolve the solution at nu
    steps: int
    period: int = 2
    offset: float = 0.0


def burgers() -> Equation:
    r"""Burgers' equation, which steepens a sine wave into a shock at s = 0.

    .. math::
        u_t + u u_s = \nu u_{ss}, \quad u(0, s) = -\sin \pi s, \quad u(t, \pm 1) = 0

    The data are odd and periodic, so the boundary values need no further care. The
    shock is about :math:`2 \nu` wide: 512 points are the least at
    :math:`\nu = 0.01 / \pi`; with 256 another coefficient fits as well.

    References:
        Shen et al. (2024), arXiv:2406.14095, eq. 46.
    """
    return Equation(
        start=lambda s: -jnp.sin(jnp.pi * s),
        linear=lambda kappa, nu: nu * kappa**2,
        source=lambda s, v: v**2,
        operator=lambda kappa: -kappa / 2,
        nu=0.01 / math.pi,
        guess=0.05,
        points=720,
        steps=360,
    )


def allen_cahn() -> Equation:
    r"""The Allen-Cahn equation with its stable state -1 at both ends.

    .. math::
        u_t = \nu u_{ss} + 5 (u - u^3), \quad u(0, s) = s^2 \cos \pi s, \quad
        u(t, \pm 1) = -1

    A periodic continuation of the data has a kink at the ends, whose diffusion would
    lift the value there by some hundredths. So v = u + 1 is continued to s in [1, 3) as
    an odd function around s = 1, with the reaction of -v: it vanishes at both ends.

    References:
        Shen et al. (2024), arXiv:2406.14095, eq. 47; the continuation is ours.
    """

    def start(s):
        mirrored = jnp.where(s < 1, s, 2 - s)
        return jnp.where(s < 1, 1, -1) * (mirrored**2 * jnp.cos(jnp.pi * mirrored) + 1)

    def source(s, v):
        return 5 * (jnp.where(s < 1, 3, -3) * v**2 - v**3)

    return Equation(
        start=start,
        linear=lambda kappa, nu: nu * kappa**2 - 10,
        source=source,
        operator=jnp.ones_like,
        nu=0.001,
        guess=0.01,
        points=288,
        steps=180,
        period=4,
        offset=-1.0,
    )


def kdv() -> Equation:
    r"""The Korteweg-de Vries equation, which breaks a cosine wave up into solitons.

    .. math:: u_t + u u_s + \nu u_{sss} = 0, \quad u(0, s) = \cos \pi s

    with periodic boundaries. As a function of :math:`\nu` a misfit to the solution at
    0.0025 has other valleys, below 0.0012.

    References:
        Shen et al. (2024), arXiv:2406.14095, eq. 48.
    """
    return Equation(
        start=lambda s: jnp.cos(jnp.pi * s),
        linear=lambda kappa, nu: -nu * kappa**3,
        source=lambda s, v: v**2,
        operator=lambda kappa: -kappa / 2,
        nu=0.0025,
        guess=0.005,
        points=288,
        steps=360,
    )


def grid(points: int, period: int = 2) -> jax.Array:
    """Where the values stand: ``points`` of them in [-1, 1), on to ``period - 1``."""
    return -1 + 2 * jnp.arange(points * period // 2) / points


def solve(
    equation: Equation,
    nu: jax.Array | float,
    points: int | None = None,
    steps: int | None = None,
    frames: int = 1,
    dealias: bool = True,
) -> jax.Array:
    r"""Solution at equidistant times from 0 to 1, on equidistant points in [-1, 1).

    The Fourier coefficients take fourth-order exponential Runge-Kutta steps (ETDRK4):
    the linear part is integrated exactly, so large :math:`\nu` needs no small steps.
    A wave does: :math:`\max |u|` ``points`` must stay below 2.5 ``steps``.

    Args:
        equation: what to solve, e.g. :func:`burgers`.
        nu: its coefficient, a scalar; may be traced, and derived in either mode.
        points: in [-1, 1), an even number; by default what the equation asks for.
        steps: from 0 to 1, a multiple of ``frames``; by default likewise.
        frames: how many states to keep, besides the first.
        dealias: whether the source acts on the lower two thirds of the modes alone, so
            that squares bring no aliases.

    Returns:
        u of shape ``(frames + 1, points)``, float64; NaN where the equation is ill
        posed, e.g. for negative diffusion.

    Raises:
        ValueError: if a size does not fit, ``nu`` is not a scalar, or JAX would
            compute in float32, in which the coefficients of the steps cancel.
        TypeError: if ``equation`` is of another kind.

    Examples:
        >>> u = solve(kdv(), nu=0.01, points=64, steps=100)
        >>> bool(jnp.allclose(u.mean(1), 0))  # what flows out comes in again
        True

    References:
        Kassam and Trefethen (2005), doi:10.1137/S1064827502410633, eq. 2.5, 2.6, 3.1.
    """
    trees.check_type(equation, Equation, "equation", "dbo.tasks.spectral.kdv()")
    points = equation.points if points is None else points
    steps = equation.steps if steps is None else steps
    _check(nu, points, steps, frames)
    h, s = 1 / steps, grid(points, equation.period)
    size = s.size
    modes = np.arange(size // 2 + 1)
    kappa = jnp.asarray(2j * np.pi / equation.period * modes)
    symbol = equation.linear(kappa, jnp.asarray(nu, float))
    # The highest mode of an even grid has no derivative: it is left out in any case.
    kept = modes < size * (1 / 3 if dealias else 1 / 2)
    operator = jnp.where(kept, equation.operator(kappa), 0)
    at_rest = equation.start(s)

    def source(coefficients):
        v = jnp.fft.irfft(coefficients, size)
        return operator * jnp.fft.rfft(equation.source(s, v))

    step = etdrk4(h * symbol, lambda v: h * source(v))

    def frame(v, _):
        v = jax.lax.scan(lambda v, _: (step(v), None), v, length=steps // frames)[0]
        return v, jnp.fft.irfft(v, size)[:points]

    _, later = jax.lax.scan(frame, jnp.fft.rfft(at_rest), length=frames)
    return jnp.concatenate([at_rest[None, :points], later]) + equation.offset


def etdrk4(
    linear: jax.Array, nonlinear: Callable[[jax.Array], jax.Array], nodes: int = 32
) -> Callable[[jax.Array], jax.Array]:
    r"""One step of :math:`v' = L v + N(v)` with a diagonal L, exact where N is zero.

    .. math::
        a &= e^{z/2} v + q N(v), \quad b = e^{z/2} v + q N(a), \quad
        c = e^{z/2} a + q (2 N(b) - N(v)) \\
        v &\leftarrow e^z v + f_1 N(v) + 2 f_2 (N(a) + N(b)) + f_3 N(c)

    Args:
        linear: z = h L, ``(k,)``.
        nonlinear: h N.
        nodes: on the circle around each z, over which q and f are averaged: at z
            itself they would cancel.

    Returns:
        ``v -> v`` after a step of length h.
    """
    turns = (np.arange(nodes) + 0.5) / nodes
    w = linear[:, None] + jnp.asarray(np.exp(2j * np.pi * turns))[None, :]
    e = jnp.exp(w)
    whole, half = jnp.exp(linear), jnp.exp(linear / 2)
    q = jnp.mean((jnp.exp(w / 2) - 1) / w, 1)
    f1 = jnp.mean((-4 - w + e * (4 - 3 * w + w**2)) / w**3, 1)
    f2 = jnp.mean((2 + w + e * (w - 2)) / w**3, 1)
    f3 = jnp.mean((-4 - 3 * w - w**2 + e * (4 - w)) / w**3, 1)

    def step(v):
        at_v = nonlinear(v)
        a = half * v + q * at_v
        at_a = nonlinear(a)
        at_b = nonlinear(half * v + q * at_a)
        at_c = nonlinear(half * a + q * (2 * at_b - at_v))
        return whole * v + f1 * at_v + 2 * f2 * (at_a + at_b) + f3 * at_c

    return step


def check_precision(name: str) -> None:
    """Refuse to go on where JAX makes float32 of everything."""
    if jnp.zeros(()).dtype != jnp.float64:
        raise ValueError(
            f"`{name}` needs float64, but JAX computes in float32. Write "
            '`jax.config.update("jax_enable_x64", True)` first.'
        )


def _check(nu, points, steps, frames):
    check_precision("solve")
    for name, value, unit in (
        ("points", points, 2),
        ("frames", frames, 1),
        ("steps", steps, frames),
    ):
        whole = isinstance(value, numbers.Integral)
        if not whole or value < 1 or value % unit:
            raise ValueError(
                f"`solve` needs a whole number `{name}`, a multiple of {unit}; got "
                f"{value!r}."
            )
    if jnp.shape(nu) != ():
        raise ValueError(
            f"`nu` must be one number; got shape {jnp.shape(nu)}. Write "
            "`jax.vmap(lambda nu: solve(equation, nu, ...))(nus)` for several."
        )
