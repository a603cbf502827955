"""Slow NumPy twins of the algorithms: loops over nodes and edges, nothing shared.

They follow the published order of operations and know only quadratics,
``g_i = y'A_i y / 2 - y'(B_i x + c_i)`` and ``f_i = |y - t_i|^2 / 2 + 0.05 |x|^2``.
"""

import numpy as np


def top_k(k):
    """Keep the k entries of largest magnitude."""

    def compress(v):
        kept = np.argsort(-np.abs(v), kind="stable")[:k]
        out = np.zeros_like(v)
        out[kept] = v[kept]
        return out

    return compress


def identity(v):
    return v


class Node:
    """Gradients of one node's quadratics."""

    def __init__(self, a, b, c, t):
        self.a, self.b, self.c, self.t = a, b, c, t

    def lower_y(self, x, y):
        return self.a @ y - self.b @ x - self.c

    def lower_x(self, y):
        return -self.b.T @ y

    def upper_y(self, y):
        return y - self.t

    def upper_x(self, x):
        return 0.1 * x

    def cross(self, z):
        return -self.b.T @ z


def gossip(w, v, hat, gamma):
    """``v_i + gamma sum_j w_ij (hat_j - hat_i)`` by edges."""
    out = [row.copy() for row in v]
    for i in range(len(w)):
        for j in range(len(w)):
            if i != j and w[i, j] != 0:
                out[i] = out[i] + gamma * w[i, j] * (hat[j] - hat[i])
    return np.array(out)


def c2dfb(
    nodes,
    w,
    steps,
    *,
    rounds,
    penalty,
    upper_step,
    lower_step,
    gamma_outer,
    gamma_inner,
    compress,
    naive=False,
):
    """Section by section: outer tracking of x, inner rounds of both lower problems."""
    n, d_x, d_y = len(nodes), nodes[0].b.shape[1], nodes[0].b.shape[0]
    x = np.zeros((n, d_x))
    inner = {}
    for level in ("y", "z"):
        start = np.zeros((n, d_y))
        gradient = _inner_gradient(nodes, level, penalty, x, start)
        zeros = np.zeros((n, d_y))
        inner[level] = [start, start.copy(), gradient.copy(), zeros, gradient]
        if naive:  # the residuals of error feedback take the place of the copies
            inner[level][1] = zeros.copy()
    u = _outer_gradient(nodes, penalty, x, inner)
    tracker = u.copy()
    for _ in range(steps):
        x = gossip(w, x, x, gamma_outer) - upper_step * tracker
        for level, state in inner.items():
            inner[level] = _inner_rounds(
                nodes,
                level,
                penalty,
                x,
                state,
                w,
                rounds,
                lower_step,
                gamma_inner,
                compress,
                naive,
            )
        u_new = _outer_gradient(nodes, penalty, x, inner)
        tracker = gossip(w, tracker, tracker, gamma_outer) + u_new - u
        u = u_new
    return x, inner["y"][0], inner["z"][0]


def _inner_gradient(nodes, level, penalty, x, v):
    rows = []
    for i, node in enumerate(nodes):
        row = node.lower_y(x[i], v[i])
        if level == "y":
            row = row + node.upper_y(v[i]) / penalty
        rows.append(row)
    return np.array(rows)


def _outer_gradient(nodes, penalty, x, inner):
    y, z = inner["y"][0], inner["z"][0]
    return np.array(
        [
            node.upper_x(x[i]) + penalty * (node.lower_x(y[i]) - node.lower_x(z[i]))
            for i, node in enumerate(nodes)
        ]
    )


def _inner_rounds(
    nodes, level, penalty, x, state, w, rounds, step, gamma, compress, naive
):
    d, d_hat, s, s_hat, g = state
    g_new = _inner_gradient(nodes, level, penalty, x, d)
    s, g = s + g_new - g, g_new
    for _ in range(rounds):
        if naive:
            sent_d = np.array([compress(row) for row in d + d_hat])
            sent_s = np.array([compress(row) for row in s + s_hat])
            d_hat, s_hat = d + d_hat - sent_d, s + s_hat - sent_s
        else:
            d_hat = d_hat + np.array([compress(row) for row in d - d_hat])
            s_hat = s_hat + np.array([compress(row) for row in s - s_hat])
            sent_d, sent_s = d_hat, s_hat
        d = gossip(w, d, sent_d, gamma) - step * s
        g_new = _inner_gradient(nodes, level, penalty, x, d)
        s = gossip(w, s, sent_s, gamma) + g_new - g
        g = g_new
    return [d, d_hat, s, s_hat, g]


def ma_dsbo(
    nodes,
    w,
    steps,
    *,
    lower_steps,
    linear_steps,
    upper_step,
    lower_step,
    linear_step,
    average,
):
    """y by diffusion, z by a restarted tracked solve, x along a moving average."""
    n, d_x, d_y = len(nodes), nodes[0].b.shape[1], nodes[0].b.shape[0]
    x, r = np.zeros((n, d_x)), np.zeros((n, d_x))
    y, z = np.zeros((n, d_y)), np.zeros((n, d_y))
    for _ in range(steps):
        for _ in range(lower_steps):
            gradient = np.array([m.lower_y(x[i], y[i]) for i, m in enumerate(nodes)])
            y = gossip(w, y, y, 1.0) - lower_step * gradient
        residual = _linear_residual(nodes, y, z)
        tracker = residual.copy()
        for _ in range(linear_steps):
            z = gossip(w, z, z, 1.0) - linear_step * tracker
            new = _linear_residual(nodes, y, z)
            tracker = gossip(w, tracker, tracker, 1.0) + new - residual
            residual = new
        u = np.array([m.upper_x(x[i]) - m.cross(z[i]) for i, m in enumerate(nodes)])
        r = (1 - average) * r + average * u
        x = gossip(w, x, x, 1.0) - upper_step * r
    return x, y, z


def _linear_residual(nodes, y, z):
    return np.array([m.a @ z[i] - m.upper_y(y[i]) for i, m in enumerate(nodes)])


def single_loop(nodes, w, steps, *, upper_step, lower_step, linear_step):
    """Soba directions; DIGing tracking of all three variables over exact gossip."""
    n, d_x, d_y = len(nodes), nodes[0].b.shape[1], nodes[0].b.shape[0]
    point = {"x": np.zeros((n, d_x)), "y": np.zeros((n, d_y)), "z": np.zeros((n, d_y))}
    sizes = {"x": upper_step, "y": lower_step, "z": linear_step}
    tracker = {name: np.zeros_like(v) for name, v in point.items()}
    last = {name: np.zeros_like(v) for name, v in point.items()}
    for _ in range(steps):
        x, y, z = point["x"], point["y"], point["z"]
        new = {
            "x": np.array(
                [m.upper_x(x[i]) - m.cross(z[i]) for i, m in enumerate(nodes)]
            ),
            "y": np.array([m.lower_y(x[i], y[i]) for i, m in enumerate(nodes)]),
            "z": _linear_residual(nodes, y, z),
        }
        for name in point:
            tracker[name] = (
                gossip(w, tracker[name], tracker[name], 1.0) + new[name] - last[name]
            )
            moved = gossip(w, point[name], point[name], 1.0)
            point[name] = moved - sizes[name] * tracker[name]
        last = new
    return point["x"], point["y"], point["z"]
