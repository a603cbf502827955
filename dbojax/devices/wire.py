"""Bytes that cross between devices, counted in the compiled program."""

from __future__ import annotations

import collections
import math
import re

_SHAPE = re.compile(r"\b(pred|[a-z]\w*?(\d+))\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)"
    r"(-start)?\("
)
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")


def wire(compiled) -> dict[str, int]:
    r"""Count what a compiled program sends from device to device.

    .. math::
        \text{permute} = \sum_{s \ne t} b, \quad
        \text{gather} = (D - 1) D b, \quad \text{reduce} = 2 (D - 1) b

    for operands of b bytes and groups of D devices, a reduction going around a ring.
    What stands in a loop counts as often as the loop runs, and of the branches of a
    choice the one that sends most.

    Args:
        compiled: from ``jax.jit(f).lower(...).compile()``, for several devices.

    Returns:
        Bytes over all devices by kind of collective; kinds that do not occur are left
        out.

    Raises:
        ValueError: if the program does not tell how often a loop with a collective in
            it runs, or which devices take part.

    Examples:
        >>> mesh = dbo.devices.mesh(8)
        >>> mix = dbo.mixing.mixer(dbo.topology.metropolis(dbo.topology.ring(8)))
        >>> v = dbo.devices.place(jnp.ones((8, 5), jnp.float32), mesh)
        >>> exchange = jax.jit(dbo.devices.spread(mix, mesh).apply)
        >>> dbo.devices.wire(exchange.lower(v).compile())
        {'collective-permute': 320}
    """
    bodies, entry = _computations(compiled.as_text())
    return dict(_count(entry, bodies))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by name, and the name of the first to run."""
    bodies, entry, name = {}, "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = head.group(2)
            bodies[name] = []
            entry = name if head.group(1) else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _count(name: str, bodies: dict[str, list[str]]) -> collections.Counter[str]:
    total = collections.Counter()
    for line in bodies[name]:
        if found := _COLLECTIVE.search(line):
            shapes, kind, starts = found.groups()
            total[kind] += _crossing(kind, _bytes(shapes), bool(starts), line)
        elif loop := re.search(r" while\(.*body=%?([\w.-]+)", line):
            total += _repeated(line, _count(loop.group(1), bodies))
        elif called := _called(line):
            sent = [_count(each, bodies) for each in called]
            total += max(sent, key=lambda count: count.total())
    return total


def _repeated(line: str, sent: collections.Counter[str]) -> collections.Counter[str]:
    trips = _TRIPS.search(line)
    if not sent:
        return sent
    if trips is None:
        raise ValueError(
            f"A loop sends {dict(sent)} bytes each time, and the program does not tell "
            "how often it runs. Use `jax.lax.scan` or `fori_loop` with a fixed length."
        )
    times = int(trips.group(1))
    return collections.Counter({kind: times * count for kind, count in sent.items()})


def _called(line: str) -> list[str]:
    """Computations of which the line runs one: several are the branches of a choice."""
    found = []
    for one, several in _CALLED.findall(line):
        found += [one] if one else re.findall(r"%?([\w.-]+)", several)
    return found


def _bytes(shapes: str) -> int:
    total = 0
    # Scalars u32[] are a back end's own notes.
    for name, bits, lengths in _SHAPE.findall(shapes.replace("u32[]", "")):
        width = 8 if name == "pred" else int(bits)
        entries = math.prod(map(int, filter(None, lengths.split(","))))
        total += -(-entries * width // 8)
    return total


def _crossing(kind: str, shown: int, starts: bool, line: str) -> int:
    """Bytes over all devices, from those that the line shows for one.

    They are those of its result; a collective that only starts shows its operand, too.
    """
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        found = re.findall(r"\{?(\d+),(\d+)", pairs.group(1)) if pairs else []
        crossing = sum(source != target for source, target in found)
        return shown * crossing // (2 if starts else 1)
    groups, size = _groups(line)
    if kind == "all-reduce":
        return 2 * groups * (size - 1) * shown
    if kind == "reduce-scatter":
        return groups * (size - 1) * size * shown
    result = shown * size // (size + 1) if starts else shown
    return groups * (size - 1) * result


def _groups(line: str) -> tuple[int, int]:
    """How many groups of devices, and how many devices in each."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota.group(1)), int(iota.group(2))
    if named := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line):
        lengths = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        size = math.prod(lengths[k] for k in re.findall(r"'(\w+)'", named.group(2)))
        return math.prod(lengths.values()) // size, size
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        groups = re.findall(r"\{([\d,]+)\}", listed.group(1))
        return len(groups), len(groups[0].split(","))
    raise ValueError(f"This line does not tell its groups of devices: {line.strip()}")
