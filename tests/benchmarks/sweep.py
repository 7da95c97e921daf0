"""A sweep of 8 learning rates and 4 seeds against the same 32 runs.

    python tests/benchmarks/sweep.py

The same numbers in several ways, each with its evaluations and records, without checkpoints.

Steps alone, compiled before, in turns, medians:

- sweep: the one compiled program of the program `sweep`;
- one by one: training and evaluations of the 32 runs in one process, which share one compiled
  program of a single run, and nothing else of a run.

Whole runs, with their folders and reports:

- sweep: `lamina.platform.run.run` of the sweep, which finds its compiled program on the disk;
- one by one: 32 such calls in one process, one for each trial and seed; the first 8 are timed;
- separate: `lamina run` in a process of its own, imports and compilation included; two are timed
  (the second finds the first one's compiled programs on the disk) and 16 times their sum is shown.

Run it on an idle machine.
"""

import os
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from lamina.platform import config as configs
from lamina.platform import run as runs
from lamina.platform.programs import sweep
from lamina.platform.reporting import records
from lamina.platform.sweeps import groups, lanes, members, planning, settings
from lamina.platform.sweeps.planning import Group, Shape
from lamina.platform.training import loading
from lamina.platform.training.signals import StopRequest

RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SEEDS = (0, 1, 2, 3)
ROUNDS = 5


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


def compiled(prepared, group, shape):
    return lanes.compile_group(group, shape, prepared.base.trust, None, prepared.parts.dataset)


def runner(built, units, folder):
    """Returns a function that runs units of trials from their beginning, once it is warm."""
    count = 0

    def run(chosen=units):
        nonlocal count
        count += 1
        path = os.path.join(folder, f"{built.shape.members}_{count}")
        return [
            members.run(built, unit, os.path.join(path, str(i)), loading.NOTHING, StopRequest())
            for i, unit in enumerate(chosen)
        ]

    run(units[:1])  # compiles what makes the first state
    return run


def whole_sweep(prepared, folder):
    group = prepared.grouped[0]
    shape = groups.shape_of(prepared.base, group, folder)
    return runner(compiled(prepared, group, shape), [group.trials], folder), shape


def one_after_another(prepared, folder):
    trials = [
        trial._replace(number=len(SEEDS) * i + j, config=planning.with_seeds(trial.config, (seed,)))
        for i, trial in enumerate(prepared.trials)
        for j, seed in enumerate(SEEDS)
    ]
    group = Group(tuple(trials), prepared.grouped[0].hyper)
    built = compiled(prepared, group, Shape(1, 1, 1, "single"))
    return runner(built, [[trial] for trial in trials], folder)


def whole_runs(wanted, folder):
    """Returns the seconds of each run of a config, after one of the first that fills the caches."""
    jax.config.update("jax_compilation_cache_dir", f"{folder}/cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    seconds = []
    for i, config in enumerate((wanted[0], *wanted)):
        start = time.perf_counter()
        runs.run(config, f"{folder}/{config.program}_{i}", console=False)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


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


def numbers(units):
    """Returns every final number by learning rate, seed and name."""
    return {
        (ended.member.trial.config.optimizer.learning_rate, ended.member.seed, name): entry["mean"]
        for finished in units
        for ended in finished.ended
        for name, entry in records.summarise(ended.records).items()
    }


def compare(dropout):
    with tempfile.TemporaryDirectory() as folder:
        prepared = sweep.prepare(make_config(dropout), configs.EVERYONE, None, True)
        together, shape = whole_sweep(prepared, folder)
        alone = one_after_another(prepared, folder)
        print(f"digits MLP, dropout {dropout}, 600 steps, 8 rates x 4 seeds: {shape}")
        rounds = []
        for _ in range(ROUNDS):  # in turn, so that what else the machine does falls on both
            found, *ours = timed(together)
            singles, *theirs = timed(alone)
            rounds.append((*ours, *theirs))
        wall, cpu, wall_1, cpu_1 = np.transpose(rounds)
        median = lambda values: f"{np.median(values):7.2f} s"
        print(f"  sweep              {median(wall)}  (processor {median(cpu)})")
        print(f"  steps, one by one  {median(wall_1)}  (processor {median(cpu_1)})")
        ratios = ", ".join(f"{ratio:.2f}" for ratio in sorted(wall_1 / wall))
        print(f"  ratio              {np.median(wall_1 / wall):7.2f}    (rounds: {ratios})")
        own, other = numbers(found), numbers(singles)
        gaps = [abs(own[k] - v) / max(abs(v), 1e-6) for k, v in other.items() if v is not None]
        print(f"  largest relative difference of a final number: {np.max(gaps):.1e}")
        return prepared


def main():
    print(f"{os.cpu_count()} cores, {jax.default_backend()}, jax {jax.__version__}")
    for dropout in (0.2, 0.0):
        prepared = compare(dropout)
    with tempfile.TemporaryDirectory() as folder:
        together = whole_runs([make_config(0.0)] * 3, folder)
        ones = [planning.with_seeds(trial.config, (0,)) for trial in prepared.trials]
        each = whole_runs(ones, folder)
        print("whole runs, dropout 0")
        print(f"  sweep              {np.median(together):7.2f} s")
        print(
            f"  runs, one by one   {len(SEEDS) * sum(each):7.2f} s  (one: {np.median(each):.2f} s)"
        )
        print(f"  ratio              {len(SEEDS) * sum(each) / np.median(together):7.2f}")
        seconds = separate(prepared, folder)
        shown = ", ".join(f"{s:.1f}" for s in seconds)
        print(f"  separate runs      {16 * sum(seconds):7.2f} s  (two: {shown} s)")


if __name__ == "__main__":
    main()
