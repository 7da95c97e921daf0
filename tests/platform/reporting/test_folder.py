import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from lamina.platform.checkpoints import lock
from lamina.platform.errors import UserError
from lamina.platform.reporting import folder, manifest, storage


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_status_keeps_the_first_start_and_counts_sessions(tmp_path):
    folder.write_status(tmp_path, "running")
    start = storage.read_object(tmp_path / folder.STATUS)["start"]
    folder.write_status(tmp_path, "interrupted", "SIGTERM at step 100")
    folder.write_status(tmp_path, "running")
    status = folder.read_status(tmp_path)
    assert (status["state"], status["sessions"], status["end"]) == ("running", 2, None)
    assert status["start"] == start
    assert (status["pid"], status["host"]) == (os.getpid(), socket.gethostname())
    folder.write_status(tmp_path, "failed", "disk full")
    status = folder.read_status(tmp_path)
    assert (status["state"], status["message"], status["sessions"]) == ("failed", "disk full", 2)
    assert status["end"] >= start


def test_a_status_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown state 'killed'"):
        folder.write_status(tmp_path, "killed")


def test_a_running_status_whose_process_is_gone_is_shown_as_killed(tmp_path):
    folder.write_status(tmp_path, "running")
    status = storage.read_object(tmp_path / folder.STATUS)
    storage.write_json(tmp_path / folder.STATUS, {**status, "pid": dead_process()})
    assert folder.read_status(tmp_path)["state"] == folder.KILLED
    elsewhere = {**status, "pid": dead_process(), "host": "another-host"}
    storage.write_json(tmp_path / folder.STATUS, elsewhere)
    assert folder.read_status(tmp_path)["state"] == "running"  # we cannot know


def test_a_running_status_whose_lock_is_free_is_shown_as_killed(tmp_path):
    folder.write_status(tmp_path, "running")
    with lock.hold(tmp_path):
        assert folder.read_status(tmp_path)["state"] == "running"
    assert folder.read_status(tmp_path)["state"] == folder.KILLED  # though this process lives


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        (folder.CONFIG, folder.read_config),
        (folder.STATUS, folder.read_status),
        (folder.RESULT, folder.read_result),
        (folder.MANIFEST, manifest.read),
    ],
)
def test_a_corrupt_file_is_named(tmp_path, name, read, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read(tmp_path)


def test_reading_an_empty_folder_finds_nothing(tmp_path):
    assert folder.read_config(tmp_path) == {}
    assert folder.read_status(tmp_path) == {"state": "new"}
    assert folder.read_result(tmp_path) is None
    assert folder.read_metrics(tmp_path) == []
    assert manifest.read(tmp_path) == {}


def test_a_result_with_numpy_numbers_and_nan_is_valid_json(tmp_path):
    result = {"final": {"loss": {"mean": np.float32("nan"), "values": np.arange(2)}}}
    folder.write_result(tmp_path, result)
    text = (tmp_path / folder.RESULT).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "final": {"loss": {"mean": None, "values": [0, 1]}}
    }


def test_the_files_of_a_remote_folder_are_written_as_whole_objects(bucket):
    folder.write_config("gs://bucket/run", '{"steps": 3}', defaults='{"steps": 2}')
    folder.write_status("gs://bucket/run", "done")
    assert set(bucket) == {
        f"gs://bucket/run/{name}.json" for name in ("config", "defaults", "status")
    }
    assert folder.read_config("gs://bucket/run") == {"steps": 3}


def test_listing_shows_each_run_with_its_status_and_numbers(tmp_path, make):
    make.run(tmp_path / "a" / "done")
    started = tmp_path / "b"
    folder.write_config(started, json.dumps(make.config()))
    folder.write_status(started, "running")
    storage.write_json(
        started / folder.STATUS,
        {**storage.read_object(started / folder.STATUS), "pid": dead_process()},
    )
    (started / folder.METRICS).write_text(
        '{"step": 40, "split": "train", "name": "loss", "value": 0.5, "time": 9.0}\n{"st'
    )
    (started / "checkpoints" / "40").mkdir(parents=True)
    (started / "checkpoints" / "40" / folder.CONFIG).write_text("{}")
    broken = tmp_path / "c"
    broken.mkdir()
    (broken / folder.STATUS).write_text("{")
    rows = folder.list_runs(tmp_path)
    assert [row.path for row in rows] == ["a/done", "b", "c"]
    done, killed, unreadable = rows
    assert (done.state, done.program, done.step, done.steps) == ("done", "train", 600, 600)
    assert done.final["test/accuracy"]["mean"] == pytest.approx(0.977, abs=0.01)
    assert (killed.state, killed.step, killed.seconds) == ("killed", 40, 9.0)
    assert killed.final["train/loss"]["mean"] == 0.5
    assert unreadable.state == "unreadable"
    assert folder.STATUS in unreadable.message
    assert [row.path for row in folder.list_runs(tmp_path / "b")] == ["."]
    with pytest.raises(UserError, match="no folder"):
        folder.list_runs(tmp_path / "nowhere")


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("width = 16\n")
    git("add", "code.py")
    git("commit", "-m", "begin")
    return tmp_path


def test_git_tells_revision_changes_and_untracked_files(repository, monkeypatch):
    assert manifest.git(repository)["diff"] == ""
    (repository / "code.py").write_text("width = 32\n")
    (repository / "new.py").write_text("")
    found = manifest.git(repository)
    assert len(found["revision"]) == 40
    assert "-width = 16\n+width = 32" in found["diff"]
    assert found["untracked"] == ["new.py"]
    monkeypatch.setattr(manifest, "DIFF_LIMIT", 10)
    assert "more characters" in manifest.git(repository)["diff"]


def test_outside_of_git_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifest.git(tmp_path) is None


def test_the_manifest_tells_packages_devices_mesh_and_command(tmp_path):
    import jax

    found = manifest.collect(mesh={"data": 1}, parents=["runs/base"], command=["lamina", "train"])
    manifest.write(tmp_path, found)
    read = manifest.read(tmp_path)
    assert read["packages"]["jax"] == jax.__version__
    assert "orbax-checkpoint" in read["packages"]
    assert read["devices"]["count"] == jax.device_count()
    assert (read["mesh"], read["parents"]) == ({"data": 1}, ["runs/base"])
    assert read["command"] == ["lamina", "train"]
    assert read["earlier"] == []


def test_a_resumed_runs_manifest_keeps_what_was_different_before(tmp_path):
    manifest.write(tmp_path, {"python": "3.11", "host": "a", "time": "1"})
    manifest.write(tmp_path, {"python": "3.13", "host": "a", "time": "2"})
    manifest.write(tmp_path, {"python": "3.13", "host": "a", "time": "3"})
    assert manifest.read(tmp_path)["earlier"] == [{"python": "3.11", "time": "1"}, {"time": "2"}]
