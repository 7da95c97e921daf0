"""A made-up run folder with realistic curves, and a made-up object store."""

import base64
import io
import json
import math
import pathlib
import types

import numpy as np
import pytest

from lamina.platform.reporting import folder, records, storage

SEEDS = (0, 1, 2)


def make_png():
    """A picture of 8 x 16 pixels in base64."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (8, 16), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make_config(learning_rate=1e-3, seeds=SEEDS):
    return {
        "program": "train",
        "seeds": list(seeds),
        "steps": 600,
        "data": {"name": "digits", "batch_size": 64, "seed": 0, "augmentations": []},
        "model": {"name": "convnet", "width": 32},
        "task": {"name": "classification", "label_smoothing": 0.0},
        "optimizer": {"name": "adamw", "learning_rate": learning_rate, "weight_decay": 1e-4},
        "schedule": {"name": "cosine", "warmup_steps": 50},
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "precision": "float32",
        "log_every": 10,
    }


def make_records(seeds=SEEDS, steps=600, gain=0.0):
    entries = []
    for step in range(10, steps + 1, 10):
        for seed in seeds:
            rng = np.random.default_rng((seed, step, round(gain * 1e4)))
            noise = rng.normal(0, 0.12)
            loss = (2.3 * math.exp(-step / 70) + 0.012) * math.exp(noise)
            accuracy = 1 - 0.9 * math.exp(-step / 90) - 0.004 * abs(rng.normal())
            rate = 1e-3 * min(step / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))
            now = 4.1 + step / 180
            for name, value in (("loss", loss), ("accuracy", accuracy), ("learning_rate", rate)):
                entries.append(records.record(step, "train", name, value, seed, now))
            if step % 100 == 0:
                held_out = 2.2 * math.exp(-step / 75) + 0.071 - gain + 0.006 * rng.normal()
                right = 0.979 + gain - 0.85 * math.exp(-step / 85) + 0.003 * rng.normal()
                entries.append(records.record(step, "validation", "loss", held_out, seed, now))
                entries.append(records.record(step, "validation", "accuracy", right, seed, now))
    for seed in seeds:
        rng = np.random.default_rng((seed, round(gain * 1e4)))
        entries.append(
            records.record(steps, "test", "accuracy", 0.977 + gain + 0.002 * rng.normal(), seed)
        )
        entries.append(records.record(steps, "test", "loss", 0.082 - gain, seed))
    return entries


def make_run(workdir: pathlib.Path, seeds=SEEDS, learning_rate=1e-3, gain=0.0):
    """A finished run of three seeds, with every file that a report reads."""
    config = make_config(learning_rate, seeds)
    entries = make_records(seeds, gain=gain)
    folder.write_config(workdir, json.dumps(config), defaults=json.dumps(make_config(3e-4)))
    folder.write_status(workdir, "running")
    (workdir / folder.METRICS).write_bytes(records.lines(entries))
    storage.write_json(
        workdir / folder.MANIFEST,
        {
            "time": "2026-03-02T10:11:12+00:00",
            "command": ["lamina", "train", "experiments/digits.py", f"--workdir={workdir.name}"],
            "host": "workstation",
            "python": "3.13.1",
            "platform": "Linux-6.8.0-x86_64",
            "packages": {"lamina": "0.1.0", "jax": "0.12.0", "flax": "0.12.12", "optax": "0.2.8"},
            "git": {
                "revision": "4f1c2ab39d07c55aa1be0fd9b1d7e5d8f0a61234",
                "diff": "--- a/models/convnet.py\n+++ b/models/convnet.py\n-w = 16\n+w = 32\n",
                "untracked": ["notes.txt"],
            },
            "devices": {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1},
            "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
            "parents": [],
        },
    )
    rows = [
        ("stem/kernel", [3, 3, 1, 32], ["kernel_h", "kernel_w", "in_channels", "out_channels"]),
        ("stem/bias", [32], ["out_channels"]),
        ("block/0/kernel", [3, 3, 32, 64], ["kernel_h", "kernel_w", "in_channels", "out_channels"]),
        ("block/0/bias", [64], ["out_channels"]),
        ("head/kernel", [1024, 10], ["embed", "classes"]),
        ("head/bias", [10], ["classes"]),
    ]
    folder.write_parameters(
        workdir,
        [
            {
                "path": path,
                "shape": shape,
                "dtype": "float32",
                "axes": axes,
                "sharding": "replicated" if len(shape) == 1 else f"P({', '.join(['None'] * 3)})",
                "bytes": 4 * math.prod(shape),
            }
            for path, shape, axes in rows
        ],
    )
    folder.write_samples(
        workdir,
        [
            {"title": "Worst mistakes", "png_base64": make_png()},
            {"title": "A sample at step 600", "text": "To be, or not to be: that <is> the loss."},
        ],
    )
    folder.write_result(
        workdir,
        {
            "final": records.summarise(entries, seeds=seeds),
            "steps_per_second": 181.3,
            "examples_per_second": 34810.0,
            "mfu": 0.413,
            "goodput": 0.4227,
            "checkpoint_stall_seconds": 0.3,
            "seconds": 4.3,
            "compile_seconds": 3.6,
            "phases": {"compile": 3.6, "train": 3.31, "evaluate": 0.62, "checkpoint": 0.3},
        },
    )
    folder.write_status(workdir, "done")
    return workdir


@pytest.fixture
def finished_run(tmp_path):
    return make_run(tmp_path / "digits")


@pytest.fixture
def make():
    """The makers of run folders and records."""
    return types.SimpleNamespace(run=make_run, records=make_records, config=make_config)


class ObjectStore:
    """Paths of an object store: whole objects only, no append and no rename."""

    def __init__(self, objects, name):
        self.objects, self.key, self.name = objects, name, name.rpartition("/")[2]

    def __fspath__(self):
        return self.key

    def __truediv__(self, child):
        return ObjectStore(self.objects, f"{self.key}/{child}")

    @property
    def parent(self):
        return ObjectStore(self.objects, self.key.rpartition("/")[0])

    def mkdir(self, parents, exist_ok):
        assert parents
        assert exist_ok

    def exists(self):
        return self.key in self.objects

    def read_bytes(self):
        return self.objects[self.key]

    def write_bytes(self, data):
        self.objects[self.key] = data


@pytest.fixture
def bucket(monkeypatch):
    """Names to contents of a bucket that `gs://` paths lead to."""
    objects = {}
    local = storage.as_path

    def as_path(path):
        remote = storage.is_remote(path)
        return (
            ObjectStore(objects, path.__fspath__() if hasattr(path, "__fspath__") else path)
            if (remote)
            else local(path)
        )

    monkeypatch.setattr(storage, "as_path", as_path)
    return objects
