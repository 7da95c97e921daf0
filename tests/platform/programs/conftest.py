"""A small, quick experiment on the digits, a stream of them, and runs of both."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform.run import run
from lamina.platform.sweeps import lanes


def digits_config(**changes):
    config = ConfigDict(
        {
            "steps": 20,
            "data": {"name": "digits", "batch_size": 64},
            "model": {"name": "mlp", "widths": (32, 32)},
            "task": {"name": "classification"},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "schedule": {"name": "cosine", "warmup_steps": 5},
            "log_every": 5,
            "steps_per_call": 5,
            "trackers": (),
        }
    )
    with config.ignore_type(), config.unlocked():
        for key, value in changes.items():
            *blocks, last = key.split("__")
            block = config
            for name in blocks:
                if name not in block:
                    block[name] = ConfigDict()
                block = block[name]
            block[last] = ConfigDict(value) if isinstance(value, dict) else value
    return config


@pytest.fixture
def digits():
    return digits_config


@pytest.fixture
def train(tmp_path):
    """Returns `train(config, name=..., devices=1)`: the result of a run in a folder of the test."""

    def start(config, name="run", devices=1):
        return run(config, tmp_path / name, console=False, devices=jax.devices()[:devices])

    return start


def incremental_config(learner, **changes):
    """Three experiences of two epochs of the digits: 3 x 2 x 11 steps (the last ones are 10)."""
    config = ConfigDict(
        {
            "program": "incremental",
            "seeds": (0,),
            "stream": {"name": "class_incremental", "experiences": 3, "epochs": 2},
            "learner": {"name": learner} if isinstance(learner, str) else learner,
            "data": {"name": "digits", "batch_size": 32, "order": "per_seed"},
            "model": {"name": "mlp", "widths": (16,)},
            "task": {"name": "classification"},
            "optimizer": {"name": "adam", "learning_rate": 1e-2},
            "schedule": {"name": "constant"},
            "log_every": 7,
            "steps_per_call": 0,
            "trackers": (),
        }
    )
    if learner in ("er", "der", "derpp", "icarl"):
        config.learner.memory = 64
        config.learner.replay = 16
    if learner in ("gem", "agem"):
        config.learner.per_task = 16
    with config.ignore_type(), config.unlocked():
        for key, value in changes.items():
            block, _, last = key.rpartition("__")
            value = ConfigDict(value) if isinstance(value, dict) else value
            (config[block] if block else config)[last] = value
    return config


@pytest.fixture
def learn(train, tmp_path):
    """Returns `learn(learner, name=..., devices=1, **changes)`: a result and its accuracies."""

    def start(learner, name="run", devices=1, **changes):
        result = train(incremental_config(learner, **changes), name, devices)
        return result, np.load(tmp_path / name / "accuracy.npy")

    return start


@pytest.fixture
def stream_config():
    return incremental_config


def without_times(data):
    if isinstance(data, dict):
        timed = ("seconds", "compile_seconds", "training_seconds", "cost")
        return {k: without_times(v) for k, v in data.items() if k not in timed}
    return [without_times(v) for v in data] if isinstance(data, list) else data


@pytest.fixture
def timeless():
    """Returns `timeless(data)`: what of a result doesn't depend on the clock."""
    return without_times


@pytest.fixture
def fail_lanes(monkeypatch):
    """Returns `fail_lanes(calls)`: the chunks of lanes with these numbers, from 1, fail."""

    def patch(*failing):
        calls, real = 0, lanes.Lane.step

        def step(lane, chunk):
            nonlocal calls
            calls += 1
            if calls in failing:
                raise RuntimeError("the machine is gone")
            return real(lane, chunk)

        monkeypatch.setattr(lanes.Lane, "step", step)

    return patch
