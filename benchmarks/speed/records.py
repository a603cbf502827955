"""Lines of the tables: a figure against its floor, with quartiles and what it costs."""

from typing import NamedTuple

import jax
import numpy as np


class Options(NamedTuple):
    """How much is measured."""

    short: bool = False
    turns: int = 20

    def budget(self, seconds):
        """Seconds for a set of programs that take turns."""
        return seconds / 6 if self.short else seconds


class Target(NamedTuple):
    """A bound on the worst of some figures."""

    text: str
    limit: float
    figures: list  # of (value, case)
    at_least: bool = False

    @property
    def worst(self):
        pick = min if self.at_least else max
        return pick(self.figures)

    @property
    def met(self):
        value = self.worst[0]
        return value >= self.limit if self.at_least else value <= self.limit


def row(group, case, base, program, ratio, seconds, **more):
    """One line: ``ratio`` is to what ``base`` names, quartiles over the turns.

    ``group`` and ``case`` name the line: no two have both alike.
    """
    low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
    return {
        "group": group,
        "case": case,
        "against": base,
        "ratio": float(middle),
        "ratio low": float(low),
        "ratio high": float(high),
        "ms": 1e3 * float(np.median(seconds)),
        "turns": len(seconds),
        "compile s": program.compile_seconds if program else float("nan"),
        "operations": program.operations if program else float("nan"),
        "bytes": program.bytes if program else float("nan"),
        "temporary bytes": program.temporary if program else 0,
        **more,
    }


def copy_row(group, case, found, label, **more):
    """The line of what :func:`floors.against_floor` found under a label."""
    floor, other = (found[name][2] for name in ("floor", "other floor"))
    program, ratio, seconds = found[label]
    more["floor ms"] = 1e3 * float(np.median(floor))
    more["of the other floor"] = float(np.median(seconds / other))
    return row(group, case, "copy", program, ratio, seconds, **more)


def exponents(sizes, seconds):
    """Slope of log seconds over log size by least squares: one for each turn.

    Args:
        sizes: (k,).
        seconds: (k, turns).
    """
    logs = np.log(np.asarray(sizes, float))
    apart = logs - logs.mean()
    return apart @ np.log(np.asarray(seconds)) / (apart @ apart)


def power(number):
    """1e5 for 100000, 64 for 64."""
    exponent = len(str(number)) - 1
    short = number >= 1000 and number % 10**exponent == 0
    return f"{number // 10**exponent}e{exponent}" if short else str(number)


def normal(n, d, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, d), "float32")
