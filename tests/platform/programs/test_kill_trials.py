"""Sweeps and shoot-outs in processes of their own, killed: they end with the same numbers."""

import glob
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from ml_collections import ConfigDict

from lamina.platform import config as configs
from lamina.platform.reporting import folder

pytestmark = pytest.mark.slow

TRAINING = {
    "seeds": (0, 1),
    "steps": 200,
    "data": {"name": "digits", "batch_size": 32},
    "model": {"name": "mlp", "widths": (16,), "dropout": 0.1},
    "task": {"name": "classification"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    "schedule": {"name": "cosine"},
    "log_every": 10,
    "steps_per_call": 5,
    "checkpoint": {"every": 20},
    "evaluation": {"every": 20},
    "trackers": (),
}
RATES = {"optimizer": {"learning_rate": {"low": 1e-3, "high": 1e-1, "scale": "log", "points": 3}}}
SWEEP = {**TRAINING, "program": "sweep", "sweep": {"space": RATES}}
SHOOTOUT = {
    **TRAINING,
    "program": "shootout",
    "shootout": {
        "space": RATES,
        "trials": 2,
        "workloads": {"digits": {"target": 0.9}},
        "optimizers": {
            "adamw": {},
            "sgd": {"config": {"optimizer": {"name": "sgd", "momentum": 0.9}}},
        },
    },
}


def start(config, workdir):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-m", "lamina.platform.cli", "run", f"--config={config}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, error = process.communicate(timeout=240)
    assert "Traceback" not in error, error
    return process.returncode


@pytest.mark.parametrize("config", [SWEEP, SHOOTOUT], ids=["sweep", "shootout"])
def test_killed_again_and_again_it_ends_with_the_same_numbers(config, tmp_path, timeless):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(ConfigDict(config)))
    assert finish(start(path, tmp_path / "whole")) == 0
    # Folders vanish while they are searched, which `Path.glob` takes for an error.
    search = partial(glob.glob, root_dir=tmp_path / "killed", recursive=True, include_hidden=True)
    kills = 0
    for _ in range(3):
        before = set(search("**/manifest.json"))
        process = start(path, tmp_path / "killed")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            saved = search("**/checkpoints/*/manifest.json")
            if saved and set(search("**/manifest.json")) - before:
                time.sleep(0.03)
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.communicate()
    assert kills
    assert finish(start(path, tmp_path / "killed")) == 0
    whole, killed = (folder.read_result(tmp_path / name) for name in ("whole", "killed"))
    assert timeless(killed) == timeless(json.loads(json.dumps(whole)))
