"""Slow NumPy twins of the federated bilevel methods: loops over clients, dense masks.

A round is a list of parts: which client takes part, its 0/1 masks on x and y, and how
many local steps it makes. Masks come from outside, so that any rule can be fed. Clients
offer ``upper(x, y)`` and ``lower(x, y)``, pairs of gradients, and
``products(x, y, z)``, the mixed and the Hessian product of g with z.
"""

from typing import NamedTuple

import numpy as np

TINY = 1e-12


class Part(NamedTuple):
    """What one client does in one round."""

    client: int
    x: np.ndarray  # 0/1 mask
    y: np.ndarray
    steps: int = 1


class ToyClient:
    """Derivatives of one client of the federated toy, by hand."""

    def __init__(self, h, a, b, t):
        self.h, self.a, self.b, self.t = h, a, b, t

    def upper(self, x, y):
        apart = y - self.t
        return 0.2 * x / (1 + x**2) ** 2, apart / np.sqrt(1 + apart**2)

    def lower(self, x, y):
        pull = self.h @ (y - self.a @ np.tanh(x) - self.b)
        slope = 1 - np.tanh(x) ** 2
        return -slope * (self.a.T @ pull), pull + 0.1 / (1 + np.exp(-y))

    def products(self, x, y, z):
        sigmoid = 1 / (1 + np.exp(-y))
        pull = self.h @ z
        cross = -(1 - np.tanh(x) ** 2) * (self.a.T @ pull)
        return cross, pull + 0.1 * sigmoid * (1 - sigmoid) * z


def toy_clients(task):
    """The clients of a task made by `dbo.tasks.federated_toy`."""
    arrays = (*task.batch.lower, task.batch.upper)
    return [ToyClient(*parts) for parts in zip(*map(np.asarray, arrays), strict=True)]


def full_round(clients, d_x, d_y, steps=1):
    """Everyone takes part and holds everything."""
    return [Part(i, np.ones(d_x), np.ones(d_y), steps) for i in range(len(clients))]


# --- directions ----------------------------------------------------------------------


def exact(client, x, y, z):
    """Directions of x, y and z with exact second derivatives."""
    f_x, f_y = client.upper(x, y)
    cross, hessian = client.products(x, y, z)
    return f_x - cross, client.lower(x, y)[1], hessian - f_y


def difference(radius):
    """Directions of x, y and z from first derivatives alone (E1)."""

    def directions(client, x, y, z):
        length = np.linalg.norm(z)
        cross, hessian = np.zeros_like(x), np.zeros_like(y)
        if length > 0:
            delta = radius / max(length, TINY)
            plus = client.lower(x, y + delta * z)
            minus = client.lower(x, y - delta * z)
            cross = (plus[0] - minus[0]) / (2 * delta)
            hessian = (plus[1] - minus[1]) / (2 * delta)
        f_x, f_y = client.upper(x, y)
        return f_x - cross, client.lower(x, y)[1], hessian - f_y

    return directions


# --- pieces of a round ---------------------------------------------------------------


def projected(z, radius):
    """Scale z back to the ball."""
    length = np.linalg.norm(z)
    return z if length <= radius else z * (radius / length)


def aggregated(value, parts, level, moves, gamma, divide_by=None):
    """Coverage average of the clients' moves; coordinates nobody holds stand still."""
    new = value.copy()
    for j in range(len(value)):
        holders = [k for k, p in enumerate(parts) if getattr(p, level)[j] == 1]
        if holders:
            count = len(holders) if divide_by is None else divide_by
            new[j] -= gamma * sum(moves[k][j] for k in holders) / count
    return new


def local_steps(client, part, start, directions, steps, radius=np.inf):
    """K steps of all three variables at once, each from the old point."""
    x, y, z = start
    for _ in range(part.steps):
        d_x, d_y, d_z = directions(client, x, y, z)
        x = x - steps[0] * part.x * d_x
        y = y - steps[1] * part.y * d_y
        z = projected(z - steps[2] * part.y * d_z, radius)
    return x, y, z


def inner_steps(client, part, x, y, step, count):
    """Steps on y alone."""
    for _ in range(count):
        y = y - step * part.y * client.lower(x, y)[1]
    return y


def lengths(parts, normalise):
    """What each client's move is divided by: nothing, or its share of the steps."""
    mean = np.mean([part.steps for part in parts])
    return [part.steps / mean if normalise else 1.0 for part in parts]


# --- RAFBO and RABO ------------------------------------------------------------------


def rafbo(
    clients,
    start,
    rounds,
    *,
    directions,
    steps,
    inner=0,
    server_steps=(1.0, 1.0, 1.0),
    radius=np.inf,
    keep=False,
    divide_by=None,
    normalise=False,
):
    """Sections 3.2 and 3.3: one x, y and z, all at the server. Returns the path."""
    x, y, z = (np.array(v, float) for v in start)
    path = [(x, y, z)]
    for parts in rounds:
        moves = {"x": [], "y": [], "z": []}
        scales = lengths(parts, normalise)
        for part, scale in zip(parts, scales, strict=True):
            client = clients[part.client]
            m_x, m_y = part.x, part.y
            begin = (x, y, z) if keep else (m_x * x, m_y * y, m_y * z)
            moved = inner_steps(client, part, begin[0], begin[1], steps[1], inner)
            at = (begin[0], moved, begin[2])
            end = local_steps(client, part, at, directions, steps)
            for level, a, b in zip("xyz", begin, end, strict=True):
                moves[level].append((a - b) / scale)
        x = aggregated(x, parts, "x", moves["x"], server_steps[0], divide_by)
        y = aggregated(y, parts, "y", moves["y"], server_steps[1], divide_by)
        z = aggregated(z, parts, "y", moves["z"], server_steps[2], divide_by)
        z = projected(z, radius)
        path.append((x, y, z))
    return path


