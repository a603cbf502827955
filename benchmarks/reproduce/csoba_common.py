"""What the parts of the benchmark share: the methods, what is watched, and tables."""

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import dbojax as dbo


def uncompressed(problem, n):
    """Label -> factory of (upper_step, lower_step)."""
    mix = dbo.mixing.averaging(n)

    def with_steps(method):
        return lambda upper, lower: method(
            problem, mix=mix, upper_step=upper, lower_step=lower
        )

    a = dbo.algorithms
    return {"SOBA": with_steps(a.soba), "MA-SOBA": with_steps(a.ma_soba)}


def compressed(problem, n, compressor):
    """The same for the methods with one compressor on both levels."""
    mix = dbo.mixing.averaging(n)

    def with_steps(method):
        return lambda upper, lower: method(
            problem,
            mix=mix,
            upper=compressor,
            lower=compressor,
            upper_step=upper,
            lower_step=lower,
        )

    a = dbo.algorithms
    return {
        "C-SOBA": with_steps(a.c_soba),
        "CM-SOBA": with_steps(a.cm_soba),
        "EF-SOBA": with_steps(a.ef_soba),
    }


def sampled(method, draw):
    """A method that draws its own batch in each step, of what it gets as a batch."""

    def step(key, state, data):
        key_batch, key = jax.random.split(key)
        return method.step(key, state, draw(key_batch, data))

    return method._replace(step=step)


def slope_of(task):
    """(H, q) such that the true hypergradient of a quadratic task is ``H x + q``."""
    zero = jnp.zeros_like(task.x0)
    exact = task.exact.hypergradient
    return jax.jacobian(exact)(zero), exact(zero)


def watched(method, slope):
    """A method whose metrics hold the norm of the true hypergradient after the step."""

    def step(key, state, batch):
        state, metrics = method.step(key, state, batch)
        h, q = slope
        # All workers hold the same x after an exchange with a server.
        return state, metrics._replace(
            hypergrad_norm=jnp.linalg.norm(h @ state.x[0] + q)
        )

    return method._replace(step=step)


def stacked(trees):
    """One tree with an axis of runs in front."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def starts(task, runs):
    """The start of all workers of all runs."""
    n = task.n
    return [dbo.replicate(dbo.replicate(v, n), runs) for v in (task.x0, task.y0)]
