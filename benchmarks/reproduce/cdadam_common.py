"""What both parts share: the methods, their bytes, and tables."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
import optax

matplotlib.use("Agg")

import dbojax as dbo

B1, B2 = 0.9, 0.99


class Method(NamedTuple):
    """An optimiser for each rate of a grid, and how many of its steps are dense."""

    make: Callable  # rate -> optax transform
    rates: tuple
    freeze: int = 0


def over(channel, rates, steps):
    """AMSGrad on what a channel delivers."""

    def make(rate):
        return optax.chain(
            dbo.communicate(channel),
            dbo.optim.scale_by_amsgrad(B1, B2),
            optax.scale_by_learning_rate(dbo.optim.two_step_decay(rate, steps)),
        )

    return Method(make, rates)


def cd_adam(mix, compressor, rates, steps):
    def make(rate):
        decayed = dbo.optim.two_step_decay(rate, steps)
        return dbo.optim.cd_adam(decayed, mix, compressor, b1=B1, b2=B2)

    return Method(make, rates)


def one_bit(optimizer, mix, rates, steps):
    """Dense for 13 of 200 parts of the run, as in the authors' settings."""
    freeze = max(1, 13 * steps // 200)

    def make(rate):
        decayed = dbo.optim.two_step_decay(rate, steps)
        return optimizer(decayed, mix, freeze, b1=B1, b2=B2)

    return Method(make, rates, freeze)


def adaptive(mix, rates, steps):
    """Label -> method; all of them take Adam's rates."""
    c, o, sign = dbo.channels, dbo.optim, dbo.compressors.sign()
    return {
        "AMSGrad, dense": over(c.server(mix), rates, steps),
        "CD-Adam, sign": cd_adam(mix, sign, rates, steps),
        "EF, sign": over(c.ef14(mix, sign, sign), rates, steps),
        "naive, sign": over(c.server(mix, sign, sign), rates, steps),
        "1-bit Adam": one_bit(o.one_bit_adam, mix, rates, steps),
        "1-bit Adam on gradients": one_bit(
            o.one_bit_adam_on_gradients, mix, rates, steps
        ),
    }


def sent(method, params):
    """Bytes of one worker, (up, down), as a function of the steps taken.

    They are those of the arrays that travel, asked of the state of the optimiser.
    """
    state = jax.eval_shape(method.make(1.0).init, params)
    later = optax.tree.get(state, "traffic")
    early = optax.tree.get(state, "warmup_traffic", later)

    def after(steps):
        dense = np.minimum(steps, method.freeze)
        up = early.message * dense + later.message * (steps - dense)
        down = early.down * dense + later.down * (steps - dense)
        return up, down

    return after


def short(number):
    """A count with three digits, or what stands for infinity."""
    if not np.isfinite(number):
        return "never"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
