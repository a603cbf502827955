"""Bits to a small gradient: logistic regression with a nonconvex regulariser."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from cdadam_common import B1, B2, Method, adaptive, cd_adam, over, sent, short
from report import table, write_csv

import dbojax as dbo

NODES, SAMPLES, FULL = 20, 2000, 32561
RATES, STEPS_OF_SGD = (3e-3, 1e-2, 3e-2), (0.1, 0.3, 1.0)
TARGETS = (1e-3, 1e-4, 1e-5, 1e-6)
LAST = 50  # norms of the last steps, whose mean is the final value


class Found(NamedTuple):
    """Squared gradient norms of one method, and the bytes of a run."""

    norms: np.ndarray  # (rates, starts, steps + 1), before each step and at the end
    rates: tuple
    bits: np.ndarray  # (steps + 1,), up and down, of one worker

    @property
    def final(self):
        return self.norms[..., -LAST:].mean(-1)

    @property
    def best(self):
        """Number of the rate with the least final value, for each start."""
        return np.nanargmin(np.where(np.isfinite(self.final), self.final, np.inf), 0)

    def chosen(self, values):
        """Of values (rates, starts), those at the best rates."""
        return values[self.best, np.arange(values.shape[1])]

    def steps_to(self, target):
        """(rates, starts); infinity where the target is not reached."""
        under = self.norms <= target
        return np.where(under.any(-1), under.argmax(-1), np.inf)

    def bits_to(self, target):
        steps = self.steps_to(target)
        reached = np.isfinite(steps)
        return np.where(
            reached, self.bits[np.where(reached, steps, 0).astype(int)], np.inf
        )


def methods(steps):
    """Label -> method."""
    mix, c = dbo.mixing.averaging(NODES), dbo.channels
    sign, top = dbo.compressors.sign(), dbo.compressors.top_k(0.1)

    def ef21(rate):
        decayed = dbo.optim.two_step_decay(rate, steps)
        return dbo.optim.ef21_sgd(decayed, mix, sign, downlink=sign)

    return {
        **adaptive(mix, RATES, steps),
        "CD-Adam, top 10 %": cd_adam(mix, top, RATES, steps),
        "naive, top 10 %": over(c.server(mix, top, top), RATES, steps),
        "EF21-SGD, sign": Method(ef21, STEPS_OF_SGD),
    }


def run(method, loss, batch, starts, steps):
    """Squared norm of the mean gradient before each step and at the end."""

    def one(rate, start):
        tx = method.make(rate)

        def slopes(params):
            rows = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
            return rows, jnp.sum(jnp.mean(rows, 0) ** 2)

        def step(carry, _):
            params, state = carry
            rows, norm = slopes(params)
            updates, state = tx.update(rows, state, params)
            return (optax.apply_updates(params, updates), state), norm

        (params, _), norms = jax.lax.scan(step, (start, tx.init(start)), length=steps)
        return jnp.append(norms, slopes(params)[1])

    over_starts = jax.vmap(one, (None, 0))
    over_rates = jax.jit(jax.vmap(over_starts, (0, None)))
    norms = over_rates(jnp.asarray(method.rates), starts)
    after = sent(method, starts[0])
    bits = 8 * sum(after(np.arange(steps + 1)))
    return Found(np.asarray(norms), method.rates, bits)


def datasets(options):
    """Name -> (how it came, inputs, labels)."""
    data = dbo.tasks.data
    size = FULL if options.full else SAMPLES
    found = {
        "breast_cancer": data.standardised(data.breast_cancer()),
        "one_hot": data.one_hot(m=size),
    }
    for path in options.libsvm:
        found[path.stem] = dbo.tasks.readers.libsvm(path)
    return found


def compare(dataset, options):
    """Label -> Found."""
    build = functools.partial(
        dbo.tasks.logistic_regression, dataset.inputs, dataset.labels, n=NODES
    )
    task = build()
    starts = jnp.stack([build(seed=seed).params0 for seed in range(options.starts)])
    found = {}
    for label, method in methods(options.steps).items():
        begin = time.perf_counter()
        found[label] = run(method, task.loss, task.batch, starts, options.steps)
        print(f"    {label}: {time.perf_counter() - begin:.1f} s", flush=True)
    return found


def rows_of(found):
    """A row per method: finals of each start, median bits and steps to the targets."""
    for label, one in found.items():
        finals = " / ".join(f"{value:.1e}" for value in one.chosen(one.final))
        rates = sorted({one.rates[i] for i in one.best})
        row = {"method": label, "bits per step": short(one.bits[-1] - one.bits[-2])}
        row["rates"] = ", ".join(f"{rate:g}" for rate in rates)
        row["final squared norm per start"] = finals
        for target in TARGETS:
            bits = one.chosen(one.bits_to(target))
            steps = one.chosen(one.steps_to(target))
            missed = int((~np.isfinite(bits)).sum())
            cell = f"{short(np.median(bits))} in {short(np.median(steps))}"
            if np.isinf(np.median(bits)):
                cell = "never"
            if missed:
                cell += f" ({missed} of {len(bits)} missed)"
            row[f"{target:g}"] = cell
        yield row


def verdict(found):
    """Which of the expected statements hold on one data set, in words."""
    dense, ours = found["AMSGrad, dense"], found["CD-Adam, sign"]
    finals = {label: one.chosen(one.final) for label, one in found.items()}
    naive = finals.pop("naive, sign")
    worst = (naive >= np.max(list(finals.values()), 0)).sum()
    sparse = finals.pop("naive, top 10 %")
    worst_but_one = (naive >= np.max(list(finals.values()), 0)).sum()
    lines = [
        f"- Naive sign ends highest of all from {worst} of {len(naive)} starts, and of "
        f"all but naive top 10 % from {worst_but_one}; the latter ends above it from "
        f"{(sparse > naive).sum()}."
    ]
    both = [
        target
        for target in TARGETS
        if np.isfinite([one.chosen(one.bits_to(target)) for one in (dense, ours)]).all()
    ]
    if not both:
        return [
            *lines,
            "- No target is reached from all starts by AMSGrad and CD-Adam.",
        ]
    target = both[-1]
    for name, pick in (
        ("at the rates of the table", lambda one, values: one.chosen(values)),
        ("each at the rate that gets there first", lambda one, values: values.min(0)),
    ):
        bits = [np.median(pick(one, one.bits_to(target))) for one in (dense, ours)]
        steps = [np.median(pick(one, one.steps_to(target))) for one in (dense, ours)]
        lines.append(
            f"- To {target:g}, the least target that CD-Adam with signs and AMSGrad "
            f"both reach from all starts, {name}: median {short(bits[1])} bits "
            f"against {short(bits[0])}, {bits[0] / bits[1]:.1f} times fewer, in "
            f"{steps[1] / steps[0]:.2f} times the steps ({steps[1]:.0f} against "
            f"{steps[0]:.0f})."
        )
    feedback = found["EF, sign"]
    lower = feedback.chosen(feedback.final) < ours.chosen(ours.final)
    reached = np.isfinite(feedback.chosen(feedback.bits_to(target)))
    return [
        *lines,
        f"- Error feedback with signs reaches it from {reached.sum()} of "
        f"{len(reached)} starts, and ends below CD-Adam with signs from {lower.sum()}.",
    ]


def picture(found, path):
    """Median over the starts of the squared norm, against the bits of one worker."""
    figure, axes = plt.subplots(
        1,
        len(found),
        figsize=(6 * len(found), 4.5),
        layout="constrained",
        squeeze=False,
    )
    for ax, (name, methods) in zip(axes[0], found.items(), strict=True):
        for label, one in methods.items():
            norms = one.norms[one.best, np.arange(len(one.best))]
            style = "--" if "dense" in label else ":" if "naive" in label else "-"
            ax.plot(one.bits[1:], np.median(norms, 0)[1:], style, label=label)
        ax.set(xscale="log", yscale="log", title=name, ylim=(1e-10, None))
        ax.set(xlabel="bits of one worker, up and down", ylabel="squared gradient norm")
    axes[0, 0].legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def report(options):
    """Run, write CSV and picture, and return the lines of this part."""
    found, raw = {}, []
    lines = [
        "## Bits to a small gradient: logistic regression",
        "",
        f"Nonconvex regulariser 0.1, {NODES} workers, samples dealt out in order, "
        f"full local gradients, {jnp.zeros(0).dtype}, {options.steps} steps, the rate "
        "divided by 10 at half and again at three quarters of them, betas "
        f"({B1:g}, {B2:g}); starts "
        f"default_rng(s).normal for s = 0 to {options.starts - 1}. "
        f"Each method takes from each start the one of three rates with the least "
        f"final value: {', '.join(f'{r:g}' for r in RATES)}, for EF21-SGD "
        f"{', '.join(f'{r:g}' for r in STEPS_OF_SGD)}. Final: mean squared norm of the "
        f"gradient over the last {LAST} steps. Bits are those of the arrays that one "
        "worker sends and gets; columns 0.001 to 1e-06: median bits until the squared "
        "norm is no larger, and in how many steps. Signs, error feedback, top 10 % and "
        "1-bit Adam are compressed both ways.",
    ]
    for name, dataset in datasets(options).items():
        print(f"  {name}", flush=True)
        found[name] = compare(dataset, options)
        lines += ["", f"### {name}, {' x '.join(map(str, dataset.inputs.shape))}", ""]
        lines += [*table(list(rows_of(found[name]))), "", *verdict(found[name])]
        for label, one in found[name].items():
            for start in range(options.starts):
                for i, rate in enumerate(one.rates):
                    row = {"data": name, "method": label, "start": start, "rate": rate}
                    row["final"] = one.final[i, start]
                    for target in TARGETS:
                        row[f"steps to {target:g}"] = one.steps_to(target)[i, start]
                        row[f"bits to {target:g}"] = one.bits_to(target)[i, start]
                    raw.append(row)
    write_csv(options.out / "logistic.csv", raw)
    picture(found, options.out / "logistic.png")
    return lines
