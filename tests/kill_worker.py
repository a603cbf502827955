"""Runs checkpointed runs in children that a test may kill at any moment.

Each line of the standard input names a checkpoint, a file for the result and a file
for the phase. A child does the run; its process id is printed at once, and how it ended
as soon as it did. The children are forked, so that the imports are paid for once.
"""

import mmap
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from runner_methods import noisy

import dbojax as dbo

STEPS, EVERY, ROWS = 240, 2, 40_000
BEGIN, COMPUTE, WRITE = 0, 1, 2


def work(checkpoint, result, phase):
    # Those that may be killed read what was compiled, and leave no half of a file.
    seconds = 0.0 if checkpoint == "-" else 1e9
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)

    with open(phase, "r+b") as file:
        mark = mmap.mmap(file.fileno(), 8)

    def tell(what, step):
        mark[:8] = np.array([what, step], np.int32).tobytes()

    def batch_at(step):
        tell(COMPUTE, step)
        time.sleep(0.002)
        return np.full((4, 3), np.sin(step))

    def evaluate(state):
        tell(WRITE, int(state[0].count))
        return {"loss": state[0].x.sum()}

    small = noisy()

    def step(key, state, batch):
        inner, metrics = small.step(key, state[0], batch)
        return (inner, state[1] + inner.x[0, 0]), metrics

    x = jnp.arange(12.0).reshape(4, 3)
    state, history = dbo.run(
        dbo.Algorithm(lambda x, y: x, step),
        jax.random.key(1),
        (small.init(x, x), jnp.zeros(ROWS)),
        dbo.from_host(batch_at),
        STEPS,
        every=EVERY,
        evaluate=evaluate,
        checkpoint=None if checkpoint == "-" else checkpoint,
    )
    dbo.checkpoints.save(result, state, columns=history)


def main():
    for line in sys.stdin:
        child = os.fork()
        if not child:
            work(*line.split())
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(status, flush=True)


if __name__ == "__main__":
    main()
