"""Two real processes: killed, stopped by signals, failing alone; all end, and the run resumes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

from lamina.platform import config as configs
from lamina.platform.checkpoints import lock
from lamina.platform.reporting import folder

pytestmark = pytest.mark.slow

CONFIG = {
    "steps": 400,  # long enough for a signal to be agreed on before the end
    "seeds": (0,),
    "data": {"name": "digits", "batch_size": 16, "placement": "grain"},
    "model": {"name": "mlp", "widths": (16,), "dropout": 0.1},
    "task": {"name": "classification"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 5},
    "log_every": 10,
    "steps_per_call": 10,
    "checkpoint": {"every": 30},
    "evaluation": {"every": 60},
    "trackers": (),
}

FAILS_ON_ONE = """
import sys
from lamina.platform import cli
from lamina.platform.errors import UserError
from lamina.platform.training.recorder import Recorder
real = Recorder.save
def save(self, step, *args, **kwargs):
    if step >= 60 and "--process_id=1" in sys.argv:
        raise UserError("this host lacks a file")
    return real(self, step, *args, **kwargs)
Recorder.save = save
sys.exit(cli.main(sys.argv[1:]))
"""


def start_both(config, workdir, program=("-m", "lamina.platform.cli")):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--config={config}", f"--workdir={workdir}"]
    flags += [f"--coordinator=localhost:{port}", "--num_processes=2"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return [
        subprocess.Popen(
            [sys.executable, *program, "run", *flags, f"--process_id={process}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for process in range(2)
    ]


def finish(processes, seconds=120):
    """Returns each process's (exit code, what it wrote to stderr)."""
    deadline = time.monotonic() + seconds
    ends = []
    for process in processes:
        _, error = process.communicate(timeout=deadline - time.monotonic())
        ends.append((process.returncode, error))
    return ends


def wait_for_step(workdir, step, processes):
    deadline = time.monotonic() + 120
    while not any(r.step >= step for r in folder.read_metrics(workdir)):
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def child_of(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return int((file.read().split() or ["0"])[0])


def numbers(workdir):
    return [r._replace(time=0.0) for r in folder.read_metrics(workdir)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(configs.to_json(ConfigDict(CONFIG)))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, config):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    ends = finish(start_both(config, workdir))
    assert [code for code, _ in ends] == [0, 0], ends
    return workdir


def assert_resumes(config, workdir, undisturbed):
    ends = finish(start_both(config, workdir))
    assert [code for code, _ in ends] == [0, 0], ends
    assert folder.read_status(workdir)["state"] == "done"
    assert numbers(workdir) == numbers(undisturbed)
    assert folder.read_result(workdir)["final"] == folder.read_result(undisturbed)["final"]


@pytest.mark.parametrize(
    ("victim", "which"), [(0, "parent"), (1, "parent"), (0, "child"), (1, "child")]
)
def test_a_killed_process_ends_the_other_with_75_and_the_same_command_resumes(
    config, undisturbed, tmp_path, victim, which
):
    workdir = tmp_path / "run"
    processes = start_both(config, workdir)
    wait_for_step(workdir, 50, processes)
    pid = processes[victim].pid if which == "parent" else child_of(processes[victim])
    os.kill(pid, signal.SIGKILL)
    ends = finish(processes, seconds=60)
    survivor, error = ends[1 - victim]
    assert survivor == 75, ends
    assert f"process {victim} of 2 has ended" in error
    assert "the same command resumes" in error.splitlines()[-1]
    assert ends[victim][0] == (-signal.SIGKILL if which == "parent" else 75), ends
    with lock.hold(workdir):  # nobody holds it any more
        assert folder.read_status(workdir)["state"] == "interrupted"
    assert_resumes(config, workdir, undisturbed)


@pytest.mark.parametrize(("process", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_one_process_saves_on_all(config, undisturbed, tmp_path, process, number):
    workdir = tmp_path / "run"
    processes = start_both(config, workdir)
    wait_for_step(workdir, 50, processes)
    processes[process].send_signal(number)
    ends = finish(processes)
    assert [code for code, _ in ends] == [75, 75], ends
    assert "Traceback" not in ends[0][1] + ends[1][1]
    status = folder.read_status(workdir)
    assert status["state"] == "interrupted"
    stopped = int(status["message"].partition("after step ")[2].split()[0])
    assert stopped % 10 == 0
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    assert_resumes(config, workdir, undisturbed)


def test_a_process_that_fails_alone_keeps_its_exit_code_and_ends_the_other(config, tmp_path):
    workdir = tmp_path / "run"
    ends = finish(start_both(config, workdir, ("-c", FAILS_ON_ONE)), seconds=100)
    assert [code for code, _ in ends] == [75, 2], ends
    assert "this host lacks a file" in ends[1][1]
    assert "process 1 of 2 has ended (exit code 2)" in ends[0][1]
    assert json.loads((workdir / "status.json").read_text())["state"] == "interrupted"


def test_waiting_for_a_process_that_never_comes_can_be_stopped(config, tmp_path):
    workdir = tmp_path / "run"
    first, second = start_both(config, workdir)
    second.kill()
    second.communicate()
    while not child_of(first):
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    ((code, error),) = finish([first])
    assert code == 75, error
    assert "stopped by SIGTERM" in error
    assert not workdir.exists()
