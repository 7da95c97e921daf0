"""Does the plan rank layouts as they run? Rank correlation on eight virtual CPU devices.

    python tests/benchmarks/planning.py [--config=language_model] [--steps=5]

Each layout of the first round of `lamina plan` is compiled for the CPU, estimated by the same code
with the figures of a "chip" that is an eighth of this machine (measured first: a matrix product, a
copy, an all-reduce), and run, all layouts in turns. Virtual devices share the memory and the cores,
so that a collective is a copy and nothing overlaps: this checks the sums, not the model of a torus.
Run it on an idle machine.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.stats import spearmanr

from lamina.platform import config as configs
from lamina.platform.errors import UserError
from lamina.platform.planning import search
from lamina.platform.training import compiled, experiment
from lamina.sharding.pods import chips, collectives, hlo, loops, roofline, torus


def figures() -> chips.Chip:
    """Measures an eighth of this machine."""
    matrix = jnp.ones((2048, 2048))
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    large = jnp.ones((64, 2**20))
    flops = 2 * 2048**3 / fastest(lambda: product(matrix, matrix))
    bandwidth = 2 * large.nbytes / fastest(lambda: copy(large))
    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.device_put(jnp.ones((8, 2**22)), NamedSharding(mesh, P("data")))
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
    # On a ring an all-reduce sends 7/8 of the array twice, half of it each way.
    link = 2 * 7 / 8 * rows.nbytes / 8 / fastest(lambda: total(rows)) / 2
    eighth = bandwidth / 8
    return chips.CHIPS["v5e"]._replace(
        kind="cpu", flops=flops / 8, bandwidth=eighth, link=link, network=link, ring=8
    )


def fastest(function, count: int = 5) -> float:
    """Returns the least seconds of several calls after one that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(count):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


def resolve(reference: str, overrides: dict) -> object:
    config, _ = configs.load(reference)
    for key, value in overrides.items():
        configs.override(config, key, str(value))
    return experiment.resolve(config)


def prepare(parts: experiment.Experiment, chip: chips.Chip) -> tuple[float, Callable[[], None]]:
    """Returns the estimated seconds of a step, and a function that takes one."""
    jitted, (state, batch) = compiled.single_step(parts)
    program = jitted.lower(state, batch).compile()
    module = hlo.parse(program.as_text())
    schedule = loops.schedule(module)
    places = np.array([[0, i, 0, 0] for i in range(8)])
    layout = torus.Layout(chip, dict(parts.mesh.shape), places, (8, 1, 1))
    found = collectives.collectives(module, schedule, layout)
    estimate = roofline.estimate(roofline.work(module, schedule, chip), found, chip)
    zeros = lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    values, rows = jax.tree.map(zeros, state), jax.tree.map(zeros, batch)

    def take() -> None:
        nonlocal values
        values = jax.block_until_ready(program(values, rows))

    take()
    return estimate.estimate, take


def main() -> None:
    """Prints a row for each layout, and the correlation."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="language_model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--override", action="append", default=[], help="key=value")
    given = parser.parse_args()
    base = dict(text.split("=", 1) for text in given.override)
    chip = figures()
    print(f"an eighth: {chip.flops / 1e9:.1f} GFLOP/s, {chip.bandwidth / 1e9:.2f} GB/s")
    found = []
    for candidate in search.first_round(resolve(given.config, base), 8):
        try:
            parts = experiment.assemble(resolve(given.config, {**base, **candidate.overrides}))
        except (ValueError, UserError) as error:
            print(f"{candidate.flags}: {error}")
            continue
        found.append((candidate, *prepare(parts, chip)))
    times: list[list[float]] = [[] for _ in found]
    for _ in range(given.steps):
        for each, (_, _, take) in zip(times, found, strict=True):
            start = time.perf_counter()
            take()
            each.append(time.perf_counter() - start)
    rows = []
    for each, (candidate, estimated, _) in zip(times, found, strict=True):
        rows.append((estimated, statistics.median(each)))
        print(f"{candidate.sizes} {candidate.rules:<12} {estimated:8.3f} s {rows[-1][1]:8.3f} s")
    result = spearmanr(*zip(*rows, strict=True))
    print(f"Spearman's rank correlation over {len(rows)} layouts: {result.statistic:.2f}")


if __name__ == "__main__":
    main()
