"""One process of a case: exchanges timed, and bytes read off the loopback."""

import json
import sys
import time
from pathlib import Path

import dbojax as dbo

dbo.devices.start()

import jax
import jax.numpy as jnp
from exchanges import program
from jax.experimental.multihost_utils import process_allgather, sync_global_devices


def loopback():
    """Bytes that the kernel has sent over the loopback of this namespace."""
    for line in Path("/proc/net/dev").read_text("ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("No loopback in /proc/net/dev.")


def main(case):
    names = ("compressor", "graph", "nodes", "entries", "trips")
    run, arguments, traffic, crossings, mix = program(*(case[name] for name in names))
    jax.block_until_ready(run(*arguments))
    seconds, sent, busy = [], [], time.process_time()
    for turn in range(case["repeats"]):
        sync_global_devices(f"before {turn}")
        before, start = loopback(), time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append((time.perf_counter() - start) / case["trips"])
        sent.append((loopback() - before) / case["trips"])
    busy = (time.process_time() - busy) / case["repeats"] / case["trips"]
    wire = dbo.devices.wire(run)
    return {
        **case,
        "processes": jax.process_count(),
        "message": traffic.message,
        "links": mix.links,
        "crossings": crossings,
        "compiled": sum(wire.values()) // case["trips"],
        "kinds": sorted(wire),
        "seconds": seconds,
        "sent": sent,
        "busy": process_allgather(jnp.float32(busy)).reshape(-1).tolist(),
    }


if __name__ == "__main__":
    found = main(json.loads(sys.argv[1]))
    if dbo.devices.is_first():
        print(json.dumps(found))
