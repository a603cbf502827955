"""Channels over a mesh, and programs that use them again and again."""

import jax
import jax.numpy as jnp
import numpy as np

import dbojax as dbo

C, K, T = dbo.channels, dbo.compressors, dbo.topology
GAMMA = 0.3
COMPRESSORS = {
    "dense": None,
    "top-k 1 %": K.top_k(0.01),
    "block top-k 1 %": K.block_top_k(0.01),
    "random-k 1 %": K.scaled(K.random_k(0.01)),
    "strided random-k 1 %": K.scaled(K.strided_random_k(0.01)),
    "sign": K.sign(),
    "QSGD, 4 bits": K.scaled(K.qsgd(7)),
    "natural": K.scaled(K.natural()),
    "float16": K.cast(jnp.float16),
    "bfloat16": K.cast(jnp.bfloat16),
    "top-k 5 % of QSGD": K.composed(K.top_k(0.05), K.scaled(K.qsgd(7))),
}
GRAPHS = {
    "ring": lambda n: T.metropolis(T.ring(n)),
    "torus": lambda n: T.metropolis(
        T.torus(2, n // 2) if n < 16 else T.torus(4, n // 4)
    ),
    "exponential": lambda n: T.uniform(T.exponential(n)),
    "Erdős–Rényi": lambda n: T.metropolis(T.erdos_renyi(n, 0.4, seed=3)),
}


def channel(compressor, mix):
    found = COMPRESSORS[compressor]
    return C.exact(mix) if found is None else C.reference_point(mix, found, GAMMA)


def program(compressor, graph, n, entries, trips):
    """A compiled loop of exchanges, its arguments and what one exchange costs."""
    mesh = dbo.devices.mesh(n)
    mix = dbo.mixing.mixer(GRAPHS[graph](n))
    exchange = channel(compressor, dbo.devices.spread(mix, mesh))

    def read(node):
        draws = np.random.default_rng(node).standard_normal(entries)
        return draws.astype(np.float32)

    v = dbo.devices.load(read, n, mesh)
    # The same program for all processes; a state may be small where nothing is kept.
    state = dbo.devices.place(jax.jit(exchange.init)(v), mesh, n)

    def run(v, state, key):
        def body(carry, key):
            held, state, traffic = exchange.send(key, *carry)
            return (held, state), traffic

        carry, traffic = jax.lax.scan(body, (v, state), jax.random.split(key, trips))
        return *carry, traffic

    arguments = v, state, jax.random.key(0)
    compiled = jax.jit(run).lower(*arguments).compile()
    traffic = jax.eval_shape(run, *arguments)[-1]
    return compiled, arguments, traffic, dbo.devices.crossings(mix, mesh), mix
