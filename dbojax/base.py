"""The contracts that every part of dbojax meets; nothing here computes an algorithm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Tree = Any  # any pytree of arrays
State = Any  # a part's memory: a pytree that the part alone understands
Payload = Any  # the arrays that cross a link, in the dtypes in which they cross it


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Traffic:
    """What crossed the links, in bytes: exact Python integers, never traced.

    ``a | b`` puts two messages into the same packets (rounds do not add up), ``a + b``
    sends one after the other, ``a * k`` repeats.

    Args:
        message: bytes that one node hands to one link; a worker's to its server.
        total: bytes summed over all directed links.
        rounds: synchronous communication rounds.
        down: bytes that a server hands to one worker.

    Examples:
        >>> one = Traffic(message=8, total=160, rounds=1)
        >>> (one | one).rounds, (one + one).rounds, (one * 3).total
        (1, 2, 480)
    """

    message: int = 0
    total: int = 0
    rounds: int = 0
    down: int = 0

    def __or__(self, other: Traffic) -> Traffic:
        rounds = max(self.rounds, other.rounds)
        return dataclasses.replace(self + other, rounds=rounds)

    def __add__(self, other: Traffic) -> Traffic:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Traffic(*(a + b for a, b in pairs))

    def __mul__(self, times: int) -> Traffic:
        return Traffic(*(value * times for value in dataclasses.astuple(self)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Calls:
    """Oracle calls of one node: exact Python integers, never traced.

    Args:
        gradients: gradients of one objective in one variable.
        products: products of a vector with a block of second derivatives.
        tangents: directions pushed through one step of an inner solver, or through the
            whole of one that does not tell its steps.
        solves: runs of an inner solver.
    """

    gradients: int = 0
    products: int = 0
    tangents: int = 0
    solves: int = 0

    def __add__(self, other: Calls) -> Calls:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Calls(*(a + b for a, b in pairs))

    def __mul__(self, times: int) -> Calls:
        return Calls(*(value * times for value in dataclasses.astuple(self)))


class Cost(NamedTuple):
    """What was really called, where it may depend on data: int32 scalars."""

    gradients: jax.Array  # each counts what its namesake in `Calls` counts
    products: jax.Array
    tangents: jax.Array
    solves: jax.Array


class Problem(NamedTuple):
    """A bilevel problem as one node sees it.

    ``min_x mean_i f_i(x, y*(x))`` subject to ``y*(x) = argmin_y mean_i g_i(x, y)``;
    node ``i`` differs from node ``j`` by its batch alone.
    """

    upper: Callable[[Tree, Tree, Tree], jax.Array]  # f(x, y, batch) -> scalar
    lower: Callable[[Tree, Tree, Tree], jax.Array]  # g(x, y, batch) -> scalar


class Batch(NamedTuple):
    """Independent samples for the two levels; leaves have the node axis first.

    The upper objective sees ``upper`` alone and the lower one ``lower``. Any other
    batch goes whole to both.
    """

    upper: Tree
    lower: Tree


class Indexed(NamedTuple):
    """Samples that tell which of a node's samples they are, for parts that remember.

    Objectives see ``data`` alone.
    """

    indices: jax.Array  # (b,), distinct positions in the node's data
    data: Tree  # leaves (b, ...)
    size: jax.Array  # scalar, how many samples the node has; padding does not count


def split_levels(batch: Tree) -> tuple[Tree, Tree]:
    """The upper and the lower level's part of a batch, as they were drawn."""
    return tuple(batch) if isinstance(batch, Batch) else (batch, batch)


def by_level(batch: Tree) -> tuple[Tree, Tree]:
    """What the upper and the lower objective see of a batch.

    Examples:
        >>> by_level(Batch(upper=1, lower=2)), by_level(3)
        ((1, 2), (3, 3))
        >>> by_level(Batch(upper=Indexed(indices=0, data=1, size=9), lower=2))
        (1, 2)
    """
    upper, lower = (
        part.data if isinstance(part, Indexed) else part for part in split_levels(batch)
    )
    return upper, lower


class Rounds(NamedTuple):
    """A batch for the single phases of a step, and a fresh one per repeated round."""

    outer: Tree  # node axis first
    inner: Tree  # (rounds, nodes, ...)


class Compressor(NamedTuple):
    """How one node's tree becomes a message and is read again.

    ``payload`` is the wire format: exactly the arrays that cross a link.
    """

    init: Callable[[Tree], State]
    compress: Callable[[jax.Array, Tree, State], tuple[Payload, State]]
    decompress: Callable[[Payload, Tree], Tree]  # (payload, like) -> v
    # (payload, scale, into) -> into + scale * v at the payload's cost, where that is
    # less than the cost of a dense v; zeros for a payload add nothing. None:
    # decompress, then add.
    add: Callable[[Payload, jax.Array, Tree], Tree] | None = None
    # E|C(v) - v|^2 <= (1 - delta(d)) |v|^2, as a function of the length d.
    delta: Callable[[int], float] | None = None
    # E C(v) = v and E|C(v) - v|^2 <= omega(d) |v|^2.
    omega: Callable[[int], float] | None = None
    # (payloads, scales, into): `add` for K messages at once, leaves (K, ...), scales
    # (K,), where that is quicker; None: one after the other.
    add_all: Callable[[Payload, jax.Array, Tree], Tree] | None = None


