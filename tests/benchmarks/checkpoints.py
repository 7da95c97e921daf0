"""What saving costs the training: the stall of an asynchronous save against a blocking one.

    python tests/benchmarks/checkpoints.py [--megabytes=500] [--repeats=3]

The stall is the time until `Store.save` returns, when the caller may donate the state; a blocking
save also waits until the checkpoint is complete. On CPU the stall is mostly the copy that keeps the
state from the next steps, which is measured apart; the rest goes on in the background.
"""

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from lamina.platform.checkpoints.store import open_store


def seconds(action) -> float:
    """Time that a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    count = max(1, given.megabytes // 10)
    keys = jax.random.split(jax.random.key(0), count)
    state = {f"w{i}": jax.random.normal(keys[i], (1024, 2560)) for i in range(count)}
    jax.block_until_ready(state)
    stalls, totals, copies = [], [], []
    for step in range(given.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            store = open_store(folder)
            copies.append(seconds(lambda: jax.block_until_ready(jax.tree.map(jnp.copy, state))))
            start = time.perf_counter()
            store.save(step, state)
            stalls.append(time.perf_counter() - start)
            store.wait()
            totals.append(time.perf_counter() - start)
            store.close()
    stall, total, copy = (statistics.median(times[1:]) for times in (stalls, totals, copies))
    size = sum(leaf.nbytes for leaf in state.values()) / 2**20
    print(f"state               {size:7.0f} MB in {count} arrays")
    print(f"blocking save       {total:7.3f} s")
    print(f"stall of async save {stall:7.3f} s ({stall / total:.0%} of a blocking one)")
    print(f"  of it the copy    {copy:7.3f} s")


if __name__ == "__main__":
    main()
