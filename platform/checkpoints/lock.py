"""A kernel lock on a run's folder: one run at a time, and nothing stale when a run is killed."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

from etils import epath

from lamina.platform.errors import UserError

LOCK_FILE = ".lock"
PATIENCE = 0.5
"""Seconds to wait for a lock: who lists runs tries their locks for an instant."""

_held: set[int] = set()  # descriptors of the locks that this process holds


def _close_in_child() -> None:
    # A forked child shares the lock, and would keep it alive after its parent was killed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def hold(folder: epath.PathLike) -> Iterator[None]:
    """Holds the lock of a run's folder (creating the folder) while the `with` block runs.

    The lock is `flock` on `<folder>/.lock`: the kernel lets go of it when the process ends in
    whatever way, `kill -9` included. The file stays behind and means nothing by itself. With
    several processes, process 0 alone takes it. On NFS it holds between machines that mount the
    folder with locking (the default since NFSv4); on `gs://` there is no such lock, and this does
    nothing: there, starting one run at a time is up to you.

    Args:
        folder: the run's folder.

    Raises:
        UserError: another run holds it (the message names its process and machine), or the folder
            can't be written.
    """
    if "://" in os.fspath(folder):
        yield
        return
    path = os.path.join(os.path.abspath(os.path.expanduser(os.fspath(folder))), LOCK_FILE)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"can't use the run folder {os.path.dirname(path)}: {error.strerror}"
        ) from error
    try:
        _lock(descriptor)
    except OSError as error:
        busy = isinstance(error, BlockingIOError)
        holder = _holder(descriptor) if busy else ""
        os.close(descriptor)
        if not busy:
            raise UserError(f"can't lock {path}: {error.strerror}") from error
        raise UserError(
            f"the run folder {os.path.dirname(path)} is in use by {holder}; wait for that run, "
            "stop it, or choose another workdir"
        ) from None
    _held.add(descriptor)
    try:
        me = {"pid": os.getpid(), "host": socket.gethostname()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        yield
    finally:
        if descriptor in _held:  # a forked child has closed its copy already
            _held.discard(descriptor)
            os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
