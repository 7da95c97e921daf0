"""Two processes of four devices train as one process of eight, and continue each other's runs."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from lamina.platform.reporting import folder, records

pytestmark = pytest.mark.slow

EVERY_RUN = (
    "--config.steps=20",
    "--config.seeds=0",
    "--config.log_every=1",
    "--config.trackers=()",
)
QUICKSTART = (
    "--config=quickstart",
    "--config.schedule.warmup_steps=5",
    "--config.steps_per_call=1",
    "--config.evaluation.every=10",
    "--config.checkpoint.every=10",
)
LANGUAGE_MODEL = (
    "--config=language_model",
    "--config.data.name=synthetic_tokens",
    "--config.data.vocabulary=64",
    "--config.data.context=16",
    "--config.data.examples=256",
    "--config.data.held_out=16",
    "--config.model.embed=32",
    "--config.model.mlp=64",
    "--config.model.ngram_orders=(2,)",
    "--config.model.ngram_buckets=64",
    "--config.schedule.warmup_steps=5",
    "--config.steps_per_call=1",
    "--config.evaluation.every=10",
    "--config.evaluation.batch_size=16",
)
CONSTANT = (
    *LANGUAGE_MODEL,
    "--config.schedule.name=constant",
    "--config.checkpoint.every=10",
    "--config.mesh.data=1",
)

ONE_HOST_IS_SLOW = """
import sys, time
from lamina.platform import cli
from lamina.platform.training.rows import RowWindows
real = RowWindows.of
def slow(*arguments):
    time.sleep(0.5 * ("--process_id=1" in sys.argv))
    return real(*arguments)
RowWindows.of = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def start(workdir, devices, *more, program=("-m", "lamina.platform.cli")):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(
        [sys.executable, *program, "run", f"--workdir={workdir}", *EVERY_RUN, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def one(workdir, devices, *more):
    return finish(start(workdir, devices, *more))


def two(workdir, *more, program=("-m", "lamina.platform.cli")):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (f"--coordinator=localhost:{port}", "--num_processes=2", *more)
    both = [start(workdir, 4, *flags, f"--process_id={i}", program=program) for i in range(2)]
    return [finish(process) for process in both]


def values(workdir):
    found = records.read(workdir / "metrics.jsonl")
    return {(r.step, r.split, r.name): r.value for r in found if r.name in ("loss", "accuracy")}


def assert_same_losses(workdir, reference):
    found, wanted = values(workdir), values(reference)
    assert found.keys() >= wanted.keys()  # each session has tested its last state
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=str(key))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param((*QUICKSTART, "--config.data.placement=device"), id="quickstart"),
        pytest.param((*QUICKSTART, "--config.data.placement=grain"), id="quickstart, grain"),
        pytest.param((*LANGUAGE_MODEL, "--config.data.placement=grain"), id="language model"),
    ],
)
def test_two_processes_give_the_losses_of_one(tmp_path, config):
    outputs = two(tmp_path / "two", *config)
    assert "test/" in outputs[0]
    assert "test/" not in outputs[1]  # process 0 speaks for all
    one(tmp_path / "one", 8, *config)
    assert_same_losses(tmp_path / "two", tmp_path / "one")


def test_a_run_moves_between_numbers_of_processes_and_devices(tmp_path):
    split = ("--config.mesh.fsdp=-1", "--config.sharding.rules=fsdp")
    one(tmp_path / "whole", 8, *CONSTANT, *split, "--config.steps=40")
    run = tmp_path / "run"
    two(run, *CONSTANT, *split, "--config.steps=10")
    one(run, 1, *CONSTANT, "--config.steps=20")
    two(run, *CONSTANT, "--config.mesh.data=-1", "--config.steps=30")
    one(run, 8, *CONSTANT, *split, "--config.steps=40")
    assert_same_losses(run, tmp_path / "whole")


def test_a_process_that_keeps_the_others_waiting_is_named(tmp_path):
    config = (*QUICKSTART, "--config.evaluation.every=0", "--config.data.placement=grain")
    first, _ = two(tmp_path, *config, program=("-c", ONE_HOST_IS_SLOW))
    assert "process 1 is slow: it waits" in first
    result = folder.read_result(tmp_path)
    fast, slow = result["processes"]
    assert slow["data"] >= 0.5 > fast["data"]
    assert result["straggler"] in first
