"""Slow NumPy twins of the server methods: loops over workers, nothing shared.

A bilevel problem has ``n`` and ``directions(worker, step, x, y, z) -> (d_x, d_y, d_z)``
with the sign of dbojax, ``z = +[hess_yy g]^-1 grad_y f``; a single-level one has ``n``
and ``gradient(worker, step, x)``. Steps count from 0. A compressor is a callable
``compress(worker, level, step, v)``, so that a test can feed any draws: ``level`` is
``"x"``, ``"y"`` or ``"z"`` of the bilevel methods, and ``"up"`` or ``"down"`` of the
single-level ones, whose server has ``worker=None``.

Every method returns what it visited: axis 0 is the number of steps done, start first.
"""

from typing import NamedTuple

import numpy as np

# --- compressors ---------------------------------------------------------------------


def identity(worker, level, step, v):
    del worker, level, step
    return v


def by_vector(function):
    """A compressor that knows the vector alone."""

    def compress(worker, level, step, v):
        del worker, level, step
        return function(v)

    return compress


def signs(v):
    """Signs that fit in one bit: zero counts as positive."""
    return np.where(v >= 0, 1.0, -1.0)


def scaled_sign(v):
    return np.abs(v).sum() / v.size * signs(v)


def l2_sign(v):
    """The scale of 1-bit Adam; no contraction."""
    return np.sqrt((v**2).sum() / v.size) * signs(v)


def top_k(k):
    def keep(v):
        kept = np.argsort(-np.abs(v), kind="stable")[:k]
        out = np.zeros_like(v)
        out[kept] = v[kept]
        return out

    return keep


def rand_k(rng, k):
    """The unbiased one, fresh and independent at every call; omega = d / k - 1."""

    def keep(v):
        kept = rng.permutation(v.size)[:k]
        out = np.zeros_like(v)
        out[kept] = v[kept] * (v.size / k)
        return out

    return keep


def msc(compress, omega, rounds):
    """Multi-step compression; round r calls ``compress`` with the step ``(step, r)``.

    ``omega`` is a number or one per level.
    """

    def composed(worker, level, step, v):
        w = omega[level] if isinstance(omega, dict) else omega
        sent = np.zeros_like(v)
        for r in range(rounds):
            sent = sent + compress(worker, level, (step, r), v - sent) / (1 + w)
        return sent / (1 - (w / (1 + w)) ** rounds)

    return composed


def msc_omega(omega, rounds):
    """Relative variance of ``msc``: q^R / (1 - q^R)."""
    power = (omega / (1 + omega)) ** rounds
    return power / (1 - power)


# --- the C-SOBA family ---------------------------------------------------------------

LEVELS = ("x", "y", "z")


class Visited(NamedTuple):
    """What a bilevel method visited, and the memories at its end."""

    x: np.ndarray  # (steps + 1, dx)
    y: np.ndarray  # (steps + 1, dy)
    z: np.ndarray  # (steps + 1, dy)
    workers: dict  # level -> (n, d), the memories of the workers
    server: dict  # level -> (d,), the memory of the server, from messages alone


def clip(v, radius):
    norm = np.sqrt((v**2).sum())
    return v if norm <= radius else v * (radius / norm)


def _mean(rows):
    total = 0.0
    for row in rows:
        total = total + row
    return total / len(rows)


def _start(start):
    return {level: np.array(v, float) for level, v in zip(LEVELS, start, strict=True)}


def _directions(problem, step, point):
    """Of all workers: level -> list over the workers."""
    found = [
        problem.directions(i, step, point["x"], point["y"], point["z"])
        for i in range(problem.n)
    ]
    return {level: [row[k] for row in found] for k, level in enumerate(LEVELS)}


def _visited(path, workers, server):
    return Visited(
        *(np.array([point[level] for point in path]) for level in LEVELS),
        workers,
        server,
    )


def c_soba(
    problem,
    start,
    steps,
    *,
    upper_step,
    lower_step,
    linear_step,
    compress=identity,
    average=None,
    use_new=True,
    radius=np.inf,
):
    """C-SOBA; with ``average`` (theta) CM-SOBA; with ``identity`` SOBA.

    ``use_new`` moves x along the average that already holds this step's messages.
    """
    point = _start(start)
    h = np.zeros_like(point["x"])
    path = [point]
    for step in range(steps):
        local = _directions(problem, step, point)
        mean = {
            level: _mean(
                [compress(i, level, step, v) for i, v in enumerate(local[level])]
            )
            for level in LEVELS
        }
        along = mean["x"]
        if average is not None:
            h_new = (1 - average) * h + average * mean["x"]
            along = h_new if use_new else h
            h = h_new
        point = {
            "x": point["x"] - upper_step * along,
            "y": point["y"] - lower_step * mean["y"],
            "z": clip(point["z"] - linear_step * mean["z"], radius),
        }
        path.append(point)
    return _visited(path, {}, {})


