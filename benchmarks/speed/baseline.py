"""What was measured before on the same kind of device, and what has become worse."""

import csv
import math
import os
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "baselines"
WORSE = 1.2  # times what it was
FEWEST = 5  # turns without which quartiles say nothing of noise
KEPT = (
    "group",
    "case",
    "ratio",
    "ratio low",
    "ratio high",
    "turns",
    "operations",
    "bytes",
    "jax",
)
FITS = "exponents"  # a group whose figures are no multiples of anything


def device_name(device, cpus=None):
    """File name of a kind of device: `cpu-amd-epyc-2-cores`."""
    words = [device.platform, device.device_kind]
    if device.platform == "cpu":
        words.append(f"{cpus or os.cpu_count()} cores")
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    return re.sub(r"\b(\w+)(-\1\b)+", r"\1", slug)  # `cpu cpu 2 cores`


def save(path, lines):
    """Keep these lines, and those of groups that were not measured now."""
    groups = {line["group"] for line in lines}
    kept = [line for line in load(path) if line["group"] not in groups]
    rows = [{name: line[name] for name in KEPT} for line in [*kept, *lines]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, KEPT)
        writer.writeheader()
        writer.writerows(rows)


def load(path):
    """The lines of a baseline; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    words = ("group", "case", "jax")
    return [
        {name: text if name in words else float(text) for name, text in row.items()}
        for row in rows
    ]


def compare(lines, before):
    """What is worse than it was, as sentences; empty if nothing is.

    A time is worse where its ratio to the floor has grown by a fifth beyond noise: the
    lower quartile of now is above 1.2 times the upper one of then. A count of the
    compiler, which knows no noise, is worse where it has grown by a fifth, at the same
    version of JAX.
    """
    old, found = {(line["group"], line["case"]): line for line in before}, []
    for line in lines:
        was = old.get((line["group"], line["case"]))
        if was is None or line["group"] == FITS:
            continue
        many = min(line["turns"], was["turns"]) >= FEWEST
        if many and line["ratio low"] > WORSE * was["ratio high"]:
            found.append(_sentence(line, "ratio", was))
        if line["jax"] != was["jax"]:
            continue
        for name in ("operations", "bytes"):
            if _grown(line[name], was[name]):
                found.append(_sentence(line, name, was))
    return found


def _grown(now, was):
    return math.isfinite(now) and math.isfinite(was) and now > max(WORSE * was, 1)


def _sentence(line, name, was):
    return (
        f"{line['group']}: {line['case']}: {name} {line[name]:.3g}, was {was[name]:.3g}"
    )
