"""Every algorithm on one small problem, for runs on one device and on many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dbojax as dbo

N, DX, DY = 8, 3, 5
A, C, S, H = dbo.algorithms, dbo.channels, dbo.strategies, dbo.hypergradients
TOP = dbo.compressors.top_k(0.4)
QSGD = dbo.compressors.qsgd(16)
# Their server takes a mean over devices, which an all-reduce may round another way.
MEANS = (
    *("soba", "saba", "ma_soba", "c_soba", "cm_soba", "ef_soba", "ef21", "ef14"),
    *("fg2u_shared", "fg2u_own"),
    *("rabo", "rafbo", "fednest", "fedbio", "simfbo", "shrofbo"),
)
STEPS = {"upper_step": 0.02, "lower_step": 0.1}


@functools.cache
def task():
    return dbo.tasks.quadratic(n=N, dx=DX, dy=DY, seed=1)


def graph():
    return dbo.topology.metropolis(dbo.topology.erdos_renyi(N, 0.4, seed=2))


def batch(name):
    """What all nodes see; `saba` has to know which sample it is."""
    whole = task().batch
    if name != "saba":
        return whole

    def only(part):
        one = jax.tree.map(lambda leaf: leaf[:, None], part)
        number, size = jnp.zeros((N, 1), jnp.int32), jnp.ones(N, jnp.int32)
        return dbo.Indexed(number, one, size)

    return dbo.Batch(*map(only, whole))


def over_samples(objective):
    """The mean over samples, which are the first axis of what one node sees."""

    def mean(x, y, samples):
        return jax.vmap(objective, (None, None, 0))(x, y, samples).mean()

    return mean


def one_row(x0, y0):
    return x0[None], y0[None]


def all_rows(x0, y0):
    return dbo.replicate(x0, N), dbo.replicate(y0, N)


def _gossip(spread):
    """Channels over a graph."""
    mix = spread(dbo.mixing.mixer(graph()))
    away = spread(dbo.networks.lossy(dbo.networks.fixed(graph()), 0.2))
    circle = dbo.topology.one_peer_exponential(N)
    turns = spread(dbo.networks.sequence(circle))
    return {
        "exact": C.exact(mix),
        "top_k": C.reference_point(mix, TOP, 0.3),
        "qsgd": C.reference_point(mix, dbo.compressors.scaled(QSGD), 0.3),
        "feedback": C.error_feedback(mix, TOP, 0.3),
        "lossy": C.changing(away),
        "lossy_top_k": C.changing_reference_point(away, TOP, 0.3),
        "turns": C.changing(turns),
        "push": C.push(turns),
    }


def _loop(strategy, channel):
    moves = (strategy(channel, optax.sgd(step)) for step in (0.02, 0.1, 0.1))
    return A.single_loop(task().problem, **dict(zip("xyz", moves, strict=True)))


def methods(spread):
    """Name -> (algorithm, start), with every mix and network handed to ``spread``."""
    problem = task().problem
    sampled = dbo.Problem(*map(over_samples, problem))
    channels = _gossip(spread)
    exact, top = channels["exact"], channels["top_k"]
    mean = spread(dbo.mixing.averaging(N))
    server = {"mix": mean, **STEPS}
    compressed = {**server, "upper": QSGD, "lower": QSGD}
    units = dbo.submodels.coordinates(jnp.ones(DX), jnp.ones(DY))
    fleet = dbo.submodels.fleet(units, [1.0] * 4 + [0.5] * 4, participants=5)
    inner = H.descent(problem, optax.sgd(0.1), steps=4)
    scalars = H.forward_scalars(problem, inner, 2, chunk=1)
    bound = {**STEPS, "smoothness": 5.0, "terms": 3}
    own = H.neumann(problem, steps=3, inner=inner)
    over_graphs = {
        "c2dfb": A.c2dfb(problem, outer=exact, inner=top, inner_steps=3, **STEPS),
        "c2dfb_qsgd": A.c2dfb(
            problem, outer=exact, inner=channels["qsgd"], inner_steps=3, **STEPS
        ),
        "d_soba": A.d_soba(problem, channel=exact, **STEPS),
        "sparkle": A.sparkle(
            problem,
            upper=S.extra,
            lower=S.exact_diffusion,
            upper_channel=exact,
            lower_channel=exact,
            **STEPS,
        ),
        "ma_dsbo": A.ma_dsbo(problem, channel=exact, linear_step=0.1, **STEPS),
        "mdbo": A.mdbo(problem, channel=exact, tracker_channel=top, **bound),
        "dsbo": A.dsbo(problem, channel=exact, **bound),
        "gdsbo": A.gdsbo(problem, channel=exact, estimator_channel=top, **bound),
        "dual_compressed": _loop(functools.partial(S.extra, dual_gain=0.1), top),
        "nids": _loop(S.nids, channels["feedback"]),
        "lossy": _loop(S.gradient_tracking, channels["lossy"]),
        "lossy_top_k": _loop(S.gradient_tracking_atc, channels["lossy_top_k"]),
        "turns": _loop(S.diffusion_atc, channels["turns"]),
        "gradient_push": _loop(S.gradient_push, channels["push"]),
        "personal": A.personal(problem, own, S.gradient_tracking(top, optax.sgd(0.02))),
    }
    with_server = {
        "soba": A.soba(problem, participants=5, **server),
        # One sample each, so that its tables hold a gradient.
        "saba": A.saba(sampled, num_upper=1, num_lower=1, **server),
        "ma_soba": A.ma_soba(problem, **server),
        "c_soba": A.c_soba(problem, participants=5, **compressed),
        "cm_soba": A.cm_soba(problem, downlink=QSGD, **compressed),
        "ef_soba": A.ef_soba(problem, **compressed),
        "ef21": _loop(S.allreduce, C.ef21(mean, TOP, TOP)),
        "ef14": _loop(S.allreduce, C.ef14(mean, TOP)),
        "fg2u_shared": A.fg2u_shared(problem, scalars, C.server(mean), 0.02),
        "fg2u_own": A.fg2u_own(problem, scalars, mean, 0.02),
    }
    federated = {
        "rabo": A.rabo(problem, fleet, extracted=False, **STEPS),
        "rafbo": A.rafbo(problem, fleet, extracted=False, local_steps=2, **STEPS),
        "fednest": A.fednest(problem, fleet, extracted=False, **STEPS),
        "fedbio": A.fedbio(problem, fleet, extracted=False, uplink=TOP, **STEPS),
        "simfbo": A.simfbo(problem, fleet, extracted=False, local_steps=2, **STEPS),
        "shrofbo": A.shrofbo(problem, fleet, extracted=False, **STEPS),
    }
    starts = all_rows(task().x0, task().y0), one_row(task().x0, task().y0)
    found = {k: (m, starts[0]) for k, m in (over_graphs | with_server).items()}
    return found | {k: (m, starts[1]) for k, m in federated.items()}


def end(method, start, batch, mesh, steps=3):
    """State and metrics after a few steps on a mesh."""

    def load(tree):
        """Each process's own nodes; a start of one row is the same for all."""
        if len(jax.tree.leaves(tree)[0]) != N:
            return jax.tree.map(np.asarray, tree)
        rows = jax.tree.map(np.asarray, tree)
        return dbo.devices.load(
            lambda node: jax.tree.map(lambda leaf: leaf[node], rows), N, mesh
        )

    @jax.jit
    def run(x, y, batch, key):
        def body(state, key):
            return method.step(key, state, batch)

        return jax.lax.scan(body, method.init(x, y), jax.random.split(key, steps))

    return run(*map(load, start), load(batch), jax.random.key(0))
