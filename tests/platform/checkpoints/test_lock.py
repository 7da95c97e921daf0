"""One run per folder; the kernel lets go of the lock of a killed run."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from lamina.platform.checkpoints.lock import hold
from lamina.platform.errors import UserError

HOLDER = """
import os, sys, time
from lamina.platform.checkpoints.lock import hold
with hold(sys.argv[1]):
    if len(sys.argv) == 2:
        print("held", flush=True)
    elif os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(30)
"""


def start(folder, *args):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *args], stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def end(process, number):
    process.send_signal(number)
    process.wait()
    process.stdout.close()


def test_a_second_run_is_kept_out_and_told_who_holds_the_folder(tmp_path):
    process, _ = start(tmp_path / "run")
    with pytest.raises(UserError) as caught, hold(tmp_path / "run"):
        pytest.fail("two runs in one folder")
    assert f"in use by process {process.pid} on {socket.gethostname()}" in str(caught.value)
    end(process, signal.SIGTERM)
    with hold(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_run_is_gone_at_once(tmp_path):
    process, _ = start(tmp_path)
    end(process, signal.SIGKILL)
    with hold(tmp_path):
        pass


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path):
    process, child = start(tmp_path, "fork")
    end(process, signal.SIGKILL)
    try:
        with hold(tmp_path):
            pass
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_the_lock_ends_with_the_block_also_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        raise ZeroDivisionError
    with hold(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass


def test_a_remote_folder_has_no_lock():
    with hold("gs://bucket/run"), hold("gs://bucket/run"):
        pass


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="can't use the run folder"),
        hold(tmp_path / "file" / "run"),
    ):
        pass