def ef_soba(
    problem,
    start,
    steps,
    *,
    upper_step,
    lower_step,
    linear_step,
    compress,
    delta,
    average,
    raw=False,
    ef21=False,
    use_new=True,
    radius=np.inf,
):
    """EF-SOBA: the messages are compressed differences to memories.

    Args:
        delta: how far memories follow their messages: a number or one per level.
        average: theta, of the direction of x.
        raw: send the direction of x itself, and average at the server instead.
        ef21: the server takes the new memory in place of ``m + mean c``.
        use_new: of ``raw``, as in ``c_soba``.
    """
    delta = delta if isinstance(delta, dict) else dict.fromkeys(LEVELS, delta)
    point = _start(start)
    workers = {s: np.zeros((problem.n, v.size)) for s, v in point.items()}
    server = {s: np.zeros(v.size) for s, v in point.items()}
    local_h = np.zeros((problem.n, point["x"].size))
    server_h = np.zeros(point["x"].size)
    path = [point]
    for step in range(steps):
        signal = _directions(problem, step, point)
        if not raw:
            for i in range(problem.n):
                local_h[i] = (1 - average) * local_h[i] + average * signal["x"][i]
            signal["x"] = list(local_h)
        estimate = {}
        for s in LEVELS:
            messages = []
            for i in range(problem.n):
                message = compress(i, s, step, signal[s][i] - workers[s][i])
                workers[s][i] = workers[s][i] + delta[s] * message
                messages.append(message)
            mean = _mean(messages)
            new = server[s] + delta[s] * mean
            estimate[s] = new if ef21 else server[s] + mean
            server[s] = new
        along = estimate["x"]
        if raw:
            h_new = (1 - average) * server_h + average * estimate["x"]
            along = h_new if use_new else server_h
            server_h = h_new
        point = {
            "x": point["x"] - upper_step * along,
            "y": point["y"] - lower_step * estimate["y"],
            "z": clip(point["z"] - linear_step * estimate["z"], radius),
        }
        path.append(point)
    return _visited(path, workers, server)


# --- adaptive methods ----------------------------------------------------------------


def two_step_decay(rate, steps):
    """A tenth from the middle on, a hundredth from three quarters on; t from 1."""

    def at(step):
        t = step + 1
        if t < steps // 2:
            return rate
        return 0.1 * rate if t < 3 * steps // 4 else 0.01 * rate

    return at


def _rate(rate, step):
    return rate(step) if callable(rate) else rate


class AmsGrad:
    """Moments of one variable; the maximum is over the moment before its correction."""

    def __init__(self, x, betas, eps, weight_decay, maximum=True):
        self.b1, self.b2 = betas
        self.eps, self.weight_decay, self.maximum = eps, weight_decay, maximum
        self.m, self.v, self.v_max = np.zeros((3, x.size))

    def move(self, x, direction, step, rate, frozen=False):
        u = direction + self.weight_decay * x
        self.m = self.b1 * self.m + (1 - self.b1) * u
        if not frozen:
            self.v = self.b2 * self.v + (1 - self.b2) * u**2
            self.v_max = np.maximum(self.v_max, self.v) if self.maximum else self.v
        t = step + 1
        scale = np.sqrt(self.v_max) / np.sqrt(1 - self.b2**t) + self.eps
        return x - rate / (1 - self.b1**t) * self.m / scale


def _gradients(problem, step, x):
    return [problem.gradient(i, step, x) for i in range(problem.n)]


class Markov:
    """Both ends keep copies and send compressed differences to them: CD-Adam."""

    def __init__(self, n, d):
        self.workers = np.zeros((n, d))
        self.server = np.zeros(d)  # the mean of `workers`, from messages alone
        self.broadcast = np.zeros(d)

    def reduce(self, gradients, step, compress):
        messages = []
        for i, g in enumerate(gradients):
            message = compress(i, "up", step, g - self.workers[i])
            self.workers[i] = self.workers[i] + message
            messages.append(message)
        self.server = self.server + _mean(messages)
        down = compress(None, "down", step, self.server - self.broadcast)
        self.broadcast = self.broadcast + down
        return self.broadcast


