"""Decentralised rounds the way simulators in NumPy are usually written: node by node.

Within a node everything is vectorised and products go to BLAS. A node keeps copies of
what its neighbours sent, as the methods say; lists hold one entry per node.
"""

import numpy as np


def slope(y, samples):
    """Gradient of a node's mean logistic loss."""
    inputs, targets = samples
    margins = targets * (inputs @ y)
    return inputs.T @ (-targets / (1 + np.exp(margins)) / len(targets))


def top_k(k):
    """What arrives of a vector: its k entries of largest magnitude."""

    def compress(v):
        kept = np.argpartition(-np.abs(v), k - 1)[:k]
        out = np.zeros_like(v)
        out[kept] = v[kept]
        return out

    return compress


def heard(w):
    """Of each node its neighbours and their weights, as Python numbers."""
    return [
        [(j, float(w[i, j])) for j in np.flatnonzero(w[i]) if j != i]
        for i in range(len(w))
    ]


def relaxed(links, gamma, vs, hats):
    """``v_i + gamma sum_j w_ij (hat_j - hat_i)``."""
    found = []
    for i, v in enumerate(vs):
        moved = v.copy()
        for j, weight in links[i]:
            moved += gamma * weight * (hats[j] - hats[i])
        found.append(moved)
    return found


def dense(links, gamma):
    """A channel ``(vs, hats) -> (vs, hats)`` over which nodes send what they hold."""
    return lambda vs, hats: (relaxed(links, gamma, vs, vs), hats)


def reference_point(links, gamma, compress):
    """One over which they send compressed differences to public copies."""

    def send(vs, hats):
        hats = [hat + compress(v - hat) for v, hat in zip(vs, hats, strict=True)]
        return relaxed(links, gamma, vs, hats), hats

    return send


def dsgd(links, step, vs, samples):
    """One round: mix, and step along the own gradient."""
    slopes = [slope(v, one) for v, one in zip(vs, samples, strict=True)]
    mixed = relaxed(links, 1.0, vs, vs)
    return [v - step * g for v, g in zip(mixed, slopes, strict=True)]


def tracked(vs):
    """State of gradient tracking: values, trackers, last directions, public copies."""
    zeros = [np.zeros_like(v) for v in vs]
    return vs, zeros, zeros, [v.copy() for v in vs], zeros


def tracking(send, step, state, directions):
    """One round of gradient tracking over a channel."""
    vs, trackers, last, hats, tracker_hats = state
    trackers, tracker_hats = send(trackers, tracker_hats)
    trackers = [
        t + d - old for t, d, old in zip(trackers, directions, last, strict=True)
    ]
    vs, hats = send(vs, hats)
    vs = [v - step * t for v, t in zip(vs, trackers, strict=True)]
    return vs, trackers, directions, hats, tracker_hats


def lower_slope(x, y, samples):
    return slope(y, samples) + 2 * np.exp(x) * y


def c2dfb(outer, inner, settings, state, samples):
    """One step; ``samples`` holds the upper and the lower level's, node by node."""
    x, y, z = state
    penalty, above, below = settings.penalty, *samples
    directions = [
        penalty * np.exp(a) * (b**2 - c**2)
        for a, b, c in zip(x[0], y[0], z[0], strict=True)
    ]
    x = tracking(outer, settings.upper_step, x, directions)
    for _ in range(settings.inner_steps):
        d_y = [
            slope(b, f) / penalty + lower_slope(a, b, g)
            for a, b, f, g in zip(x[0], y[0], above, below, strict=True)
        ]
        d_z = [lower_slope(a, c, g) for a, c, g in zip(x[0], z[0], below, strict=True)]
        y = tracking(inner, settings.lower_step, y, d_y)
        z = tracking(inner, settings.lower_step, z, d_z)
    return x, y, z
