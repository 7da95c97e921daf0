"""A small, quick experiment on the digits, and runs of it."""

import jax
import pytest
from ml_collections import ConfigDict

from lamina.platform.run import run


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
