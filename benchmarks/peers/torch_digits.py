"""The hypergradients of `digits.py` with PyTorch: autograd alone and four libraries.

``PEERS[family][who](arguments, steps)`` gives a function without arguments that
computes one hypergradient; each library is used as its documentation shows it.
"""

import os
import types

import numpy as np
import torch
from digits import STEP, TERMS
from torch.nn import functional

GRAD = torch.autograd.grad


def tensors(arrays):
    """x, y and both levels' samples from those of `digits.arguments`.

    Targets are class numbers, for which PyTorch's loss is faster than for one-hot rows.
    """

    def of(samples):
        inputs, targets = (torch.from_numpy(np.array(a)) for a in samples)
        return inputs, targets.argmax(1)

    x, y, batch = arrays
    x, y = (torch.from_numpy(np.array(a)) for a in (x, y))
    return x.requires_grad_(), y, of(batch.upper), of(batch.lower)


def fit(y, samples):
    inputs, targets = samples
    return functional.cross_entropy(inputs @ y, targets)


def lower(x, y, samples):
    return fit(y, samples) + (torch.exp(x) * y**2).sum()


# With autograd alone.


def descend(x, y, samples, steps, create_graph):
    y = y.detach().requires_grad_()
    for _ in range(steps):
        (slope,) = GRAD(lower(x, y, samples), y, create_graph=create_graph)
        y = y - STEP * slope
        y = y if create_graph else y.detach().requires_grad_()
    return y


def plain_reverse(arguments, steps):
    x, start, above, below = arguments

    def estimate():
        y = descend(x, start, below, steps, create_graph=True)
        return GRAD(fit(y, above), x)[0]

    return estimate


def plain_implicit(solve):
    def make(arguments, steps):
        x, start, above, below = arguments

        def estimate():
            y = descend(x, start, below, steps, create_graph=False)
            (right,) = GRAD(fit(y, above), y)
            (slope,) = GRAD(lower(x, y, below), y, create_graph=True)

            def product(v):
                return GRAD(slope, y, v, retain_graph=True)[0]

            return -GRAD(slope, x, solve(product, right))[0]

        return estimate

    return make


def conjugate_gradient(product, right):
    z, r, p = torch.zeros_like(right), right, right
    square = torch.vdot(r.flatten(), r.flatten())
    for _ in range(TERMS):
        image = product(p)
        alpha = square / torch.vdot(p.flatten(), image.flatten())
        z, r = z + alpha * p, r - alpha * image
        new = torch.vdot(r.flatten(), r.flatten())
        p, square = r + new / square * p, new
    return z


def neumann_series(product, right):
    p = right
    for _ in range(TERMS):
        p = p - STEP * product(p) + right
    return STEP * p


class Lower(torch.nn.Module):
    """The lower variable, for libraries that want a module."""

    def __init__(self, y):
        super().__init__()
        self.y = torch.nn.Parameter(y.clone())

    def forward(self, inputs):
        return inputs @ self.y


def higher_reverse(arguments, steps):
    import higher

    x, start, (above, answers), (below, targets) = arguments
    model = Lower(start)
    descent = torch.optim.SGD(model.parameters(), STEP)

    def estimate():
        with higher.innerloop_ctx(model, descent) as (inner, optimizer):
            for _ in range(steps):
                loss = functional.cross_entropy(inner(below), targets)
                optimizer.step(loss + (torch.exp(x) * inner.y**2).sum())
            return GRAD(functional.cross_entropy(inner(above), answers), x)[0]

    return estimate


def torchopt_reverse(arguments, steps):
    import torchopt

    x, start, above, below = arguments
    optimizer = torchopt.sgd(lr=STEP)

    def estimate():
        y = (start.clone().requires_grad_(),)
        state = optimizer.init(y)
        for _ in range(steps):
            slope = GRAD(lower(x, y[0], below), y, create_graph=True)
            updates, state = optimizer.update(slope, state, inplace=False)
            y = torchopt.apply_updates(y, updates, inplace=False)
        return GRAD(fit(y[0], above), x)[0]

    return estimate


def torchopt_implicit(solve):
    def make(arguments, steps):
        from torchopt.diff.implicit import custom_root

        x, start, above, below = arguments

        def slope(y, x):
            return torch.func.grad(lower, argnums=1)(x, y, below)

        @custom_root(slope, argnums=1, solve=solve())
        @torch.enable_grad()
        def solution(y, x):
            return descend(x.detach(), y, below, steps, create_graph=False)

        return lambda: GRAD(fit(solution(start, x), above), x)[0]

    return make


