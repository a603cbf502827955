"""What the scripts of this folder write: the head of a report, tables and files."""

import csv
import os
import platform

import jax
import numpy as np
import optax

import dbojax as dbo


def header():
    """Versions and device, for the head of a table."""
    device = jax.devices()[0]
    return (
        f"dbojax {dbo.__version__}, jax {jax.__version__}, optax {optax.__version__}, "
        f"Python {platform.python_version()}; {device.device_kind} "
        f"({os.cpu_count()} cores)"
    )


def table(rows, left=1):
    """Markdown lines from dictionaries; the first ``left`` columns are words."""
    names = list(rows[0])
    rule = ["---"] * left + ["---:"] * (len(names) - left)
    cells = [names, rule, *([str(row[name]) for name in names] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def quartiles(values, digits=3):
    """Median and quartiles, as a cell of a table."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def insert(path, title, lines):
    """Put lines between the marks of a page, or write a page of them alone."""
    page = f"# {title}\n\n{BEGIN}{END}\n"
    text = path.read_text("utf-8") if path.exists() else page
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{path} has no `{BEGIN}` and `{END}` to write between.")
    before, rest = text.split(BEGIN, 1)
    tables = "\n".join([BEGIN, "", *lines, "", END])
    path.write_text(before + tables + rest.split(END, 1)[1], "utf-8")
