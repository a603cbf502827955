"""Processes of one host, if need be in a network of their own with a slow link."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from cases import printed

HERE = Path(__file__).resolve().parent
MTU = 1500
BURST = 64 * 1024  # bytes: as much as a loopback hands over at a time
# Queues that never drop: a drop would measure how TCP recovers.
SHAPE = "tc qdisc add dev lo root tbf rate {rate}mbit burst {burst} limit 100000000"


def can_isolate():
    """Whether this user may have a network namespace."""
    return subprocess.call(["unshare", "-n", "true"], stderr=subprocess.DEVNULL) == 0


def can_shape():
    return can_isolate() and shutil.which("tc") is not None


def isolated(command, rate=None):
    """The command in a namespace whose only link is a loopback, shaped to Mbit/s."""
    lines = [f"ip link set lo up mtu {MTU}"]
    if rate is not None:
        lines.append(SHAPE.format(rate=rate, burst=BURST))
    lines.append('exec "$@"')
    return ["unshare", "-n", "sh", "-ec", "; ".join(lines), "sh", *command]


def launched(
    case, processes, devices=1, *, worker="exchange.py", namespace=False, rate=None
):
    """What process 0 of a case prints, as JSON."""
    command = [sys.executable, "-m", "dbojax", "launch", "-n", str(processes)]
    command += ["--devices", str(devices), str(HERE / worker), json.dumps(case)]
    if namespace:
        command = isolated(command, rate)
    return printed(command, case)
