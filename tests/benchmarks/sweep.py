"""A sweep of 8 learning rates and 4 seeds against the same 32 runs.

    python tests/benchmarks/sweep.py

Three ways to the same numbers, each with its evaluations and records, without checkpoints:

- sweep: one compiled program, as the program `sweep` runs it;
- one after another: 32 runs in one process, which share one compiled program of a single run;
- separate: `lamina run` in a process of its own, imports and compilation included; two are timed
  (the second finds the first one's compiled programs on the disk) and 16 times their sum is shown.

Compilation is not in the first two. Run it on an idle machine.
"""

import os
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from lamina.platform import config as configs
from lamina.platform.programs import sweep
from lamina.platform.reporting import records
from lamina.platform.sweeps import members, planning, settings
from lamina.platform.sweeps.planning import Group, Shape
from lamina.platform.training import loading
from lamina.platform.training.signals import StopRequest

RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SEEDS = (0, 1, 2, 3)


def make_config(dropout):
    config, _ = configs.load("quickstart")
    config.program = "sweep"
    config.seeds = SEEDS
    config.model.dropout = dropout
    config.checkpoint.every = 0
    config.trackers = ()
    config.sweep = {"space": {"optimizer": {"learning_rate": RATES}}}
    return settings.resolve(config)


def timed(function):
    wall, cpu = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def whole_sweep(prepared, folder):
    group = prepared.groups[0]
    shape = sweep.shape_of(prepared, group, folder)
    built = members.compile_group(group, shape, prepared.trust, None, prepared.parts.dataset)
    warm_up(built, folder)
    run = lambda: members.run(
        built, group.trials, os.path.join(folder, "all"), loading.NOTHING, StopRequest()
    )
    return (*timed(run), shape)


def one_after_another(prepared, folder):
    trials = [
        trial._replace(number=len(SEEDS) * i + j, config=planning.with_seeds(trial.config, (seed,)))
        for i, trial in enumerate(prepared.trials)
        for j, seed in enumerate(SEEDS)
    ]
    group = Group(tuple(trials), prepared.groups[0].hyper)
    built = members.compile_group(
        group, Shape(1, 1, 1, "single"), prepared.trust, None, prepared.parts.dataset
    )
    warm_up(built, folder)

    def run():
        folders = (os.path.join(folder, str(trial.number)) for trial in trials)
        return [
            members.run(built, [trial], path, loading.NOTHING, StopRequest())
            for trial, path in zip(trials, folders, strict=True)
        ]

    return timed(run)


def warm_up(built, folder):
    """Makes the first state once, which compiles it."""
    path = os.path.join(folder, f"warm_up_{built.shape.members}")
    members.run(
        built, built.group.trials[: built.shape.trials], path, loading.NOTHING, StopRequest()
    )


def separate(prepared, folder):
    seconds = []
    for i, trial in enumerate(prepared.trials[2:4]):
        path = os.path.join(folder, f"{i}.json")
        one = planning.with_seeds(trial.config, (0,))
        with open(path, "w") as file:
            file.write(configs.to_json(one))
        command = [sys.executable, "-m", "lamina.platform.cli", "run", f"--config={path}"]
        start = time.perf_counter()
        subprocess.run([*command, f"--workdir={folder}/separate_{i}"], check=True, capture_output=1)
        seconds.append(time.perf_counter() - start)
    return seconds


def numbers(finished):
    """Returns every final number by learning rate, seed and name."""
    return {
        (ended.member.trial.config.optimizer.learning_rate, ended.member.seed, name): entry["mean"]
        for ended in finished.ended
        for name, entry in records.summarise(ended.records).items()
    }


def main():
    print(f"{os.cpu_count()} cores, {jax.default_backend()}, jax {jax.__version__}")
    for dropout in (0.2, 0.0):
        with tempfile.TemporaryDirectory() as folder:
            prepared = sweep.prepare(make_config(dropout), configs.EVERYONE, None, True)
            found, wall, cpu, shape = whole_sweep(prepared, folder)
            singles, wall_1, cpu_1 = one_after_another(prepared, folder)
            together, alone = numbers(found), {}
            for one in singles:
                alone |= numbers(one)
            gaps = [
                abs(together[k] - alone[k]) / max(abs(alone[k]), 1e-6)
                for k in alone
                if alone[k] is not None
            ]
            print(f"digits MLP, dropout {dropout}, 600 steps, 8 rates x 4 seeds: {shape}")
            print(f"  sweep              {wall:7.2f} s  (processor {cpu:.2f} s)")
            print(f"  one after another  {wall_1:7.2f} s  (processor {cpu_1:.2f} s)")
            print(f"  ratio              {wall_1 / wall:7.2f}")
            print(f"  largest relative difference of a final number: {np.max(gaps):.1e}")
            if dropout:
                seconds = separate(prepared, folder)
                shown = ", ".join(f"{s:.1f}" for s in seconds)
                print(f"  separate runs      {16 * sum(seconds):7.0f} s  (two: {shown} s)")


if __name__ == "__main__":
    main()