class Mix(NamedTuple):
    """Multiplication by a mixing matrix ``W``, and what travels for it."""

    # apply(v) = W v;  apply(payload, decode) = W decode(payload), where the payload
    # is what travels and ``decode`` acts on one node's payload.
    apply: Callable[..., Tree]
    # (n, ...) -> (n, K, ...): the payloads of each node's neighbours, itself included.
    exchange: Callable[[Payload], Payload]
    weights: jax.Array  # (n, K), the entries of W that belong to `exchange`
    heard: np.ndarray  # (n, K), int: the numbers of the nodes that `exchange` brings
    links: int  # directed edges that carry a message
    lift: Callable[[Callable], Callable]  # f on one node -> f on the node axis
    # Numbers of the nodes on axis 0, from 0; fewer than K inside `shard_map`.
    nodes: Callable[[], jax.Array]
    # Whether `apply` may act on what the nodes hold, not only on what they send.
    local: bool = True
    averages: bool = False  # whether `apply` gives every node the mean
    symmetric: bool = True  # whether W is known to be, or is traced
    # flow(v) = W v - v, taken from differences, so that rounding errors vanish with
    # the disagreement, or flow(payload, decode); None where that cannot be had.
    flow: Callable[..., Tree] | None = None
    # towards(v, gamma, hat) = v + gamma (W hat - hat) in one go, where hat is v unless
    # given; None: there is no quicker way.
    towards: Callable[..., Tree] | None = None


class Network(NamedTuple):
    """A graph whose weights may change from exchange to exchange.

    Its slots are those of all links that there ever are, both ways. Slot 0 of node
    ``i`` is ``i`` itself, then come those whom it hears and those who only hear it;
    what is left over is filled with ``i`` at weight zero.
    """

    nodes: np.ndarray  # (n, K), int32: who is in the slots of each node
    reverse: np.ndarray  # (n, K), int32: the slot of i at nodes[i, k]
    # (key, step) -> (n, K), the entries of W in these slots. Columns of W sum to one,
    # and every node keeps a part of its own.
    weights: Callable[[jax.Array, jax.Array], jax.Array]
    # Directed links that get a message in an exchange, the busiest one where they
    # differ; lost messages count, for they were sent.
    links: int
    heard: int  # slots, the first ones, that ever have a weight
    symmetric: bool  # whether every W is
    doubly: bool  # whether the rows of every W sum to one as well
    # (T, n, K), bool: the slots that may have a weight at steps 0 to T - 1, then anew.
    turns: np.ndarray
    # total(v, weights, step, apart=False, decode=None) = sum_k w_ik v_j over the heard
    # slots, (n, ...); of v_j - v_i if apart, of decode(v_j) if v is what travels.
    total: Callable[..., Tree]
    # swap(tree, step=None), (n, K - 1, ...) without oneself: what the node at the other
    # end of each link that is up at this step, or of all, has in its slot of it.
    swap: Callable[..., Tree]
    lift: Callable[[Callable], Callable]  # f on one node -> f on the node axis


class Clock(NamedTuple):
    """Exchanges that a channel has seen; goes on where memories are forgotten."""

    step: jax.Array  # int32


class Channel(NamedTuple):
    """How the values of all nodes travel: one exchange."""

    # `known` is common knowledge at the start: a variable's start, zeros for trackers.
    init: Callable[[Tree], State]
    # send(key, v, state, mask=None) -> (what each node holds then, state, Traffic)
    send: Callable[..., tuple[Tree, State, Traffic]]
    mix: Mix | None = None  # what it was built on, where that stays as it is
    # Whether all nodes hold the same, an estimate of the mean, after `send`.
    averages: bool = False
    # Whether it keeps sums but no values, so that equal ones do not stay equal: for
    # `gradient_push` alone.
    pushes: bool = False
    network: Network | None = None  # what it was built on, where that may change
    # As `send`, but returns what each node moves by; sums to zero over the nodes, also
    # when rounded, as nodes agree. None where the mean that comes back is an estimate.
    flow: Callable[..., tuple[Tree, State, Traffic]] | None = None


class Strategy(NamedTuple):
    """How one decentralised variable moves along local directions and agrees."""

    init: Callable[[Tree], State]
    # update(key, v, direction, state, mask=None) -> (v, state, Traffic)
    update: Callable[..., tuple[Tree, State, Traffic]]
    # f on one node -> f on the node axis, where the channel's nodes live.
    lift: Callable[[Callable], Callable] = jax.vmap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Participation:
    """Which workers take part in a round; a mask for server channels."""

    mask: jax.Array  # (n,), bool
    count: int = dataclasses.field(metadata={"static": True})


