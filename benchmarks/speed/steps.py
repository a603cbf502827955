"""Whole steps: every method on one problem, in gradients and in copies of its state.

    python benchmarks/speed/steps.py

Eight nodes, binary logistic regression with one regularisation weight per entry. The
unit is one gradient of both levels, over x and y, all nodes and all samples. Operations
and bytes count the body of an inner loop once, however often it runs.
"""

import start

start.ready()

import floors
import jax
import jax.numpy as jnp
import numpy as np
import optax
from records import power, row

import dbojax as dbo

NODES, SAMPLES = 8, 32
LENGTHS = [100, 10_000]
STEP = 1e-3
SHORT = ("C2DFB, block top-k 1 %", "SOBA", "D-SOBA")
a, c = dbo.algorithms, dbo.compressors


def loss(y, samples):
    inputs, signs = samples
    return jnp.mean(dbo.tasks.logistic_loss(signs * (inputs @ y)))


def upper(x, y, samples):
    del x
    return loss(y, samples)


def lower(x, y, samples):
    return loss(y, samples) + 0.5 * jnp.sum(jnp.exp(x) * y**2)


PROBLEM = dbo.Problem(upper, lower)


def data(d):
    """A batch of all samples, node axis first."""
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def level():
        inputs = jax.random.normal(next(keys), (NODES, SAMPLES, d)) / d**0.5
        return inputs, jax.random.rademacher(
            next(keys), (NODES, SAMPLES), dtype=jnp.float32
        )

    return dbo.Batch(level(), level())


def numbered(batch):
    """An eighth of the samples, which tell who they are; SABA remembers the others."""
    drawn = SAMPLES // 8
    places = jnp.tile(jnp.arange(drawn, dtype=jnp.int32), (NODES, 1))
    sizes = jnp.full(NODES, SAMPLES, jnp.int32)
    few = jax.tree.map(lambda leaf: leaf[:, :drawn], batch)
    return dbo.Batch(*(dbo.Indexed(places, part, sizes) for part in few))


def over_graph():
    """Label -> method whose nodes talk to neighbours on a ring."""
    mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(NODES)))
    wire, s = dbo.channels.exact(mix), dbo.strategies
    both = {"upper_step": STEP, "lower_step": STEP}

    def c2dfb(inner):
        return a.c2dfb(PROBLEM, outer=wire, inner=inner, **both)

    def sparkle(rule):
        levels = {"upper": rule, "lower": rule}
        wires = {"upper_channel": wire, "lower_channel": wire}
        return a.sparkle(PROBLEM, **levels, **wires, **both)

    block = dbo.channels.reference_point(mix, c.block_top_k(0.01), 0.1)
    quantised = dbo.channels.reference_point(mix, c.scaled(c.qsgd(7)), 0.1)
    return {
        "C2DFB, dense": c2dfb(wire),
        "C2DFB, block top-k 1 %": c2dfb(block),
        "C2DFB, QSGD": c2dfb(quantised),
        "MA-DSBO": a.ma_dsbo(PROBLEM, channel=wire, linear_step=STEP, **both),
        "MDBO": a.mdbo(
            PROBLEM, channel=wire, tracker_channel=wire, smoothness=4.0, **both
        ),
        "D-SOBA": a.d_soba(PROBLEM, channel=wire, **both),
        "SPARKLE, tracking": sparkle(s.gradient_tracking),
        "SPARKLE, EXTRA": sparkle(s.extra),
        "SPARKLE, exact diffusion": sparkle(s.exact_diffusion),
    }


def over_server():
    """Label -> method with a server."""
    mix = dbo.mixing.averaging(NODES)
    both = {"upper_step": STEP, "lower_step": STEP}
    share = {"upper": c.random_k(0.1), "lower": c.random_k(0.1)}
    h = dbo.hypergradients
    inner = h.descent(PROBLEM, optax.sgd(STEP), 10)
    scalars = h.forward_scalars(PROBLEM, inner, 8)
    return {
        "SOBA": a.soba(PROBLEM, mix=mix, **both),
        "SABA, an eighth of the samples": a.saba(
            PROBLEM, mix=mix, num_upper=SAMPLES, num_lower=SAMPLES, **both
        ),
        "MA-SOBA": a.ma_soba(PROBLEM, mix=mix, **both),
        "C-SOBA, random-k 10 %": a.c_soba(PROBLEM, mix=mix, **share, **both),
        "EF-SOBA, random-k 10 %": a.ef_soba(PROBLEM, mix=mix, **share, **both),
        "(FG)2U, shared directions": a.fg2u_shared(
            PROBLEM, scalars, dbo.channels.server(mix), STEP
        ),
    }