def torchopt_cg():
    from torchopt import linear_solve

    return linear_solve.solve_cg(maxiter=TERMS, rtol=0.0, atol=0.0)


def torchopt_neumann():
    from torchopt import linear_solve

    return linear_solve.solve_inv(ns=True, maxiter=TERMS, alpha=STEP)


class Upper(torch.nn.Module):
    """The upper variable, likewise."""

    def __init__(self, x):
        super().__init__()
        self.x = torch.nn.Parameter(x.detach().clone())

    def forward(self, y):
        return (torch.exp(self.x) * y**2).sum()


def betty_implicit(family):
    """One outer step of its engine, whose optimiser keeps the gradient it is handed."""

    def make(arguments, steps):
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        x, start, above, below = arguments
        kept = []

        class Outer(ImplicitProblem):
            def training_step(self, batch):
                inputs, targets = batch
                return functional.cross_entropy(self.inner(inputs), targets)

            def custom_optimizer_step(self):
                kept.append(self.module.x.grad.clone())

        class Inner(ImplicitProblem):
            def training_step(self, batch):
                inputs, targets = batch
                loss = functional.cross_entropy(self.module(inputs), targets)
                return loss + self.outer(self.module.y)

        def problem(kind, name, module, samples, rate, **settings):
            return kind(
                name=name,
                config=Config(**settings),
                module=module,
                optimizer=torch.optim.SGD(module.parameters(), rate),
                train_data_loader=[samples],
                device="cpu",
            )

        terms = {f"{family}_iterations": TERMS}
        if family == "neumann":
            terms["neumann_alpha"] = STEP
        upper = problem(Outer, "outer", Upper(x), above, 0.0)
        settings = {"type": family, "unroll_steps": steps, **terms}
        inner = problem(Inner, "inner", Lower(start), below, STEP, **settings)
        links = {"u2l": {upper: [inner]}, "l2u": {inner: [upper]}}
        engine = Engine(
            problems=[upper, inner],
            config=EngineConfig(train_iters=steps, valid_step=steps + 1),
            dependencies=links,
        )

        def estimate():
            kept.clear()
            inner.module.y.data.copy_(start)
            engine.run()
            return kept[0]

        return estimate

    return make


def boat_below(feed, upper, model, params=None, **_):
    y = model.y if params is None else params[0]
    return fit(y, feed["samples"]) + upper(y)


def boat_above(feed, upper, model, params=None, **_):
    del upper
    return fit(model.y if params is None else params[0], feed["samples"])


def boat(operation):
    def make(arguments, steps):
        from boat_torch.boat_opt import Problem

        x, start, above, below = arguments
        upper, model = Upper(x), Lower(start)
        config = {
            "fo_op": None,
            "gm_op": ["NGD"],
            "na_op": [operation],
            "lower_level_model": model,
            "upper_level_model": upper,
            "lower_level_var": list(model.parameters()),
            "upper_level_var": list(upper.parameters()),
            "lower_level_opt": torch.optim.SGD(model.parameters(), STEP),
            "upper_level_opt": torch.optim.SGD(upper.parameters(), STEP),
            "lower_iters": steps,
            "device": "cpu",
            "loss_log_path": os.devnull,
            "accumulate_grad": False,
            "copy_last_param": False,
            "return_grad": True,
            "CG": {"tolerance": 0.0, "k": TERMS},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
            "RGT": {"truncate_iter": 0},
        }
        losses = {
            "lower_level_loss": {"function": f"{__name__}.boat_below", "params": {}},
            "upper_level_loss": {"function": f"{__name__}.boat_above", "params": {}},
        }
        problem = Problem(config, losses).build_ll_solver().build_ul_solver()
        feeds = {"samples": below}, {"samples": above}

        def estimate():
            upper.x.grad = None
            (grad,), _ = problem.run_iter(*feeds, current_iter=0)
            problem.loss_history.clear()  # it writes all of it after each step
            return grad

        return estimate

    return make


PEERS = types.MappingProxyType(
    {
        "reverse": {
            "torch": plain_reverse,
            "higher": higher_reverse,
            "torchopt": torchopt_reverse,
            "boat-torch": boat("RAD"),
        },
        "cg": {
            "torch": plain_implicit(conjugate_gradient),
            "torchopt": torchopt_implicit(torchopt_cg),
            "betty-ml": betty_implicit("cg"),
            "boat-torch": boat("CG"),
        },
        "neumann": {
            "torch": plain_implicit(neumann_series),
            "torchopt": torchopt_implicit(torchopt_neumann),
            "betty-ml": betty_implicit("neumann"),
            "boat-torch": boat("NS"),
        },
    }
)