def rabo(
    clients,
    start,
    rounds,
    *,
    directions,
    steps,
    inner=0,
    server_step=1.0,
    radius=np.inf,
    keep=False,
    divide_by=None,
    normalise=False,
):
    """Section 3.4: y and z stay on their client. ``start`` has a row per client."""
    x, y, z = (np.array(v, float) for v in start)
    path = [(x, y.copy(), z.copy())]
    for parts in rounds:
        moves, scales = [], lengths(parts, normalise)
        y, z = y.copy(), z.copy()
        for part, scale in zip(parts, scales, strict=True):
            i, m_x, m_y = part.client, part.x, part.y
            client = clients[i]
            begin = (x, y[i], z[i]) if keep else (m_x * x, m_y * y[i], m_y * z[i])
            moved = inner_steps(client, part, begin[0], begin[1], steps[1], inner)
            at = (begin[0], moved, begin[2])
            end = local_steps(client, part, at, directions, steps, radius)
            moves.append((begin[0] - end[0]) / scale)
            # Entries outside the mask wait at full width for a round that trains them.
            y[i] = np.where(m_y == 1, end[1], y[i])
            z[i] = np.where(m_y == 1, end[2], z[i])
        x = aggregated(x, parts, "x", moves, server_step, divide_by)
        path.append((x, y, z))
    return path


# --- full-size baselines -------------------------------------------------------------


def simfbo(
    clients,
    start,
    rounds,
    *,
    steps,
    gammas,
    directions=exact,
    radius=np.inf,
    normalise=False,
):
    """SimFBO, or ShroFBO with ``normalise``; all weights a are one and all p equal.

    Clients send sums of directions, the server moves by steps of its own: gamma.
    """
    x, y, z = (np.array(v, float) for v in start)
    path = [(x, y, z)]
    for parts in rounds:
        sums = []
        for part in parts:
            x_i, y_i, z_i = x, y, z
            total = [np.zeros_like(v) for v in (x, y, z)]
            for _ in range(part.steps):
                found = directions(clients[part.client], x_i, y_i, z_i)
                total = [a + d for a, d in zip(total, found, strict=True)]
                x_i, y_i, z_i = (
                    v - step * d
                    for v, step, d in zip((x_i, y_i, z_i), steps, found, strict=True)
                )
            sums.append(total)
        if normalise:
            mean = np.mean([part.steps for part in parts])
            sums = [
                [q * mean / part.steps for q in total]
                for part, total in zip(parts, sums, strict=True)
            ]
        q_x, q_y, q_z = (np.mean([s[k] for s in sums], 0) for k in range(3))
        x, y = x - gammas[0] * q_x, y - gammas[1] * q_y
        z = projected(z - gammas[2] * q_z, radius)
        path.append((x, y, z))
    return path


def fedbio(clients, start, rounds, *, steps, directions=exact):
    """Local steps of all three variables, then plain averages of what came out."""
    x, y, z = (np.array(v, float) for v in start)
    path = [(x, y, z)]
    for parts in rounds:
        ends = [
            local_steps(clients[part.client], part, (x, y, z), directions, steps)
            for part in parts
        ]
        x, y, z = (np.mean([end[k] for end in ends], 0) for k in range(3))
        path.append((x, y, z))
    return path


def fednest(
    clients,
    start,
    rounds,
    *,
    upper_step,
    lower_step,
    linear_step,
    inner_rounds=1,
    inner_steps=1,
    terms=5,
    outer_steps=1,
    reduced=True,
):
    """FedInn, FedIHGP and FedOut; ``reduced`` is SVRG on y in place of SGD."""
    x, y = (np.array(v, float) for v in start[:2])
    path = [(x, y)]
    for parts in rounds:
        here = [(clients[part.client], part) for part in parts]

        def mean(level, answers, old=0.0, parts=parts):
            masks = [getattr(part, level) for part in parts]
            total = sum(m * a for m, a in zip(masks, answers, strict=True))
            count = sum(masks)
            return np.where(count > 0, total / np.maximum(count, 1), old)

        for _ in range(inner_rounds):
            slope = mean("y", [c.lower(p.x * x, p.y * y)[1] for c, p in here])
            ends = []
            for c, p in here:
                y_i = begin = p.y * y
                own = c.lower(p.x * x, begin)[1]
                for _ in range(inner_steps):
                    step = c.lower(p.x * x, y_i)[1]
                    step = step - own + slope if reduced else step
                    y_i = y_i - lower_step * p.y * step
                ends.append(y_i)
            y = mean("y", ends, y)
        held = [(c, p, p.x * x, p.y * y) for c, p in here]
        term = mean("y", [c.upper(x_i, y_i)[1] for c, _, x_i, y_i in held])
        total = term
        for _ in range(terms):
            products = [c.products(a, b, p.y * term)[1] for c, p, a, b in held]
            term = term - linear_step * mean("y", products)
            total = total + term
        z = linear_step * total
        answers = [
            c.upper(a, b)[0] - c.products(a, b, p.y * z)[0] for c, p, a, b in held
        ]
        h, ends = mean("x", answers), []
        for c, p, begin, y_i in held:
            x_i, own = begin, c.upper(begin, y_i)[0]
            for _ in range(outer_steps):
                x_i = x_i - upper_step * p.x * (c.upper(x_i, y_i)[0] - own + h)
            ends.append(x_i)
        x = mean("x", ends, x)
        path.append((x, y))
    return path