def with_submodels(d):
    units = dbo.submodels.layout(jnp.ones(d), jnp.ones(d), "unit", "unit")
    fleet = dbo.submodels.fleet(units, [1.0, 0.5] * (NODES // 2))
    both = {"upper_step": STEP, "lower_step": STEP, "extracted": False}
    return {
        "RAFBO, half of the nodes at half size": a.rafbo(PROBLEM, fleet, **both),
        "RABO, half of the nodes at half size": a.rabo(PROBLEM, fleet, **both),
    }


def stepping(method):
    """A step on a batch that stays: ``((state, batch), i)``."""

    def step(carry, i):
        state, batch = carry
        state, _ = method.step(jax.random.fold_in(jax.random.key(1), i), state, batch)
        return state, batch

    return step


def cd_adam(batch, d):
    """One level with AMSGrad on sign messages, both ways."""
    tx = dbo.optim.cd_adam(STEP, dbo.mixing.averaging(NODES), c.sign())

    def step(carry, i):
        del i
        y, state, batch = carry
        gradients = jax.vmap(jax.grad(loss), (None, 0))(y, batch.lower)
        moves, state = tx.update(gradients, state, y)
        return optax.apply_updates(y, moves), state, batch

    y = jnp.zeros(d)
    return step, (y, tx.init(y), batch), (y, tx.init(y))


def gradient(carry, i):
    """One gradient of both levels, over x and y and all nodes."""
    del i

    def both(x, y, batch):
        return upper(x, y, batch.upper) + lower(x, y, batch.lower)

    x, y, batch = carry
    moves = jax.vmap(jax.grad(both, (0, 1)))(x, y, batch)
    x, y = (v - STEP * move for v, move in zip((x, y), moves, strict=True))
    return x, y, batch


def contenders(d, options):
    """Label -> (step, carry, what persists from step to step)."""
    batch, one = data(d), jnp.zeros(d)
    stacked = dbo.replicate(one, NODES)
    found = {}
    for label, method in (over_graph() | over_server()).items():
        state = method.init(stacked, stacked)
        given = numbered(batch) if "SABA" in label else batch
        found[label] = stepping(method), (state, given), state
    for label, method in with_submodels(d).items():
        own = "RABO" in label
        state = method.init(one[None], stacked if own else one[None])
        found[label] = stepping(method), (state, batch), state
    found["CD-Adam, sign"] = cd_adam(batch, d)
    names = SHORT if options.short else found
    return {label: found[label] for label in names}


def floats(tree):
    """The leaves that take part in the floor."""
    leaves = jax.tree.leaves(tree)
    return [v for v in leaves if jnp.issubdtype(v.dtype, jnp.floating) and v.ndim]


def measure(d, options):
    parts = contenders(d, options)
    stacked = dbo.replicate(jnp.zeros(d), NODES)
    steps = {"gradient": (gradient, (stacked, stacked, data(d)))}
    for label, (step, carry, state) in parts.items():
        steps[label] = step, carry
        steps[label, "copy"] = floors.copy_step, floats(state)
    found = floors.measured(steps, options.turns, options.budget(25))
    unit = found["gradient"][1]
    for label, (_, _, state) in parts.items():
        program, seconds = found[label]
        case = f"{label}, n={NODES}, d={power(d)}"
        line = row("steps", case, "gradient", program, seconds / unit, seconds)
        line |= {"method": label, "nodes": NODES, "length": d}
        copies = seconds / found[label, "copy"][1]
        line["of a copy of its state"] = float(np.median(copies))
        line["state bytes"] = dbo.trees.nbytes(floats(state))
        yield line


def rows(options):
    lengths = LENGTHS[:1] if options.short else LENGTHS
    return [line for d in lengths for line in measure(d, options)]


if __name__ == "__main__":
    import run

    raise SystemExit(run.alone("steps"))