class Residuals:
    """Both ends add what earlier messages left out: error feedback."""

    def __init__(self, n, d):
        self.workers, self.server = np.zeros((n, d)), np.zeros(d)

    def reduce(self, values, step, compress):
        messages = []
        for i, value in enumerate(values):
            target = value + self.workers[i]
            message = compress(i, "up", step, target)
            self.workers[i] = target - message
            messages.append(message)
        target = _mean(messages) + self.server
        down = compress(None, "down", step, target)
        self.server = target - down
        return down


class Memoryless:
    """Compress both ways and forget: naive."""

    def __init__(self, n, d):
        del n, d

    def reduce(self, values, step, compress):
        sent = [compress(i, "up", step, v) for i, v in enumerate(values)]
        return compress(None, "down", step, _mean(sent))


def _adaptive(memory):
    def method(
        problem,
        x,
        steps,
        *,
        rate,
        compress,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.0,
    ):
        x = np.array(x, float)
        optimiser = AmsGrad(x, betas, eps, weight_decay)
        link = memory(problem.n, x.size)
        path = [x]
        for step in range(steps):
            direction = link.reduce(_gradients(problem, step, x), step, compress)
            x = optimiser.move(x, direction, step, _rate(rate, step))
            path.append(x)
        return np.array(path)

    return method


cd_adam = _adaptive(Markov)
ef_adam = _adaptive(Residuals)
naive_adam = _adaptive(Memoryless)


def amsgrad(problem, x, steps, **settings):
    """The uncompressed method."""
    return naive_adam(problem, x, steps, compress=identity, **settings)


def one_bit_adam(
    problem,
    x,
    steps,
    *,
    rate,
    freeze,
    compress,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    mask=1.0,
):
    """The original: ``freeze`` dense steps, then compressed momenta over a frozen v.

    One server in place of the owners of chunks; no correction of the moments, decay of
    weights outside. ``mask`` is zero where the momentum shall stay zero.
    """
    x = np.array(x, float)
    b1, b2 = betas
    m, v = np.zeros((2, x.size))
    link = Residuals(problem.n, x.size)
    path = [x]
    for step in range(steps):
        gradients = _gradients(problem, step, x)
        if step < freeze:
            mean = _mean(gradients)
            m, v = b1 * m + (1 - b1) * mean, b2 * v + (1 - b2) * mean**2
        else:
            local = [b1 * m + (1 - b1) * g for g in gradients]
            m = mask * link.reduce(local, step, compress)
        x = x - _rate(rate, step) * (m / (np.sqrt(v) + eps) + weight_decay * x)
        path.append(x)
    return np.array(path)


def one_bit_adam_on_gradients(
    problem,
    x,
    steps,
    *,
    rate,
    freeze,
    compress,
    betas=(0.9, 0.99),
    eps=1e-8,
    weight_decay=0.0,
    maximum=False,
):
    """The form of CD-Adam's code: error feedback of gradients, v frozen at last.

    Dense for ``freeze`` steps; the moments are corrected with the running step number.
    """
    x = np.array(x, float)
    optimiser = AmsGrad(x, betas, eps, weight_decay, maximum)
    link = Residuals(problem.n, x.size)
    path = [x]
    for step in range(steps):
        frozen = step >= freeze
        through = compress if frozen else identity
        direction = link.reduce(_gradients(problem, step, x), step, through)
        x = optimiser.move(x, direction, step, _rate(rate, step), frozen)
        path.append(x)
    return np.array(path)


# --- methods along gradients ---------------------------------------------------------


def ef21(problem, x, steps, *, rate, compress, momentum=1.0, dense_start=False):
    """EF21-SGDM; ``momentum=1`` (eta) is EF21-SGD.

    ``dense_start`` begins with the first gradients in the copies, and zero otherwise.
    The momenta begin with the first gradients either way.
    """
    x = np.array(x, float)
    v = np.array(_gradients(problem, 0, x))
    copies = v.copy() if dense_start else np.zeros_like(v)
    path = [x]
    for step in range(steps):
        for i in range(problem.n):
            gradient = problem.gradient(i, step, x)
            v[i] = (1 - momentum) * v[i] + momentum * gradient
            copies[i] = copies[i] + compress(i, "up", step, v[i] - copies[i])
        x = x - _rate(rate, step) * _mean(list(copies))
        path.append(x)
    return np.array(path)


def ef14(problem, x, steps, *, rate, compress):
    """Error feedback of steps, the rate inside; nothing comes back compressed."""
    x = np.array(x, float)
    residual = np.zeros((problem.n, x.size))
    path = [x]
    for step in range(steps):
        messages = []
        for i in range(problem.n):
            wanted = residual[i] + _rate(rate, step) * problem.gradient(i, step, x)
            message = compress(i, "up", step, wanted)
            residual[i] = wanted - message
            messages.append(message)
        x = x - _mean(messages)
        path.append(x)
    return np.array(path)


