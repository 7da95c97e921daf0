"""The writer of `metrics.jsonl`: appends to a local file, rewrites a remote object."""

import os
import time
from collections.abc import Callable, Sequence

from lamina.platform.reporting import storage
from lamina.platform.reporting.protocol import Writer
from lamina.platform.reporting.records import Record, lines, whole_size
from lamina.platform.reporting.storage import PathLike

REMOTE_SECONDS = 60.0
"""Seconds between two rewrites of a remote `metrics.jsonl`, besides those that `sync` asks for."""


def open_log(path: PathLike, now: Callable[[], float] = time.monotonic) -> Writer:
    """Opens a `metrics.jsonl` to append to it.

    On a local disk each write is flushed to the system (safe from `kill -9`) and `sync` to the disk
    (safe from a power cut). An object store can't append: there the lines are kept in memory and
    the whole object is rewritten by `sync`, by `close`, and by a write when `REMOTE_SECONDS` have
    passed.

    Args:
        path: the file; a torn last line is dropped from it.
        now: the clock, in seconds.

    Returns:
        The open log.
    """
    return _remote_log(path, now) if storage.is_remote(path) else _local_log(path)


def _local_log(path: PathLike) -> Writer:
    target = storage.as_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = open(target, "a+b")  # noqa: SIM115 (closed by the log's close)
    file.seek(0)
    file.truncate(whole_size(file.read()))

    def write(records: Sequence[Record]) -> None:
        file.write(lines(records))
        file.flush()

    def sync() -> None:
        if not file.closed:
            file.flush()
            os.fsync(file.fileno())

    def close() -> None:
        sync()
        file.close()

    return Writer(write, sync, close)


def _remote_log(path: PathLike, now: Callable[[], float]) -> Writer:
    found = storage.read_bytes(path) or b""
    content = bytearray(found[: whole_size(found)])
    changed = len(content) != len(found)
    last = now()

    def sync() -> None:
        nonlocal changed, last
        if changed:
            storage.write_bytes(path, bytes(content))
        changed = False
        last = now()

    def write(records: Sequence[Record]) -> None:
        nonlocal changed
        content.extend(lines(records))
        changed = True
        if now() - last >= REMOTE_SECONDS:
            sync()

    return Writer(write, sync, sync)
