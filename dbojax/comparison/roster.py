"""Who takes part: methods with their messages, as plain entries of a dictionary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from dbojax import algorithms, channels, compressors, strategies
from dbojax.base import Algorithm, Channel, Compressor, Mix, Problem
from dbojax.comparison.studies import Scales

Steps = tuple  # (upper step, lower step), traced


_ANY = Scales()


class Entry(NamedTuple):
    """A method with its messages; nothing but its two step sizes is tuned."""

    method: str
    message: str  # what travels, in words
    # (mix, problem, (upper step, lower step)) -> algorithm; the state has `.x`, `.y`
    make: Callable[[Mix, Problem, Steps], Algorithm]
    centre: tuple[float, float]  # of the grid of step sizes
    dense: bool = True  # whether it counts as uncompressed
    pace: int = 1  # steps it takes for one of a method with ten inner rounds

    @property
    def label(self) -> str:
        """Method and message, for tables and legends."""
        return f"{self.method}, {self.message}"


def _dense(mix: Mix) -> Channel:
    return channels.exact(mix, 0.6)


def _reference(compressor: Compressor, gamma: float, mix: Mix) -> Channel:
    return channels.reference_point(mix, compressor, gamma)


def _feedback(compressor: Compressor, gamma: float, mix: Mix) -> Channel:
    return channels.error_feedback(mix, compressor, gamma)


def _c2dfb(inner: Callable, outer: Callable, rounds: int):
    def make(mix, problem, steps):
        return algorithms.c2dfb(
            problem,
            outer=outer(mix),
            inner=inner(mix),
            penalty=10.0,
            inner_steps=rounds,
            upper_step=steps[0],
            lower_step=steps[1],
        )

    return make


def _ma_dsbo(mix, problem, steps):
    return algorithms.ma_dsbo(
        problem,
        channel=channels.exact(mix),
        upper_step=steps[0],
        lower_step=steps[1],
        linear_step=steps[1],
        lower_steps=10,
        linear_steps=10,
    )


def _local_inverse(method: Callable, wires: tuple[str, ...], smoothness: float):
    """MDBO and its kin: each node inverts its own Hessian by ten terms of a series."""

    def make(mix, problem, steps):
        return method(
            problem,
            channel=channels.exact(mix, gamma=0.1),
            **{name: channels.exact(mix) for name in wires},
            upper_step=steps[0],
            lower_step=steps[1],
            smoothness=smoothness,
            terms=10,
        )

    return make


def _single_loop(upper: Callable, lower: Callable, wire: Callable[[Mix], Channel]):
    """D-SOBA and SPARKLE: x moves by one strategy, y and z by another, all at once."""

    def make(mix, problem, steps):
        return algorithms.sparkle(
            problem,
            upper=upper,
            lower=lower,
            upper_channel=wire(mix),
            lower_channel=wire(mix),
            upper_step=steps[0],
            lower_step=steps[1],
        )

    return make


def roster(scales: Scales = _ANY) -> dict[str, Entry]:
    """Everybody who takes part, by a short name; extend or cut it like any dictionary.

    ``pace`` evens out work, roughly: in the time of one step of C²DFB with ten inner
    rounds (33 gradients) MA-DSBO takes one step (21 gradients, 11 products), single
    loops ten (30 and 20) and those with truncated series four (12 and 40).

    Args:
        scales: of the task; the centres of the grids of step sizes.

    Examples:
        >>> entries = roster()
        >>> entries["c2dfb-top20"].label, entries["ma-dsbo"].dense
        ('C²DFB, top 20 %', True)
    """
    top, qsgd = compressors.top_k, compressors.scaled(compressors.qsgd(7))
    near, here, s, a = functools.partial, scales[:2], strategies, algorithms
    track, diffuse, coarse = s.gradient_tracking, s.diffusion_atc, "QSGD 4 bit"
    quantised = near(_reference, qsgd, 0.3)
    slow = near(s.exact_diffusion, dual_gain=0.1)  # than the copies catch up

    def first_order(
        message, inner, method="C²DFB", dense=False, outer=_dense, rounds=10, pace=1
    ):
        made = _c2dfb(inner, outer, rounds)
        return Entry(method, message, made, here, dense, pace)

    def local_inverse(method, make, *wires):
        made = _local_inverse(make, wires, scales.smoothness)
        return Entry(method, "dense", made, here, pace=4)

    def single(method, upper, lower, message="dense", wire=channels.exact):
        made = _single_loop(upper, lower, wire)
        return Entry(method, message, made, here, message == "dense", pace=10)

    return {
        "c2dfb": first_order("dense", _dense, dense=True),
        "c2dfb-top20": first_order("top 20 %", near(_reference, top(0.2), 0.3)),
        "c2dfb-top10": first_order("top 10 %", near(_reference, top(0.1), 0.15)),
        "c2dfb-qsgd4": first_order(coarse, quantised),
        "c2dfb-all-qsgd4": first_order("all QSGD 4 bit", quantised, outer=quantised),
        "c2dfb-k2-all-qsgd4": first_order(
            *("all QSGD 4 bit", quantised, "C²DFB, K = 2"),
            outer=quantised,
            rounds=2,
            pace=4,
        ),
        "c2dfb-nc": first_order(
            "top 20 %", near(_feedback, top(0.2), 0.3), method="C²DFB(nc)"
        ),
        "ma-dsbo": Entry("MA-DSBO", "dense", _ma_dsbo, here),
        "mdbo": local_inverse("MDBO", a.mdbo, "tracker_channel"),
        "dsbo": local_inverse("DSBO", a.dsbo),
        "gdsbo": local_inverse("GDSBO", a.gdsbo, "estimator_channel"),
        "d-soba": single("D-SOBA", diffuse, diffuse),
        "sparkle-gt": single("SPARKLE-GT", track, track),
        "sparkle-extra": single("SPARKLE-EXTRA", s.extra, s.extra),
        "sparkle-ed": single("SPARKLE-ED", s.exact_diffusion, s.exact_diffusion),
        "sparkle-ed-gt": single("SPARKLE-ED-GT", track, s.exact_diffusion),
        "d-soba-qsgd4": single("D-SOBA", diffuse, diffuse, "all QSGD 4 bit", quantised),
        "sparkle-ed-qsgd4": single(
            "SPARKLE-ED", slow, slow, "all QSGD 4 bit", quantised
        ),
    }
