"""Steps per second of `run` against a careful loop by hand, on the same model, data and optimizer.

    python tests/benchmarks/loop.py [--rounds=7] [--peer_python=PATH]

Both train in one process, in turns; a figure is the median over rounds of the ratio within a
round, so what else the machine does falls out. The loop by hand is what a careful user of Flax NNX
and optax writes: pure functions of `nnx.split` states, donated and jitted once, the data on the
device, a dispatch a step, and the loss read every ten steps. `--peer_python` names an interpreter
with PyTorch, whose training steps `peers.py` then times in its own process, for `run` to train the
same models: there each side's fastest time counts, since the two can't take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from lamina.models.mlp import mlp
from lamina.platform.data import order
from lamina.platform.run import run
from lamina.platform.training import experiment

CASES = {
    # name: widths, batch size, steps, steps_per_call
    "5ms": ((1024, 1024), 128, 400, 1),
    "5ms_10_a_call": ((1024, 1024), 128, 400, 10),
    "tiny": ((32,), 32, 4000, 1),
    "tiny_50_a_call": ((32,), 32, 4000, 50),
}

PEER_DATA = {
    # model of peers.py: the data whose batches are as large, steps
    "mlp": ({"name": "digits"}, 4000),
    "convnet": ({"name": "fashion_mnist"}, 200),
    "transformer": ({"name": "python_stdlib", "context": 256}, 30),
}


def config(widths: tuple[int, ...], batch_size: int, steps: int, steps_per_call: int) -> ConfigDict:
    """Returns the run's config."""
    return ConfigDict(
        {
            "steps": steps,
            "data": {"name": "digits", "batch_size": batch_size},
            "model": {"name": "mlp", "widths": widths},
            "task": {"name": "classification"},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "schedule": {"name": "cosine", "warmup_steps": 50},
            "log_every": max(10, steps_per_call),
            "steps_per_call": steps_per_call,
            "trackers": (),
        }
    )


def by_hand(c: ConfigDict) -> tuple[float, float]:
    """Trains by hand.

    Returns:
        Steps per second without compilation, and the last loss.
    """
    dataset = experiment.open_dataset(experiment.resolve(c).data, ())
    train = dataset.splits["train"].arrays
    images, labels = (jax.device_put(train[k]) for k in ("inputs", "labels"))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 50, c.steps)
    optimizer = optax.adamw(schedule)
    model = mlp(nnx.Rngs(0), dataset.spec, jnp.float32, widths=tuple(c.model.widths))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params, rest, x, y):
        logits = nnx.merge(graph, params, rest)(x).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params, state, rest, images, labels, rows):
        loss, grads = jax.value_and_grad(loss_of)(params, rest, images[rows], labels[rows])
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    state = jax.jit(optimizer.init)(params)
    size = c.data.batch_size
    rows = lambda i: jnp.asarray(order.indices(len(labels), 0, i * size, size).astype(np.int32))
    params, state, loss = jitted(params, state, rest, images, labels, rows(0))
    jax.block_until_ready(loss)
    start, pending = time.perf_counter(), loss
    for i in range(1, c.steps):
        params, state, loss = jitted(params, state, rest, images, labels, rows(i))
        if i % 10 == 0:
            float(pending)
            pending = loss
    last = float(loss)
    return (c.steps - 1) / (time.perf_counter() - start), last


def by_run(c: ConfigDict) -> tuple[float, float]:
    """Trains with `run`; returns steps per second without compilation, and the last loss."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(c, folder, console=False)
        return result.summary["steps_per_second"], result.final["train/loss"].mean


def measure(name: str, rounds: int) -> dict[str, float]:
    """Returns the figures of one case."""
    c = config(*CASES[name])
    ratios, hand_steps, run_steps = [], [], []
    for i in range(rounds):
        pair = (by_hand, by_run) if i % 2 else (by_run, by_hand)
        found = {way.__name__: way(c)[0] for way in pair}
        hand_steps.append(found["by_hand"])
        run_steps.append(found["by_run"])
        ratios.append(found["by_run"] / found["by_hand"])
    return {
        "case": name,
        "by_hand_ms": 1e3 / statistics.median(hand_steps),
        "run_ms": 1e3 / statistics.median(run_steps),
        "run / by hand, steps per second": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def beside_peer(python: str) -> list[dict[str, float | str]]:
    """Returns PyTorch's milliseconds a step beside those of `run`, on the same models.

    Args:
        python: an interpreter with PyTorch, which runs `peers.py` in a process of its own.
    """
    script = str(Path(__file__).with_name("peers.py"))
    found = subprocess.run([python, script], check=True, stdout=subprocess.PIPE, text=True)
    lines = []
    for name, modes in json.loads(found.stdout)["models"].items():
        data, steps = PEER_DATA[name]
        c = config((1,), modes["eager"]["batch_size"], steps, 10)
        c.data.update(data)
        c.model = ConfigDict({k: _plain(v) for k, v in modes.pop("lamina_config").items()})
        if data["name"] == "python_stdlib":
            c.task = ConfigDict({"name": "language_modeling"})
        ours = min(1e3 / by_run(c)[0] for _ in range(3))
        line: dict[str, float | str] = {"model": name, "run_ms": ours}
        for mode, times in modes.items():
            line[f"torch_{mode}_ms"] = times["fastest_ms"]
            line[f"run / torch {mode}, steps per second"] = times["fastest_ms"] / ours
        lines.append(line)
    return lines


def _plain(value):
    return tuple(value) if isinstance(value, list) else value


def main() -> None:
    """Measures all cases and prints a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated names")
    parser.add_argument("--peer_python", default="", help="an interpreter that has PyTorch")
    given = parser.parse_args()
    print(json.dumps({"load": os.getloadavg()[0], "jax": jax.__version__}))
    for name in given.cases.split(","):
        print(json.dumps(measure(name, given.rounds)), flush=True)
    if given.peer_python:
        for line in beside_peer(given.peer_python):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
