"""Hypergradients: time in gradients, and against the same mathematics by hand.

    python benchmarks/speed/estimators.py

The problem is that of `benchmarks/hypergradients.py`, which also holds other libraries
against them; the unit is one gradient of the lower level inside plain descent.
"""

import start

start.ready()

import functools

import floors
import hypergradients as study
import jax
import jax.numpy as jnp
import numpy as np
from records import row

DEPTH, SHORT = 100, ("reverse", "cg", "hessian_free")


def plain(x, y, batch):
    """One gradient step of the lower level."""
    return y - study.STEP * jax.grad(study.lower, 1)(x, y, batch.lower)


def gradient(carry, i):
    x, y, batch, grad = carry
    del i
    return x, plain(x, y, batch), batch, grad


def estimate(function):
    """An estimate at x and y as they are; the gradient of the last one moves nothing.

    Its sum is added to x so that the loop has to compute it.
    """

    def step(carry, i):
        del i
        x, y, batch, grad = carry
        grad = function(x + 1e-20 * grad, y, batch)[0]
        return x, y, batch, grad

    return step


def contenders(names):
    found = {}
    for name in names:
        found[name, "dbojax"] = study.ours(name, DEPTH)
        if name in study.HAND:
            found[name, "by hand"] = functools.partial(study.HAND[name], steps=DEPTH)
    return found


def rows(options):
    functions = contenders(SHORT if options.short else study.OURS)
    args = study.arguments(jnp.float32)
    carry = *args, jnp.zeros_like(args[0])
    steps = {"gradient": (gradient, carry)}
    steps |= {at: (estimate(function), carry) for at, function in functions.items()}
    found = floors.measured(steps, options.turns, options.budget(25))
    unit, lines = found["gradient"][1], []
    for (name, who), function in functions.items():
        program, seconds = found[name, who]
        case = f"{name}, {who}, {DEPTH} steps"
        line = row("hypergradients", case, "gradient", program, seconds / unit, seconds)
        hand = found.get((name, "by hand"))
        if who == "dbojax" and hand:
            share = seconds / hand[1]
            line["of by hand"] = float(np.median(share))
            line["of by hand, low"] = float(np.quantile(share, 0.25))
            line["operations of by hand"] = program.operations / hand[0].operations
            line["bytes of by hand"] = program.bytes / hand[0].bytes
            line["gap to by hand"] = gap(function, functions[name, "by hand"], args)
        lines.append(line)
    return lines


def gap(ours, other, args):
    """Relative distance of two hypergradients."""
    a, b = (jax.jit(function)(*args)[0] for function in (ours, other))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


if __name__ == "__main__":
    import run

    raise SystemExit(run.alone("hypergradients"))
