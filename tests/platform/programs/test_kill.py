"""Real runs in processes of their own: killed, stopped by signals, and out of disk."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform import config as configs
from lamina.platform.checkpoints import names, restoring
from lamina.platform.reporting import folder

pytestmark = pytest.mark.slow

CONFIG = {
    "steps": 200,
    "seeds": (0, 5, 2),
    "accumulation": 2,
    "ema": {"decay": 0.9},
    "data": {"name": "digits", "batch_size": 16, "placement": "grain"},
    "model": {"name": "mlp", "widths": (16,), "dropout": 0.1},
    "task": {"name": "classification"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 5},
    "log_every": 10,
    "steps_per_call": 5,
    "checkpoint": {"every": 15},
    "evaluation": {"every": 40},
    "trackers": (),
}
"""Checkpoints stand between records, and each seed has dropout."""

KILLED_AT = """
import importlib, os, signal, sys
from lamina.platform import cli
module, _, path = sys.argv[1].partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
real, calls = getattr(owner, name), 0
def killed(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        if sys.argv[2] == "after":
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, killed)
sys.exit(cli.main(sys.argv[4:]))
"""


def write_config(path, **changes):
    path.write_text(configs.to_json(ConfigDict(CONFIG | changes)))
    return path


def command(config, workdir):
    return ["run", f"--config={config}", f"--workdir={workdir}"]


def start(arguments, program=("-m", "lamina.platform.cli"), **keywords):
    # One device: what is tested is the same on any number, and this is quicker.
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **keywords,
    )


def finish(process):
    out, error = process.communicate(timeout=120)
    assert "Traceback" not in error, error
    return process.returncode, out, error


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def records(workdir):
    return [record._replace(time=0.0) for record in folder.read_metrics(workdir)]


def arrays(workdir):
    parts = ("params", "optimizer_state", "ema?", "step", "metrics")
    return names.flatten(restoring.restore_subtree(workdir / "checkpoints", parts).state)


def assert_same_run(workdir, reference):
    assert folder.read_status(workdir)["state"] == "done"
    assert records(workdir) == records(reference)
    assert folder.read_result(workdir)["final"] == folder.read_result(reference)["final"]
    found, wanted = arrays(workdir), arrays(reference)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "config.json")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, config):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, _, error = finish(start(command(config, workdir)))
    assert code == 0, error
    return workdir


def test_a_run_killed_at_random_moments_ends_bit_identical(undisturbed, tmp_path):
    data = CONFIG["data"] | {"workers": 1}  # batches come from another process
    config = write_config(tmp_path / "config.json", data=data)
    workdir, metrics = tmp_path / "run", tmp_path / "run" / folder.METRICS
    whole = (undisturbed / folder.METRICS).stat().st_size
    chance = random.Random(7)
    for share in sorted(chance.random() for _ in range(3)):
        process = start(command(config, workdir))
        wait_for(
            lambda share=share: metrics.exists() and metrics.stat().st_size > share * whole, process
        )
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        finish(process)  # its workers end with it, and let go of its output
        if folder.read_status(workdir)["state"] != "done":
            assert folder.read_status(workdir)["state"] == folder.KILLED
    code, _, error = finish(start(command(config, workdir)))
    assert code == 0, error
    assert_same_run(workdir, undisturbed)


@pytest.mark.parametrize(
    ("place", "when", "call"),
    [
        ("lamina.platform.reporting.folder:write_status", "before", 1),
        ("lamina.platform.programs.train:train_loop", "before", 1),
        ("lamina.platform.training.recorder:Recorder.write", "after", 5),
        ("lamina.platform.training.recorder:Recorder.save", "before", 3),
        ("lamina.platform.checkpoints.folders:commit", "before", 3),
        ("lamina.platform.checkpoints.folders:commit", "after", 3),
        ("lamina.platform.checkpoints.folders:remove", "before", 1),
        ("lamina.platform.programs.train:finish", "before", 1),
        ("lamina.platform.reporting.folder:write_result", "before", 1),
        ("lamina.platform.reporting.folder:write_result", "after", 1),
    ],
)
def test_a_run_killed_at_a_delicate_place_ends_bit_identical(
    undisturbed, config, tmp_path, place, when, call
):
    workdir = tmp_path / "run"
    process = start([place, when, call, *command(config, workdir)], ("-c", KILLED_AT))
    assert finish(process)[0] == -signal.SIGKILL
    code, _, error = finish(start(command(config, workdir)))
    assert code == 0, error
    assert_same_run(workdir, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(undisturbed, config, tmp_path, number):
    workdir = tmp_path / "run"
    process = start(command(config, workdir))
    wait_for(lambda: len(records(workdir)) > 100, process)
    process.send_signal(number)
    code, _, error = finish(process)
    assert code == 75, error
    assert f"stopped by {signal.Signals(number).name} after step" in error
    assert folder.read_status(workdir)["state"] == "interrupted"
    assert finish(start(command(config, workdir)))[0] == 0
    assert_same_run(workdir, undisturbed)


def test_a_signal_during_compilation_stops_after_the_first_chunk(undisturbed, config, tmp_path):
    workdir = tmp_path / "run"
    process = start(command(config, workdir))
    wait_for((workdir / folder.PARAMETERS).exists, process)
    process.send_signal(signal.SIGTERM)
    code, _, error = finish(process)
    assert code == 75, error
    assert "after step 5 of 200" in error
    assert finish(start(command(config, workdir)))[0] == 0
    assert_same_run(workdir, undisturbed)


def test_a_second_interrupt_ends_a_run_at_once_and_it_resumes(undisturbed, config, tmp_path):
    workdir = tmp_path / "run"
    forever = KILLED_AT.replace(
        "os.kill(os.getpid(), signal.SIGKILL)",
        "print('waits', flush=True); __import__('time').sleep(99)",
    )
    place = "lamina.platform.training.recorder:Recorder.save"
    process = start([place, "before", 4, *command(config, workdir)], ("-c", forever))
    while process.stdout.readline() != "waits\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the first one waits for the end of the chunk
    process.send_signal(signal.SIGINT)
    code, _, error = finish(process)
    assert code == 130, error
    assert folder.read_status(workdir)["state"] == "interrupted"
    assert finish(start(command(config, workdir)))[0] == 0
    assert_same_run(workdir, undisturbed)


def test_of_two_runs_in_one_folder_the_second_is_refused(undisturbed, config, tmp_path):
    workdir = tmp_path / "run"
    first = start(command(config, workdir))
    wait_for(lambda: len(records(workdir)) > 20, first)
    first.send_signal(signal.SIGSTOP)  # so that it still runs when the second one looks
    code, _, error = finish(start(command(config, workdir)))
    first.send_signal(signal.SIGCONT)
    assert code == 2
    assert f"in use by process {first.pid}" in error
    assert finish(first)[0] == 0
    assert_same_run(workdir, undisturbed)


def test_a_reader_that_goes_away_does_not_stop_a_run(undisturbed, config, tmp_path):
    process = start(command(config, tmp_path / "run"))
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """Returns `mount(kilobytes)`: a folder on a disk of that size, which can be mounted again."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(kilobytes, option=""):
        options = f"{option}size={kilobytes}k,nr_inodes=10k"
        command = ["mount", "-t", "tmpfs", "-o", options, "lamina-test", str(path)]
        if option:
            command = ["mount", "-o", options, str(path)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs the rights of root")
        return path

    yield mount
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["umount", str(path)], capture_output=True)


