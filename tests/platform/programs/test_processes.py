"""Two processes of four devices train as one process of eight."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from lamina.platform.reporting import records

ARGUMENTS = (
    "--config=quickstart",
    "--config.steps=20",
    "--config.schedule.warmup_steps=5",
    "--config.seeds=0",
    "--config.log_every=1",
    "--config.steps_per_call=1",
    "--config.evaluation.every=10",
    "--config.checkpoint.every=10",
    "--config.trackers=()",
)


def start(workdir, devices, *more):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lamina.platform.cli",
            "run",
            f"--workdir={workdir}",
            *ARGUMENTS,
            *more,
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def values(workdir):
    found = records.read(workdir / "metrics.jsonl")
    return {(r.step, r.split, r.name): r.value for r in found if r.name in ("loss", "accuracy")}


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["device", "grain"])
def test_two_processes_give_the_losses_of_one(tmp_path, placement):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    data = f"--config.data.placement={placement}"
    flags = (f"--coordinator=localhost:{port}", "--num_processes=2", data)
    both = [start(tmp_path / "two", 4, *flags, f"--process_id={i}") for i in range(2)]
    outputs = [finish(process) for process in both]
    assert "test/accuracy" in outputs[0]
    assert "test/accuracy" not in outputs[1]  # process 0 speaks for all
    finish(start(tmp_path / "one", 8, data))
    two, one = values(tmp_path / "two"), values(tmp_path / "one")
    assert two.keys() == one.keys()
    for key, value in one.items():
        np.testing.assert_allclose(two[key], value, rtol=1e-5, err_msg=str(key))
