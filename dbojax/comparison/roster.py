"""Who takes part: methods with their messages, as plain entries of a dictionary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from dbojax import algorithms, channels, compressors
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


def _c2dfb(inner: Callable[[Mix], Channel]):
    def make(mix, problem, steps):
        return algorithms.c2dfb(
            problem,
            outer=channels.exact(mix, gamma=0.6),
            inner=inner(mix),
            penalty=10.0,
            inner_steps=10,
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


def roster(scales: Scales = _ANY) -> dict[str, Entry]:
    """Everybody who takes part, by a short name; extend or cut it like any dictionary.

    Args:
        scales: of the task; the centres of the grids of step sizes.

    Examples:
        >>> entries = roster()
        >>> entries["c2dfb-top20"].label, entries["ma-dsbo"].dense
        ('C²DFB, top 20 %', True)
    """
    top, qsgd = compressors.top_k, compressors.scaled(compressors.qsgd(7))
    near, here = functools.partial, (scales.upper, scales.lower)

    def first_order(message, inner, method="C²DFB", dense=False):
        return Entry(method, message, _c2dfb(inner), here, dense)

    return {
        "c2dfb": first_order("dense", _dense, dense=True),
        "c2dfb-top20": first_order("top 20 %", near(_reference, top(0.2), 0.3)),
        "c2dfb-top10": first_order("top 10 %", near(_reference, top(0.1), 0.15)),
        "c2dfb-qsgd4": first_order("QSGD 4 bit", near(_reference, qsgd, 0.3)),
        "c2dfb-nc": first_order(
            "top 20 %", near(_feedback, top(0.2), 0.3), method="C²DFB(nc)"
        ),
        "ma-dsbo": Entry("MA-DSBO", "dense", _ma_dsbo, here),
    }