def orthonormalised(columns):
    """Gram and Schmidt, column by column."""
    out = np.array(columns, float)
    for k in range(out.shape[1]):
        for j in range(k):
            out[:, k] = out[:, k] - (out[:, j] @ out[:, k]) * out[:, j]
        out[:, k] = out[:, k] / np.sqrt((out[:, k] ** 2).sum())
    return out


def power_round(matrices, q):
    """One power iteration on the mean: (approximation, q); ``q`` is (columns, rank)."""
    p = orthonormalised(_mean([matrix @ q for matrix in matrices]))
    q = _mean([matrix.T @ p for matrix in matrices])
    return p @ q.T, q


def power_sgd(problem, x, steps, *, rate, q):
    """PowerSGD on one matrix x, with error feedback and a warm start of ``q``."""
    x = np.array(x, float)
    memory = np.zeros((problem.n, *x.shape))
    path = [x]
    for step in range(steps):
        wanted = [problem.gradient(i, step, x) + memory[i] for i in range(problem.n)]
        update, q = power_round(wanted, q)
        for i in range(problem.n):
            memory[i] = wanted[i] - update
        x = x - _rate(rate, step) * update
        path.append(x)
    return np.array(path)


# --- golden problems -----------------------------------------------------------------


class BilevelToy:
    """Eight workers, ``g_i = |y - B_i x - b_i|^2_{A_i} / 2``; h = 1 heterogeneous."""

    n, d = 8, 20

    def __init__(self, h=1.0, seed=0):
        rng = np.random.default_rng(seed)
        d, rows = self.d, []
        for _ in range(self.n):
            m = rng.normal(size=(d, d)) / np.sqrt(d)
            slope = rng.normal(size=(d, d)) / np.sqrt(d)
            shift, target = rng.normal(size=d), rng.normal(size=d)
            a = np.eye(d) + 0.3 * h * m @ m.T
            b = 0.5 * np.eye(d) + 0.2 * h * slope
            rows.append((a, b, h * shift, 1 + h * target))
        self.a, self.slope, self.shift, self.target = map(
            np.stack, zip(*rows, strict=True)
        )

    @property
    def start(self):
        return np.zeros((3, self.d))

    def directions(self, worker, step, x, y, z):
        del step
        a, slope = self.a[worker], self.slope[worker]
        az = a @ z
        return (
            0.1 * x + slope.T @ az,
            a @ (y - slope @ x - self.shift[worker]),
            az - (y - self.target[worker]),
        )

    def _means(self):
        cross = _mean([a @ b for a, b in zip(self.a, self.slope, strict=True)])
        shift = _mean([a @ b for a, b in zip(self.a, self.shift, strict=True)])
        return _mean(list(self.a)), cross, shift

    def solution(self, x):
        a, cross, shift = self._means()
        return np.linalg.solve(a, cross @ x + shift)

    def linear_solution(self, x):
        return np.linalg.solve(
            self._means()[0], self.solution(x) - _mean(list(self.target))
        )

    def hypergradient(self, x):
        return 0.1 * x + self._means()[1].T @ self.linear_solution(x)

    def norms(self, xs):
        """Norms of the true hypergradient, which is affine in x, along a path."""
        start = self.hypergradient(np.zeros(self.d))
        columns = [self.hypergradient(e) - start for e in np.eye(self.d)]
        return np.sqrt(((xs @ np.array(columns) + start) ** 2).sum(-1))


class DiagonalToy:
    """Eight workers, ``f_i = sum_j a_ij (x_j - c_ij)^2 / 2`` in fifty variables."""

    n, d = 8, 50

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        rows = [
            (rng.uniform(0.5, 2.0, size=self.d), 3 * rng.normal(size=self.d))
            for _ in range(self.n)
        ]
        self.a, self.c = map(np.stack, zip(*rows, strict=True))

    @property
    def start(self):
        return np.zeros(self.d)

    @property
    def optimum(self):
        return (self.a * self.c).sum(0) / self.a.sum(0)

    def gradient(self, worker, step, x):
        del step
        return self.a[worker] * (x - self.c[worker])

    def value(self, x):
        return 0.5 * (self.a * (x - self.c) ** 2).sum() / self.n

    def squared_norms(self, xs):
        """Squared norms of the mean gradient along a path."""
        slopes = [(self.a * (x - self.c)).mean(0) for x in xs]
        return (np.array(slopes) ** 2).sum(-1)
