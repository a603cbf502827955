"""C²DFB at 20 Newsgroups size, and on 4 096 nodes: memory, time, bytes, learning.

    python benchmarks/size.py            # about five minutes on two cores
    python benchmarks/size.py --short    # small sizes, a minute: does it run?

Text is the sparse stand-in of 20 Newsgroups: 10 nodes on a ring, x has 130 107 entries
and y 2 602 140. The networks have a quadratic with a diagonal curvature, x and y of
10 000 entries at each node. Each case runs in a process of its own; its peak is the
most memory that process ever held. The state is donated to the step, float32.
"""

from environment import ensure

ensure(["tasks"])

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from cases import printed
from report import header, table, write_csv

HERE = Path(__file__).resolve().parent
LIMIT = 8 * 2**30
TEXT = {
    "kind": "text",
    "nodes": 10,
    "documents": 18_846,
    "features": 130_107,
    "graph": "ring",
    "upper_step": 100.0,
    "lower_step": 100.0,
}
CLASSES = 20
NETWORK = {
    "kind": "network",
    "nodes": 4096,
    "features": 10_000,
    "inner_steps": 2,
    "steps": 3,
    "upper_step": 0.1,
    "lower_step": 0.3,
}
# Small enough for a sign, whose contraction may be as weak as 1 / d.
GAMMA = {"dense": 0.6, "block top-20 %": 0.3, "top-20 %": 0.3}
CASES = [
    {**TEXT, "compressor": "block top-20 %", "inner_steps": 10, "steps": 3},
    {**TEXT, "compressor": "sign", "inner_steps": 10, "steps": 2},
    {**TEXT, "compressor": "dense", "inner_steps": 10, "steps": 1},
    {**TEXT, "compressor": "top-20 %", "inner_steps": 3, "steps": 1},
    *(
        {**NETWORK, "graph": graph, "compressor": compressor}
        for graph in ("ring", "exponential")
        for compressor in ("block top-1 %", "sign")
    ),
]
SHORT = {
    "text": {"documents": 400, "features": 3000, "inner_steps": 2},
    "network": {"nodes": 64, "features": 500},
}


def gamma(case):
    if case["compressor"] in GAMMA:
        return GAMMA[case["compressor"]]
    return {"text": 0.1, "network": 0.05}[case["kind"]]


def cases(short):
    for case in CASES:
        yield {**case, "gamma": gamma(case), **(SHORT[case["kind"]] if short else {})}


def run(case):
    """The case in a process of its own, started like this one."""
    script = str(HERE / "size_cases.py")
    return printed([sys.executable, script, json.dumps(case)], case)


def formula(dx, dy, rounds, ratio=None, index=4):
    """Bytes per link and outer step, specification of the method, section 4."""
    entries = dy * 4 if ratio is None else math.ceil(ratio * dy - 1e-9) * (4 + index)
    return 2 * dx * 4 + 2 * rounds * 2 * entries


def giga(count):
    return f"{count / 2**30:.2f}"


def row(case):
    """What all cases tell."""
    seconds = case["seconds"]
    return {
        "compressor": case["compressor"],
        "K": case["inner_steps"],
        "steps": case["steps"],
        "peak GiB": giga(case["peak"]),
        "state GiB": giga(case["state"]),
        "temporary GiB": giga(case["temporary"]),
        "s / step": f"{np.median(seconds):.1f}",
        "s / inner round": f"{np.median(seconds) / case['inner_steps']:.2f}",
        "compile s": f"{case['compile_seconds']:.1f}",
        "MB / link / step": f"{case['message'] / 1e6:.3f}",
    }


def text_row(case):
    first, last = case["scores"][0], case["scores"][-1]
    return row(case) | {
        "test loss": f"{first['test_loss']:.3f} → {last['test_loss']:.3f}",
        "test accuracy": (
            f"{first['test_accuracy']:.3f} → {last['test_accuracy']:.3f}"
        ),
    }


def network_row(case):
    slopes = [score["slope"] for score in case["scores"]]
    return (
        {"graph": case["graph"]}
        | row(case)
        | {
            "hypergradient": f"{slopes[0]:.0f} → {slopes[-1]:.0f}",
            "mixer s": f"{case['mixer_seconds']:.1f}",
            "peak then GiB": giga(case["mixer_peak"]),
        }
    )


def expected(case):
    """What the formula says of a text case; None for a sign, of which it is silent."""
    if case["compressor"] == "sign":
        return None
    ratio = None if case["compressor"] == "dense" else 0.2
    d = case["features"]
    return formula(d, d * CLASSES, case["inner_steps"], ratio)


def exact(case):
    return case["message"] == expected(case)


def byte_rows(found):
    """Measured bytes of the text cases beside the formula, at their own K."""
    for case in found:
        spec = expected(case)
        yield {
            "compressor": case["compressor"],
            "K": case["inner_steps"],
            "measured MB": f"{case['message'] / 1e6:.3f}",
            "formula MB": "-" if spec is None else f"{spec / 1e6:.3f}",
            "at K = 10, MB": f"{at_ten(case) / 1e6:.1f}",
        }


def at_ten(case):
    """Bytes of a step with ten inner rounds, from those of a step with K."""
    outer = 2 * case["features"] * 4
    return outer + (case["message"] - outer) * 10 / case["inner_steps"]