@pytest.mark.parametrize("kilobytes", [60, 200, 400])
def test_a_full_disk_ends_a_run_cleanly_and_it_resumes_on_a_larger_one(
    undisturbed, config, small_disk, kilobytes
):
    disk = small_disk(kilobytes)
    workdir = disk / "run"
    code, _, error = finish(start(command(config, workdir)))
    assert code == 2, error
    assert "disk is full" in error or "No space left" in error
    if (workdir / "checkpoints").exists():
        for step in restoring.list_steps(workdir / "checkpoints"):
            restoring.restore_subtree(workdir / "checkpoints", "params", step=step)
    small_disk(50_000, "remount,")
    code, _, error = finish(start(command(config, workdir)))
    assert code == 0, error
    assert_same_run(workdir, undisturbed)


def test_seeds_added_under_kills_end_as_if_trained_alone(undisturbed, tmp_path):
    one = write_config(tmp_path / "one.json", seeds=(5,))
    more = write_config(tmp_path / "more.json")
    workdir = tmp_path / "run"
    assert finish(start(command(one, workdir)))[0] == 0
    for place, when, call in (
        ("lamina.platform.checkpoints.folders:commit", "after", 3),
        ("lamina.platform.reporting.added:join", "before", 1),
        ("lamina.platform.reporting.storage:write_bytes", "after", 1),
        ("lamina.platform.reporting.folder:write_result", "after", 1),
        ("lamina.platform.reporting.manifest:write", "before", 1),
    ):
        killed = start([place, when, call, *command(more, workdir)], ("-c", KILLED_AT))
        assert finish(killed)[0] == -signal.SIGKILL
        assert folder.read_status(workdir)["state"] == "done"
    assert finish(start(command(more, workdir)))[0] == 0
    by_place = lambda r: (r.seed, r.step, r.split, r.name)
    assert sorted(records(workdir), key=by_place) == sorted(records(undisturbed), key=by_place)
    assert folder.read_result(workdir)["final"] == folder.read_result(undisturbed)["final"]
    assert json.loads((workdir / folder.CONFIG).read_text())["seeds"] == [0, 5, 2]


INCREMENTAL = {
    "program": "incremental",
    "seeds": (0, 5),
    "stream": {"name": "class_incremental", "experiences": 3},
    "learner": {
        "name": "chain",
        "links": ("er", "ewc", "ema_merge"),
        "options": {"er": {"memory": 64, "replay": 16}, "ewc": {"strength": 10.0}},
    },
    "data": {"name": "digits", "batch_size": 32, "order": "per_seed"},
    "model": {"name": "mlp", "widths": (16,)},
    "task": {"name": "classification"},
    "optimizer": {"name": "adam", "learning_rate": 1e-2},
    "schedule": {"name": "constant"},
    "log_every": 5,
    "steps_per_call": 4,
    "checkpoint": {"every": 4},
    "trackers": (),
}
"""Experiences of 10 to 14 steps: checkpoints stand inside of them."""


def test_a_stream_killed_inside_an_experience_ends_bit_identical(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(configs.to_json(ConfigDict(INCREMENTAL)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(command(config, whole)))[0] == 0
    for place, when, call in (
        ("lamina.platform.training.recorder:Recorder.save", "before", 2),
        ("lamina.platform.checkpoints.folders:commit", "after", 3),
        ("lamina.platform.incremental.results:record_evaluations", "before", 2),
    ):
        process = start([place, when, call, *command(config, killed)], ("-c", KILLED_AT))
        assert finish(process)[0] == -signal.SIGKILL
    code, _, error = finish(start(command(config, killed)))
    assert code == 0, error
    assert_same_run(killed, whole)
    one, other = (np.load(run / "accuracy.npy") for run in (whole, killed))
    np.testing.assert_array_equal(one, other)
