"""A full disk, an unwritable folder, a killed process: earlier checkpoints survive."""

import os
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from lamina.platform.checkpoints.failures import CheckpointError
from lamina.platform.checkpoints.restoring import list_steps
from lamina.platform.checkpoints.store import open_store
from lamina.platform.errors import UserError

# Orbax leaves its other writes unawaited when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB; needs root, so it is skipped elsewhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def noise(step, size):
    return {"x": jnp.asarray(np.random.default_rng(step).random(size, np.float32))}


def check_failed_save_leaves_the_old_one(folder, raises_on, free=lambda: None):
    store = open_store(folder, keep=2)
    store.save(1, noise(1, 1000))
    store.wait()
    before = sorted(str(p) for p in folder.rglob("*"))
    raises_on(store)
    assert sorted(str(p) for p in folder.rglob("*")) == before
    assert store.steps() == (1,)
    free()
    store.save(3, noise(3, 1000))  # the caller goes on
    restored = store.restore(noise(0, 1000))
    assert restored.step == 3
    assert restored.notes == ()
    store.close()
    assert list_steps(folder) == (1, 3)


def test_a_full_disk_is_reported_at_the_next_wait(small_disk):
    def fill(store):
        store.save(2, noise(2, 3_000_000))
        with pytest.raises(CheckpointError, match=r"step 2 in .*the disk is full") as caught:
            store.wait()
        assert str(small_disk) in str(caught.value)
        assert isinstance(caught.value, UserError)
        store.wait()  # raised once

    check_failed_save_leaves_the_old_one(small_disk / "checkpoints", fill)


def test_a_full_disk_is_reported_at_the_next_save_which_is_not_started(small_disk):
    def fill(store):
        store.save(2, noise(2, 3_000_000))
        with pytest.raises(CheckpointError, match="the disk is full"):
            store.save(5, noise(5, 1000))
        assert 5 not in store.steps()

    check_failed_save_leaves_the_old_one(small_disk / "checkpoints", fill)


def test_a_disk_without_room_for_the_manifest_fails_whole(tmp_path, monkeypatch):
    from lamina.platform.checkpoints import manifest

    write = manifest.write

    def full(folder, content):
        raise OSError(28, "No space left on device")

    def fail(store):
        monkeypatch.setattr(manifest, "write", full)
        store.save(2, noise(2, 1000))
        with pytest.raises(CheckpointError, match="the disk is full"):
            store.wait()

    def free():
        monkeypatch.setattr(manifest, "write", write)

    check_failed_save_leaves_the_old_one(tmp_path / "checkpoints", fail, free)


@pytest.fixture
def read_only(tmp_path):
    """(folder, switch): after switch() the folder can't be written, by root neither."""
    if os.getuid() != 0:
        yield tmp_path / "c", lambda on: (tmp_path / "c").chmod(0o555 if on else 0o755)
        return
    disk = tmp_path / "disk"  # root may write to any folder, but not to a read-only mount
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("root without the right to mount: no folder is read-only here")

    def switch(on):
        mode = "remount,ro" if on else "remount,rw"
        subprocess.run(["mount", "-o", mode, str(disk)], check=True)

    yield disk / "c", switch
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_that_became_read_only_is_reported_at_once_with_its_name(read_only):
    folder, switch = read_only

    def fail(store):
        switch(True)
        with pytest.raises(CheckpointError, match=r"step 2 in .*(read-only|denied)") as caught:
            store.save(2, noise(2, 1000))
        assert str(folder) in str(caught.value)
        assert store.restore(noise(0, 1000)).step == 1

    check_failed_save_leaves_the_old_one(folder, fail, lambda: switch(False))


def test_a_folder_that_cannot_be_created_is_reported_with_its_name(read_only, tmp_path):
    folder, switch = read_only
    folder.mkdir(exist_ok=True)
    switch(True)
    with pytest.raises(CheckpointError, match=r"c/inside: .*(read-only|denied)"):
        open_store(folder / "inside")
    switch(False)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a folder"):
        open_store(tmp_path / "file" / "inside")


# Imports once and forks a saver per line of its input, before JAX has started any thread.
SAVERS = """
import importlib, os, signal, sys, warnings
import jax.numpy as jnp
from lamina.platform.checkpoints.store import open_store
warnings.simplefilter("ignore")
def deadly(when, function):
    def wrapped(*args):
        if when == "after":
            function(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    return wrapped
for line in sys.stdin:
    saver = os.fork()
    if saver:
        os.waitpid(saver, 0)
        print("ended", flush=True)
        continue
    folder, *moment = line.split()
    store = open_store(folder, keep=2)
    if moment:  # "before" or "after" a function that a save calls
        when, module, name = moment
        module = importlib.import_module(f"lamina.platform.checkpoints.{module}")
        setattr(module, name, deadly(when, getattr(module, name)))
    step = max(store.steps(), default=0)
    print(os.getpid(), flush=True)
    while True:
        step += 1
        store.save(step, {"x": jnp.full((200, 1000), step), "y": jnp.full(10, step)})
        print(step, flush=True)
"""


@pytest.fixture(scope="module")
def savers():
    with subprocess.Popen(
        [sys.executable, "-c", SAVERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("before manifest write", (1, 2)),
        ("after manifest write", (1, 2)),
        ("before folders commit", (1, 2)),
        ("after folders commit", (1, 2, 3)),
        ("before folders remove", (1, 2, 3)),
        ("after folders remove", (2, 3)),
    ],
)
def test_kill_9_between_the_parts_of_a_save_leaves_the_old_set_or_the_new(
    tmp_path, savers, moment, left
):
    store = open_store(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, noise(step, 100))
    store.close()
    savers.stdin.write(f"{tmp_path} {moment}\n")
    while savers.stdout.readline() != "ended\n":
        pass
    assert list_steps(tmp_path) == left
    open_store(tmp_path).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [str(step) for step in left]


def test_kill_9_at_any_moment_leaves_whole_checkpoints(tmp_path, savers):
    folder = tmp_path / "checkpoints"
    form = {"x": jnp.zeros((200, 1000), jnp.int32), "y": jnp.zeros(10, jnp.int32)}
    reached, leftovers = 0, 0
    for attempt, delay in enumerate(np.random.default_rng().uniform(0.0, 0.15, 20)):
        if attempt >= 4 and leftovers:
            break
        savers.stdin.write(f"{folder}\n")
        pid = int(savers.stdout.readline())
        started = [int(savers.stdout.readline()) for _ in range(3)]
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        while (line := savers.stdout.readline()) != "ended\n":
            started.append(int(line))
        leftovers += any(p.name.startswith(".") for p in folder.iterdir())
        before = list_steps(folder)
        assert 1 <= len(before) <= 3  # of three, the oldest was about to be deleted
        # When a save returns, the one before it was complete.
        assert max(before) >= started[-1] - 1 > reached
        reached = max(before)
        store = open_store(folder, keep=2)
        restored = store.restore(form)
        assert restored.step == reached
        assert restored.notes == ()
        assert {int(v) for v in np.unique(restored.state["x"])} == {reached}
        assert not any(p.name.startswith(".") for p in folder.iterdir())
        store.close()
    assert leftovers, "no kill fell into a save: the test shows nothing"
