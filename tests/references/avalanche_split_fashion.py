"""Runs the acceptance protocol with Avalanche: `python avalanche_split_fashion.py er --seeds=5`.

In an environment of its own, with avalanche-lib 0.6.0, torch and quadprog. Takes any number of
learners, and prints one line of JSON for each: accuracies [seed, time, task], and wall and CPU
seconds of each run without imports and reading of the data. `--out=avalanche.json` puts the
accuracies into that file, beside those of other learners that it has.

Batches of 10 come in three ways: `er_batch_10` has the five large experiences, at whose ends the
memory is filled, and replays the past only; `online_er` and `online_er_reservoir` are Avalanche's
online protocol, in which each batch is an experience of its own, after which the memory (balanced
by class, or a reservoir) takes it.
"""

import argparse
import gzip
import json
import random
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training import plugins, storage_policy, supervised
from torch import nn

FOLDER = Path("/usr/share/datasets/fashion-mnist")
SMALL_BATCHES = ("er_batch_10", "online_er", "online_er_reservoir")


def read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    with gzip.open(FOLDER / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 784)
    with gzip.open(FOLDER / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read()[8:], np.uint8)
    return torch.tensor(images.astype(np.float32) / 255), torch.tensor(labels.astype(np.int64))


def strategy(name: str, model: nn.Module):
    common = {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-3),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": 10 if name in SMALL_BATCHES else 128,
        "train_epochs": 1,
        "eval_mb_size": 1000,
        "device": "cpu",
        "evaluator": plugins.EvaluationPlugin(),
    }
    if name == "er" or name in SMALL_BATCHES:
        if name == "online_er_reservoir":
            policy = storage_policy.ReservoirSamplingBuffer(500)
        else:
            policy = storage_policy.ClassBalancedBuffer(500, adaptive_size=True)
        rows = 10 if name in SMALL_BATCHES else 128
        replay = plugins.ReplayPlugin(500, batch_size_mem=rows, storage_policy=policy)
        return supervised.Naive(**common, plugins=[replay])
    makers = {
        "finetune": lambda: supervised.Naive(**common),
        "cumulative": lambda: supervised.Cumulative(**common),
        "joint": lambda: supervised.JointTraining(**common),
        "ewc": lambda: supervised.EWC(**common, ewc_lambda=100.0),
        "lwf": lambda: supervised.LwF(**common, alpha=1.0, temperature=2.0),
        "agem": lambda: supervised.AGEM(**common, patterns_per_exp=100, sample_size=128),
        "gem": lambda: supervised.GEM(**common, patterns_per_exp=100, memory_strength=0.5),
        "si": lambda: supervised.SynapticIntelligence(**common, si_lambda=0.1),
        "der": lambda: supervised.DER(
            **common, mem_size=500, batch_size_mem=128, alpha=0.3, beta=0.0
        ),
        "derpp": lambda: supervised.DER(
            **common, mem_size=500, batch_size_mem=128, alpha=0.3, beta=0.5
        ),
    }
    return makers[name]()


def accuracies(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).numpy()
    task = y.numpy() // 2
    return [float(right[task == j].mean()) for j in range(5)]


def run(name: str, seed: int, train, test) -> tuple[list[list[float]], dict[str, float]]:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what Avalanche draws from)
    random.seed(seed)
    sets = [torch.utils.data.TensorDataset(x, y) for x, y in (train, test)]
    for one, (_, y) in zip(sets, (train, test), strict=True):
        one.targets = y.tolist()
    stream = nc_benchmark(
        sets[0], sets[1], 5, task_labels=False, shuffle=False, class_ids_from_zero_in_each_exp=False
    )
    model = nn.Sequential(
        nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    )
    learner = strategy(name, model)
    rows = []
    begin, begin_cpu = time.perf_counter(), time.process_time()
    if name == "joint":
        learner.train(stream.train_stream)
        rows.append(accuracies(model, *test))
    else:
        for experience in stream.train_stream:
            online = name.startswith("online")
            parts = split_online_stream([experience], experience_size=10)
            for part in parts if online else [experience]:
                learner.train(part)
            rows.append(accuracies(model, *test))
    seconds = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - begin_cpu}
    return rows, seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("learners", nargs="+")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train, test = read("train"), read("t10k")
    for name in arguments.learners:
        done = [run(name, seed, train, test) for seed in range(arguments.seeds)]
        accuracy = np.asarray([rows for rows, _ in done]).round(4)
        seconds = {kind: [taken[kind] for _, taken in done] for kind in ("wall", "cpu")}
        final = accuracy[:, -1].mean(-1).round(5).tolist()
        row = {"final_average_accuracy": final, "accuracy": accuracy.tolist()}
        print(json.dumps({"learner": name, "seconds": seconds, **row}), flush=True)
        if arguments.out:
            store(arguments.out, name, row)


def store(path: Path, name: str, row: dict) -> None:
    """Puts one learner's numbers into the file."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table |= {
        "package": "avalanche-lib",
        "version": version("avalanche-lib"),
        "torch": torch.__version__,
    }
    table["learners"] = dict(sorted((table.get("learners", {}) | {name: row}).items()))
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items() if k != "learners"]
    rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in table["learners"].items())
    lines.append(f'  "learners": {{\n{rows}\n  }}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