def learns(case):
    scores = case["scores"]
    name = "test_loss" if case["kind"] == "text" else "slope"
    return case["finite"] and scores[-1][name] < scores[0][name]


def yes(condition):
    return "yes" if condition else "NO"


def reading(found):
    text = [case for case in found if case["kind"] == "text"]
    network = [case for case in found if case["kind"] == "network"]
    block, dense = text[0], next(c for c in text if c["compressor"] == "dense")
    sign = next(c for c in text if c["compressor"] == "sign")
    score = block["scores"][-1]
    far = max(case["peak"] for case in found)
    most = max(case["temporary"] / case["state"] for case in found)
    slow = next(c for c in text if c["compressor"] == "top-20 %")
    pace = np.median(slow["seconds"]) / np.median(block["seconds"])
    pace *= block["inner_steps"] / slow["inner_steps"]
    paces = [f"{np.median(case['seconds']):.1f}" for case in network]
    mixers = max(case["mixer_seconds"] for case in network)
    mixer_peak = max(case["mixer_peak"] for case in network)
    return [
        "What to read off it:",
        "",
        f"- Every case stays within 8 GiB: {yes(far <= LIMIT)}, the most is "
        f"{giga(far)} GiB. Temporaries of a step take up to {most:.1f} times the "
        "state, which is held once.",
        f"- C²DFB at 20 Newsgroups size takes {np.median(block['seconds']):.0f} s per "
        f"outer step of {block['inner_steps']} inner rounds with block top-20 %. "
        f"After {block['steps']} steps the test loss of the stand-in has gone from "
        f"{block['scores'][0]['test_loss']:.2f} to {score['test_loss']:.2f}, test "
        f"accuracy is {score['test_accuracy']:.2f} (chance {1 / CLASSES:.2f}). "
        f"All text cases learn: {yes(all(map(learns, text)))}.",
        f"- Bytes per link and outer step at K = 10: dense {at_ten(dense) / 1e6:.1f} "
        f"MB, as the formula says: {yes(exact(dense))}; top-20 % "
        f"{at_ten(slow) / 1e6:.1f} MB, as it says: {yes(exact(slow))}. Block top-20 % "
        "sends a row number of one byte and not an index of four, "
        f"{at_ten(block) / 1e6:.1f} MB; a sign {at_ten(sign) / 1e6:.1f} MB.",
        f"- An inner round with exact top-20 % takes {pace:.1f} times as long as one "
        f"with block top-20 %, on this device and in the first {slow['inner_steps']}.",
        f"- {network[0]['nodes']} nodes with {network[0]['features']} entries: "
        f"{' / '.join(paces)} s per "
        f"outer step of {network[0]['inner_steps']} inner rounds, in the order of the "
        f"table, peak {giga(max(c['peak'] for c in network))} GiB. The exact "
        f"hypergradient at the mean falls in all: {yes(all(map(learns, network)))}. "
        "These few steps show that the method runs; on a ring of that length nodes "
        "need many more to agree.",
        f"- Graph, weights and mixer of the network take {mixers:.1f} s and "
        f"{giga(mixer_peak)} GiB at most, interpreter and JAX included.",
    ]


def busy(before):
    after = os.getloadavg()[0]
    told = f"Load average {before:.1f} at the start and {after:.1f} at the end"
    if before > 1.5 * (os.cpu_count() or 1):
        return f"{told}: the machine had other work too, so times are rough."
    return f"{told}."


def page(found, before, short):
    text = [case for case in found if case["kind"] == "text"]
    network = [case for case in found if case["kind"] == "network"]
    sizes = [
        f"{text[0]['nodes']} nodes on a ring, {text[0]['documents']} documents, "
        f"dx = {text[0]['features']}, dy = {text[0]['features'] * CLASSES}.",
        f"{network[0]['nodes']} nodes, dx = dy = {network[0]['features']}.",
    ]
    return [
        "# C²DFB at full size",
        "",
        f"`python benchmarks/size.py{' --short' if short else ''}` writes this page.",
        "",
        *reading(found),
        "",
        f"{header()}, float32. {busy(before)} Seconds are medians over the steps, the "
        "device blocked; memory is that of the whole process.",
        "",
        "## Coefficient tuning on sparse text",
        "",
        sizes[0],
        "",
        *table(list(map(text_row, text))),
        "",
        "Bytes of one link in one outer step beside the formula (32-bit indices):",
        "",
        *table(list(byte_rows(text))),
        "",
        "## Many nodes",
        "",
        sizes[1],
        "",
        *table(list(map(network_row, network)), left=2),
        "",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, default=Path("results/size"))
    options = parser.parse_args()
    before, found = os.getloadavg()[0], []
    for case in cases(options.short):
        found.append(run(case))
        done = found[-1]
        print(
            f"{done['kind']}, {done['graph']}, {done['compressor']}: "
            f"{giga(done['peak'])} GiB, {done['seconds']} s",
            flush=True,
        )
    lines = page(found, before, options.short)
    print(*lines, sep="\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "size.md").write_text("\n".join(lines), encoding="utf-8")
    flat = [
        {k: v for k, v in case.items() if not isinstance(v, list)}
        | {"median_seconds": float(np.median(case["seconds"]))}
        for case in found
    ]
    names = dict.fromkeys(name for case in flat for name in case)
    write_csv(
        options.out / "size.csv",
        [{name: case.get(name, "") for name in names} for case in flat],
    )


if __name__ == "__main__":
    main()
