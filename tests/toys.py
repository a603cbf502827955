"""Small problems and the parts the tests cross with one another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference

import dbojax as dbo

N, DX, DY = 6, 3, 5


@functools.cache
def task():
    """The heterogeneous quadratic, small."""
    return dbo.tasks.quadratic(n=N, dx=DX, dy=DY, seed=1)


def reference_nodes(task):
    """The same data for the NumPy twins."""
    a, b, c = (np.asarray(leaf) for leaf in task.batch.lower)
    targets = np.asarray(task.batch.upper)
    return [reference.Node(*parts) for parts in zip(a, b, c, targets, strict=True)]


def start(task, method):
    """Initial state with the task's start on every node."""
    return method.init(dbo.replicate(task.x0, task.n), dbo.replicate(task.y0, task.n))


# For thousands of small operations: here the compiler's work pays, see conftest.py.
THOROUGH = {"xla_backend_optimization_level": 2}


def run(method, task, steps, seed=0):
    """Final state and stacked metrics of a plain scan on the full batch."""

    def step(state, key):
        return method.step(key, state, task.batch)

    return _scan(step, task, method, steps, seed)


def _scan(step, task, method, steps, seed, options=None):
    """One program for the start and all steps: each eager line would be one more."""

    def scan(key):
        keys = jax.random.split(key, steps)
        return jax.lax.scan(step, start(task, method), keys)

    return jax.jit(scan, compiler_options=options)(jax.random.key(seed))


def hypergradient_norms(method, task, steps, seed=0, options=None):
    """True norm at the node mean of x after each step."""

    def step(state, key):
        state, _ = method.step(key, state, task.batch)
        return state, jnp.linalg.norm(task.exact.hypergradient(dbo.node_mean(state.x)))

    state, norms = _scan(step, task, method, steps, seed, options)
    return state, np.asarray(norms)


def compressors():
    """One of each kind that a reference-point channel takes."""
    c = dbo.compressors
    return {
        "identity": c.identity(),
        "top_k": c.top_k(0.4),
        "block_top_k": c.block_top_k(0.4),
        "random_k": c.scaled(c.random_k(0.4)),
        "strided_random_k": c.scaled(c.strided_random_k(0.4)),
        "qsgd": c.scaled(c.qsgd(16)),
        "sign": c.sign(),
        "float16": c.cast(jnp.float16),
        "top_k of qsgd": c.composed(c.top_k(0.6), c.scaled(c.qsgd(16))),
        "per_leaf": c.per_leaf(c.top_k(0.4)),
    }


def graphs():
    """One mixing matrix of each kind."""
    t = dbo.topology
    return {
        "ring": t.metropolis(t.ring(N)),
        "star": t.metropolis(t.star(N)),
        "complete": np.full((N, N), 1 / N),
        "exponential": t.uniform(t.exponential(N)),
        "erdos_renyi": t.metropolis(t.erdos_renyi(N, 0.5, seed=2)),
    }


def fits(part, other):
    """Whether a strategy or a channel takes the weights of a graph, or a compressor."""
    if part in (*SYMMETRIC_ONLY, *LOSSY):
        return other != "exponential"
    return part != "gradient_push" or other not in compressors()


def wire(strategy, w):
    """The exact channel that a strategy takes."""
    if strategy == "gradient_push":
        return dbo.channels.push(dbo.networks.fixed(w))
    return dbo.channels.exact(dbo.mixing.mixer(w))


def star_cover(first, second):
    """Pairs of names: all of `first` with one of `second`, and the other way round."""
    a, b = list(first), list(second)
    return [(x, b[0]) for x in a] + [(a[1], y) for y in b[1:]]


DUAL_GAIN = 0.1  # small enough for biased compressors
SYMMETRIC_ONLY = ("extra", "exact_diffusion", "nids")
LOSSY = ("changing", "changing_reference_point")  # a fifth of the links fails


def strategies():
    """Factories of every strategy: (channel, optimizer) -> Strategy."""
    s = dbo.strategies
    dual = {
        name: functools.partial(getattr(s, name), dual_gain=DUAL_GAIN)
        for name in SYMMETRIC_ONLY
    }
    return {
        "diffusion_cta": s.diffusion_cta,
        "diffusion_atc": s.diffusion_atc,
        "tracking": s.gradient_tracking,
        "tracking_semi_atc": s.gradient_tracking_semi_atc,
        "tracking_atc": s.gradient_tracking_atc,
        **dual,
        "gradient_push": s.gradient_push,
        "allreduce": s.allreduce,
        "moving_average": lambda channel, tx: s.moving_average(
            s.gradient_tracking(channel, tx), 0.5
        ),
    }


def steps(task, upper, lower):
    """Step sizes as shares of 1 / smoothness of Psi and of the local g."""
    psi = np.linalg.eigvalsh(jax.hessian(task.exact.value)(task.x0)).max()
    return upper / psi, lower / np.linalg.eigvalsh(task.batch.lower.a).max()


def single_loop(task, strategy, channel, upper_step, lower_step):
    """One strategy for all three variables, along the soba directions."""
    upper = strategy(channel, optax.sgd(upper_step))
    lower = strategy(channel, optax.sgd(lower_step))
    return dbo.algorithms.compose(
        task.problem,
        dbo.oracles.soba(task.problem),
        dbo.algorithms.Phase(x=upper, y=lower, z=lower),
    )
