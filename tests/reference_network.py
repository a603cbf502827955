"""Slow NumPy twins of the decentralised rivals, from their update tables.

A rule is ``(start, move)``: ``start(v)`` makes a memory and ``move(v, d, memory)``
returns the new value and memory. Nodes are as in ``reference``.
"""

import numpy as np
import reference


def mixed(w, v):
    """``sum_j w_ij v_j`` by edges."""
    return np.array([sum(w[i, j] * v[j] for j in range(len(w))) for i in range(len(w))])


def diffusion_cta(w, step):
    return lambda v: None, lambda v, d, _: (mixed(w, v) - step * d, None)


def diffusion_atc(w, step):
    return lambda v: None, lambda v, d, _: (mixed(w, v - step * d), None)


def tracking(w, step):
    def move(v, d, memory):
        t, last = memory
        t = mixed(w, t) + d - last
        return mixed(w, v) - step * t, (t, d)

    return lambda v: (0 * v, 0 * v), move


def tracking_semi_atc(w, step):
    def move(v, d, memory):
        t, last = memory
        t = mixed(w, t) + d - last
        return mixed(w, v - step * t), (t, d)

    return lambda v: (0 * v, 0 * v), move


def tracking_atc(w, step):
    def move(v, d, memory):
        t, last = memory
        t = mixed(w, t + d - last)
        return mixed(w, v - step * t), (t, d)

    return lambda v: (0 * v, 0 * v), move


def extra(w, step):
    """The table's form, with V and D of the round before."""
    half = (np.eye(len(w)) + w) / 2

    def move(v, d, memory):
        if memory is None:
            return mixed(w, v) - step * d, (v, d)
        v_old, d_old = memory
        new = v + mixed(w, v) - mixed(half, v_old) - step * (d - d_old)
        return new, (v, d)

    return lambda v: None, move


def exact_diffusion(w, step):
    half = (np.eye(len(w)) + w) / 2

    def move(v, d, psi_old):
        psi = v - step * d
        return mixed(half, psi + v - psi_old), psi

    return lambda v: v.copy(), move


def nids(w, step):
    half = (np.eye(len(w)) + w) / 2

    def move(v, d, memory):
        if memory is None:
            return v - step * d, (v, d)
        v_old, d_old = memory
        return mixed(half, 2 * v - v_old - step * (d - d_old)), (v, d)

    return lambda v: None, move


def averaged(rule, weight):
    """Feed a rule with a moving average that starts at zero."""
    start, step = rule

    def move(v, d, memory):
        r, inner = memory
        r = (1 - weight) * r + weight * d
        v, inner = step(v, r, inner)
        return v, (r, inner)

    return lambda v: (0 * v, start(v)), move


def _start(nodes):
    n, (d_y, d_x) = len(nodes), nodes[0].b.shape
    return {"x": np.zeros((n, d_x)), "y": np.zeros((n, d_y)), "z": np.zeros((n, d_y))}


def single_loop(nodes, steps, rules):
    """All three variables at once along the soba directions, each by its own rule."""
    point = _start(nodes)
    memory = {name: rules[name][0](v) for name, v in point.items()}
    for _ in range(steps):
        d = {"x": [], "y": [], "z": []}
        for node, x, y, z in zip(nodes, *point.values(), strict=True):
            d["x"].append(node.upper_x(x) - node.cross(z))
            d["y"].append(node.lower_y(x, y))
            d["z"].append(node.a @ z - node.upper_y(y))
        for name, (_, move) in rules.items():
            point[name], memory[name] = move(
                point[name], np.array(d[name]), memory[name]
            )
    return tuple(point.values())


def neumann(node, x, y, terms, smoothness):
    """A node's hypergradient with its own Hessian, by the powers of the series."""
    shrink = np.eye(len(node.a)) - node.a / smoothness
    p = np.zeros(len(y))
    for j in range(terms):
        p = p + np.linalg.matrix_power(shrink, j) @ node.upper_y(y) / smoothness
    return node.upper_x(x) - node.cross(p)


def _local(nodes, point, terms, smoothness):
    pairs = list(zip(nodes, point["x"], point["y"], strict=True))
    d_x = np.array([neumann(m, x, y, terms, smoothness) for m, x, y in pairs])
    return {"x": d_x, "y": np.array([m.lower_y(x, y) for m, x, y in pairs])}


def _relaxed(w, v, eta):
    return reference.gossip(w, v, v, eta)


def mdbo(nodes, w, steps, *, eta, a, b, terms, smoothness):
    """Momenta U, V and trackers ZF, Zg, in the order of the listing."""
    point = _start(nodes)
    momentum = tracker = None
    for _ in range(steps):
        d = _local(nodes, point, terms, smoothness)
        if momentum is None:
            momentum, tracker = dict(d), dict(d)
        else:
            for name in d:
                old = momentum[name]
                momentum[name] = (1 - a * eta) * old + a * eta * d[name]
                tracker[name] = mixed(w, tracker[name]) + momentum[name] - old
        for name in d:
            moved = _relaxed(w, point[name], eta)
            point[name] = moved - b[name] * eta * tracker[name]
    return point["x"], point["y"]


def dsbo(nodes, w, steps, *, eta, b, terms, smoothness):
    """Gossip of parameters, plain local directions."""
    point = _start(nodes)
    for _ in range(steps):
        d = _local(nodes, point, terms, smoothness)
        for name in d:
            point[name] = _relaxed(w, point[name], eta) - b[name] * eta * d[name]
    return point["x"], point["y"]


def gdsbo(nodes, w, steps, *, eta, a, b, terms, smoothness):
    """Gossip of parameters and of averaged local directions."""
    point = _start(nodes)
    u = {name: 0 * v for name, v in point.items()}
    for _ in range(steps):
        d = _local(nodes, point, terms, smoothness)
        for name in d:
            u[name] = (1 - a * eta) * mixed(w, u[name]) + a * eta * d[name]
            point[name] = _relaxed(w, point[name], eta) - b[name] * eta * u[name]
    return point["x"], point["y"]
