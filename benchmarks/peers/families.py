"""Hypergradients of the digits problem beside JAX and PyTorch libraries."""

import functools
import logging
import warnings

import digits
import hypergradients
import jax
import jax.numpy as jnp
import numpy as np
import turns
from report import quartiles

FAMILIES = ("reverse", "cg", "neumann")
MODULES = {"betty-ml": "betty", "boat-torch": "boat_torch"}
DIFFERS = {
    ("reverse", "optimistix"): "recursive checkpoints: less memory, more work",
    ("cg", "betty-ml"): "its own recurrence: the new direction takes the old residual",
}


def jax_makers(family):
    """Label -> function of the number of steps that gives a function to compile."""
    found = {"dbojax": functools.partial(hypergradients.ours, family)}
    peers = dict(hypergradients.PEERS.get(family, {}))
    if family == "reverse":
        peers |= hypergradients.PEERS["checkpointed"]
    for who, make in peers.items():
        if turns.is_there(who):
            found[who] = make
    return found


def torch_makers(family):
    if not turns.is_there("torch"):
        return {}
    import torch_digits

    peers = torch_digits.PEERS[family]
    return {w: make for w, make in peers.items() if turns.is_there(w, MODULES.get(w))}


def jax_calls(family, args, steps):
    calls, grads = {}, {}
    for who, make in jax_makers(family).items():
        program = jax.jit(make(steps)).lower(*args).compile()
        label = family, who, turns.threads()
        calls[label] = turns.blocked(program, *args)
        grads[label] = np.asarray(program(*args)[0])
    return calls, grads


def torch_calls(family, args, steps):
    """Each with one thread and with as many as JAX has, which may well be slower."""
    makers = torch_makers(family)
    if not makers:
        return {}, {}
    import torch_digits

    tensors = torch_digits.tensors(args)
    calls, grads = {}, {}
    for who, make in makers.items():
        call = make(tensors, steps)
        grad = call().detach().numpy()
        for count in sorted({1, turns.threads()}):
            calls[family, who, count] = call
            grads[family, who, count] = grad
    return calls, grads


def exact(family, steps):
    """Our hypergradient in float64."""
    with jax.enable_x64(True):
        program = jax.jit(hypergradients.ours(family, steps))
        return np.asarray(program(*digits.arguments(jnp.float64))[0])


def set_threads(label):
    _, who, count = label
    if who in ("dbojax", *hypergradients.PEERS["cg"]):
        return
    import torch

    torch.set_num_threads(count)


def rows(repeats, steps=100):
    warnings.simplefilter("ignore", FutureWarning)  # of functorch, within torchopt
    logging.disable(logging.INFO)  # of betty's engine
    args = digits.arguments(jnp.float32)
    for family in FAMILIES:
        calls, grads = jax_calls(family, args, steps)
        more, more_grads = torch_calls(family, args, steps)
        calls, grads = calls | more, grads | more_grads
        times = turns.taken_in_turns(calls, repeats, set_threads)
        base, truth = (family, "dbojax", turns.threads()), exact(family, steps)
        for label in calls:
            _, who, count = label
            yield {
                "family": family,
                "who": f"{who} {turns.version(who)}",
                "threads": count,
                "ms": quartiles(np.multiply(times[label], 1e3), 1),
                "time / dbojax": turns.times_base(times, label, base),
                "error to float64": f"{turns.distance(grads[label], truth):.0e}",
                "differs": DIFFERS.get((family, who), ""),
            }