class Oracle(NamedTuple):
    """Local directions of the three variables at one node."""

    init: Callable[[Tree, Tree], tuple[Tree, State]]  # (x, y) -> (z, memory)
    # (key, x, y, z, memory, batch) -> ((d_x, d_y, d_z), memory)
    directions: Callable[..., tuple[tuple[Tree, Tree, Tree], State]]
    calls: tuple[Calls, Calls, Calls]  # what d_x, d_y and d_z cost, each by itself


class Info(NamedTuple):
    """What an estimate of a hypergradient tells of itself."""

    value: jax.Array  # f(x, y) at the y that the estimate returns
    # Whether all came out finite and no linear solve broke down. If not, the
    # hypergradient is a finite stand-in: zeros where it was not finite.
    ok: jax.Array
    cost: Cost
    residual: jax.Array | None = None  # |H z - b| / |b| of the linear system, if any
    # Estimate of E|estimate - exact|^2 from the sample, if directions were drawn.
    variance: jax.Array | None = None


class Hypergradient(NamedTuple):
    """A stand-alone estimator of ``d/dx f(x, y*(x))`` on one machine."""

    init: Callable[[Tree, Tree], State]
    # (key, x, y, state, batch) -> (hypergradient, y, state, info)
    estimate: Callable[..., tuple[Tree, Tree, State, Info]]
    calls: Calls = Calls()  # what one estimate costs, at most
    guides: int = 0  # estimators in a row behind it that get the same key


class Consensus(NamedTuple):
    """Disagreement ``||V - 1 mean(V)||_F`` of each variable."""

    x: jax.Array
    y: jax.Array
    z: jax.Array


class Coverage(NamedTuple):
    """How many participants hold the entry that the fewest of them hold."""

    x: jax.Array  # int32
    y: jax.Array


class Metrics(NamedTuple):
    """What one step tells of itself."""

    upper: jax.Array  # mean_i f_i(x_i, y_i) after the step, on the step's batch
    hypergrad_norm: jax.Array  # norm of the node mean of the direction of x
    consensus: Consensus
    traffic: Traffic
    calls: Calls
    coverage: Coverage | None = None  # where nodes hold parts of the variables


class Algorithm(NamedTuple):
    """A method: all nodes, one step at a time."""

    init: Callable[[Tree, Tree], State]  # stacked (x, y) -> state
    step: Callable[[jax.Array, State, Tree], tuple[State, Metrics]]


_WEIGHT_TOLERANCE = 1e-8


def is_connected(adjacency: np.ndarray) -> bool:
    """Whether every node reaches every other along directed edges."""
    edges = np.asarray(adjacency) != 0

    def reaches_all(edges):
        seen = np.zeros(len(edges), bool)
        seen[:1] = True
        front = seen
        while front.any():
            front = edges[:, front].any(axis=1) & ~seen
            seen = seen | front
        return bool(seen.all())

    return reaches_all(edges) and reaches_all(edges.T)


def weight_tolerance(w) -> float:
    """How far sums may be off one: the weights may come rounded to float32."""
    dtype = np.asarray(w).dtype
    rounding = 8 * np.finfo(dtype).eps if dtype.kind == "f" else 0.0
    return max(_WEIGHT_TOLERANCE, float(rounding))


def check_mixing_matrix(w: np.ndarray) -> np.ndarray:
    """Return ``w`` if it is a mixing matrix on a connected graph, else say why not.

    Args:
        w: candidate ``(n, n)``.

    Returns:
        The same matrix as float64.

    Raises:
        ValueError: if ``w`` is not square, finite, non-negative, doubly stochastic and
            on a connected graph.

    Examples:
        >>> check_mixing_matrix(np.eye(2))
        Traceback (most recent call last):
        ...
        ValueError: The graph of this mixing matrix is not connected: ...
    """
    tolerance = weight_tolerance(w)
    w = np.asarray(w, dtype=np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not w.size:
        raise ValueError(f"A mixing matrix is square, (n, n); got shape {w.shape}.")
    if not np.isfinite(w).all() or w.min() < -_WEIGHT_TOLERANCE:
        raise ValueError(
            f"Mixing weights must be finite and not negative; the least is {w.min()}."
        )
    worst = max(np.abs(w.sum(axis=axis) - 1).max() for axis in (0, 1))
    if worst > tolerance:
        raise ValueError(
            "A mixing matrix must be doubly stochastic, but a row or column sum is "
            f"off by {worst:.3g}. Build one with `dbo.topology.metropolis(adjacency)`; "
            "dividing rows by degrees is not enough on an irregular graph."
        )
    if not is_connected(w > _WEIGHT_TOLERANCE):
        raise ValueError(
            "The graph of this mixing matrix is not connected: some nodes never hear "
            "of others, so no method can agree. Add edges, or draw another graph."
        )
    return w
