"""What the lines amount to: ratios per group, targets met or not, tables of a page."""

import math
import statistics

import channels
import compressors
import mixing
import report
from records import Target
from report import table

LARGE = 6e6  # entries from which the targets of mixing hold
FULL = 4e6  # and those of compressors: smaller copies wait for their dispatch
STEADY = 1e5  # entries below which a product waits for its dispatch


def figures(lines, keep, name="ratio"):
    """(value, case) of the lines to keep that have a figure of this name."""
    found = [(x.get(name), x["case"]) for x in lines if keep(x)]
    return [(v, case) for v, case in found if isinstance(v, float) and math.isfinite(v)]


def targets(lines):
    """All targets that these lines can speak of."""
    found = [*_mixing(lines), *_channels(lines), *_compressors(lines)]
    found += _growth(lines)
    return [target for target in found if target.figures]


def _mixing(lines):
    own = [line for line in lines if line["group"] == "mixing"]
    for graph, limit in mixing.BOUNDED.items():

        def kept(x, graph=graph):
            large = x["graph"] == graph and x["nodes"] * x["length"] >= LARGE
            return large and x["rounds"] in ("1 round", "beside")

        text = f"mixing, {graph}, n d >= {LARGE:.0e}, in place or beside: copies"
        yield Target(text, limit, _best(figures(own, kept)))
        # A product is no map in place: the floor that writes another array.
        rows = _best(figures(own, kept, "of the other floor"))
        yield Target("the same, of the other floor", limit, rows)
    # The lower quartile: what is equal comes out above one half of the time.
    name = "of their sum, low"
    rows = figures(own, lambda x: x["nodes"] * x["length"] >= STEADY, name)
    yield Target("rounds in a row: of their sum, lower quartile", 1.0, rows)


def _best(found):
    """Of each case the lesser figure of its two ways."""
    best = {}
    for figure in found:
        size = figure[1].rpartition(",")[0]
        best[size] = min(figure, best.get(size, figure))
    return list(best.values())


def _channels(lines):
    for degree, limit in channels.BOUNDED.items():

        def kept(x, degree=degree):
            own = x["group"] == "channels" and x["channel"] == channels.BLOCK
            return own and x["degree"] == degree

        text = f"{channels.BLOCK}, {degree} neighbours: copies"
        yield Target(text, limit, figures(lines, kept))
        rows = figures(lines, kept, "of its arrays")
        yield Target("the same, of its arrays where they lie", limit, rows)


def _compressors(lines):
    own = [line for line in lines if line["group"] == "compressors"]
    for family in compressors.BOUNDED:

        def kept(x, family=family):
            label = x["compressor"]
            drawn = label.split("(")[0] == family and "threefry" not in label
            return drawn and x["nodes"] * x["length"] >= FULL

        yield Target(f"{family}, round trip: copies", 4, figures(own, kept))
        rows = figures(own, kept, "of the other floor")
        yield Target("the same, of the other floor", 4, rows)
    for label, limit in compressors.FASTER.items():

        def kept(x, label=label):
            return x["compressor"] == label and x["length"] == 1_000_000

        text = f"{label} of 1e6: times as fast as lax.top_k"
        rows = figures(own, kept, "lax.top_k / this")
        yield Target(text, limit, rows, at_least=True)


def _growth(lines):
    own = [line for line in lines if line["group"] == "exponents"]
    for sweep in "nd":

        def kept(x, sweep=sweep):
            return x["sweep"] == sweep and not x["what"].startswith(("copy", "unit"))

        yield Target(f"exponent of a step in {sweep}", 1.1, figures(own, kept))
        rows = figures(own, kept, "beyond its copy")
        yield Target(f"the same, beyond a copy of its state, in {sweep}", 0.1, rows)

    def sparse(x):
        return x["sweep"] == "degree" and "top-k" in x["what"]

    text = "exponent of a compressed exchange in the degree"
    yield Target(text, 0.1, figures(own, sparse))
    ran = [x for x in lines if x.get("loss falls", "") != ""]
    rows = [(float(x["loss falls"]), x["case"]) for x in ran]
    yield Target("C2DFB on 4096 nodes: its loss falls", 1, rows, at_least=True)


def verdicts(lines):
    """One row per target: the worst figure beside its bound."""
    rows = []
    for target in targets(lines):
        value, case = target.worst
        rows.append(
            {
                "target": target.text,
                "where": case,
                "bound": f"{'>=' if target.at_least else '<='} {target.limit:g}",
                "worst": f"{value:.2f}",
                "met": "yes" if target.met else "NO",
            }
        )
    return rows


def groups(lines):
    """One row per group and what its ratios are against."""
    rows, names = [], dict.fromkeys((x["group"], x["against"]) for x in lines)
    for group, against in names:
        own = [x for x in lines if (x["group"], x["against"]) == (group, against)]
        worst = max(own, key=lambda x: x["ratio"])
        rows.append(
            {
                "group": group,
                "against": against,
                "where of the worst": worst["case"],
                "lines": len(own),
                "median": f"{statistics.median(x['ratio'] for x in own):.2f}",
                "worst": f"{worst['ratio']:.2f}",
            }
        )
    return rows


def short(lines):
    """The summary that a run prints."""
    found = ["Ratios per group:", "", *table(groups(lines), left=3)]
    if rows := verdicts(lines):
        found += ["", "Targets:", "", *table(rows, left=2)]
    return found


# Columns of the tables of a page, beside case and ratio; empty ones are left out.
COLUMNS = {
    "mixing": ("floor ms", "of the other floor", "of their sum", "form", "slots"),
    "compressors": (
        "floor ms",
        "of the other floor",
        "lax.top_k / this",
        "message bytes",
        "error",
        "law",
    ),
    "channels": ("floor ms", "of the other floor", "of its arrays", "message bytes"),
    "hypergradients": (
        "of by hand",
        "operations of by hand",
        "bytes of by hand",
        "gap to by hand",
    ),
    "steps": ("of a copy of its state", "state bytes", "operations", "bytes"),
    "growth": (),
    "exponents": ("fitted", "beyond its copy"),
}
COMMON = ("ms", "compile s", "temporary bytes")


def cell(value):
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else ""
    return str(value)


def page(lines, group):
    """The table of one group."""
    own = [line for line in lines if line["group"] == group]
    if not own:
        return []
    rows = []
    for line in own:
        row = {"case": line["case"], f"against: {line['against']}": _spread(line)}
        if group != "exponents":
            row |= {name: cell(line[name]) for name in COMMON}
        rows.append(row | {name: cell(line.get(name, "")) for name in COLUMNS[group]})
    if len({line["against"] for line in own}) > 1:
        rows = [_merged(row, line) for row, line in zip(rows, own, strict=True)]
    return [f"### {group.capitalize()}", "", *table(rows), ""]


def _merged(row, line):
    """Where units differ within a group: what the ratio is to, as a column."""
    name = f"against: {line['against']}"
    return {
        "case": row.pop("case"),
        "ratio": row.pop(name),
        "against": line["against"],
        **row,
    }


def _spread(line):
    return f"{line['ratio']:.2f} [{line['ratio low']:.2f}, {line['ratio high']:.2f}]"


def insert(path, head, lines):
    """Put the tables between the marks of a page, or write a page of tables."""
    found = [f"{head}.", "", *short(lines), ""]
    for group in dict.fromkeys(line["group"] for line in lines):
        found += page(lines, group)
    report.insert(path, "Speed", found[:-1])
