"""What the scripts of this folder share: the head of a report, tables and files."""

import csv
import os
import platform

import jax
import matplotlib
import optax

matplotlib.use("Agg")

import dbojax as dbo


def header():
    """Versions and device, for the head of a table."""
    device = jax.devices()[0]
    return (
        f"dbojax {dbo.__version__}, jax {jax.__version__}, optax {optax.__version__}, "
        f"Python {platform.python_version()}; {device.device_kind} "
        f"({os.cpu_count()} cores)"
    )


def table(rows):
    """Markdown lines; the first column is text, the others are numbers."""
    names = list(rows[0])
    rule = ["---", *["---:"] * (len(names) - 1)]
    cells = [names, rule, *([str(row[name]) for name in names] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
