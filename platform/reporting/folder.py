"""The run folder: the names of its files, and how each is written, read and listed."""

import contextlib
import datetime
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lamina.platform.errors import UserError
from lamina.platform.reporting import records, storage
from lamina.platform.reporting.storage import PathLike

CONFIG = "config.json"
DEFAULTS = "defaults.json"  # the config file's own values, before the command line changed some
MANIFEST = "manifest.json"
STATUS = "status.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
PARAMETERS = "parameters.json"  # rows of the parameter table
ACTIVATIONS = "activations.json"  # rows of the activation table, of runs on several devices
SAMPLES = "samples.json"  # [{"title", "text"} or {"title", "png_base64"}]
LINEAGE = "lineage.json"  # {"parents"}: of a fork, the checkpoint that it shares its past with
TRACKERS = "trackers.json"  # the ids that trackers gave this run
REPORT = "report.html"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"  # held by a kernel lock while the run lives

STATES = ("running", "done", "interrupted", "diverged", "failed")
KILLED = "killed"
"""Shown for a run whose status says "running" but whose process is gone; never written."""


class RunRow(NamedTuple):
    """A run as `lamina list` shows it.

    Attributes:
        path: where it is, relative to the folder that was listed ("." for that folder itself).
        workdir: where it is.
        state: one of `STATES`, `KILLED`, "new" (no status yet) or "unreadable".
        program: `config.program`, "" where unknown.
        step: the last recorded step.
        steps: `config.steps`, None where unknown.
        final: {name: {"mean", "std", "values"}} of `result.json`; of the newest records where the
            run has no result.
        start: when it began, ISO 8601.
        seconds: the time of the last record, over all sessions; None without records.
        message: the status's message, or what can't be read.
    """

    path: str
    workdir: str
    state: str
    program: str = ""
    step: int = 0
    steps: int | None = None
    final: Mapping[str, Any] = {}
    start: str = ""
    seconds: float | None = None
    message: str = ""


def write_config(workdir: PathLike, text: str, defaults: str = "") -> None:
    """Writes `config.json`, and `defaults.json` where the file's own values are given too.

    Args:
        workdir: the run folder.
        text: the resolved config as JSON.
        defaults: the config as its file has it, as JSON; "" writes none.
    """
    root = storage.as_path(workdir)
    storage.write_text(root / CONFIG, text)
    if defaults:
        storage.write_text(root / DEFAULTS, defaults)


def read_config(workdir: PathLike) -> dict[str, Any]:
    """The resolved config as plain data; empty where there is none.

    Raises:
        UserError: `config.json` is corrupt.
    """
    return storage.read_object(storage.as_path(workdir) / CONFIG)


def write_status(workdir: PathLike, state: str, message: str = "") -> None:
    """Writes `status.json`: the state, and which process on which host, since when.

    Args:
        workdir: the run folder.
        state: one of `STATES`.
        message: what a person should know, for instance the error.

    Raises:
        ValueError: there is no such state.
    """
    if state not in STATES:
        raise ValueError(f"unknown state '{state}'; states are {', '.join(STATES)}")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = storage.as_path(workdir) / STATUS
    before: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # a corrupt status is replaced, not mourned
        before = storage.read_object(path)
    starts = state == "running"
    status = {
        "state": state,
        "message": message,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "start": before.get("start") or now,
        "session_start": now if starts else before.get("session_start") or now,
        "end": None if starts else now,
        "sessions": int(before.get("sessions") or 0) + starts,
    }
    storage.write_json(path, status)


def read_status(workdir: PathLike) -> dict[str, Any]:
    """What `status.json` says, with "state" as `KILLED` where the process is gone.

    Returns:
        The status; {"state": "new"} where there is none.

    Raises:
        UserError: `status.json` is corrupt.
    """
    status = storage.read_object(storage.as_path(workdir) / STATUS)
    if not status:
        return {"state": "new"}
    if status.get("state") == "running" and _is_gone(workdir, status):
        status["state"] = KILLED
    return status


def write_result(workdir: PathLike, result: Mapping[str, Any]) -> None:
    """Writes `result.json`: {"final": {name: {"mean", "std", "values"}}, ...}.

    Args:
        workdir: the run folder.
        result: the run's result. Reports know these keys: "final" (see `records.summarise`),
            "phases" (as `Clock.totals` gives them) and those of `report.SPEED`, and show other
            plain numbers as such.
    """
    storage.write_json(storage.as_path(workdir) / RESULT, result)


def read_result(workdir: PathLike) -> dict[str, Any] | None:
    """The run's result, or None where it has none yet.

    Raises:
        UserError: `result.json` is corrupt.
    """
    return storage.read_object(storage.as_path(workdir) / RESULT) or None


def write_samples(workdir: PathLike, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes `samples.json`: texts and images that the report shows.

    Args:
        workdir: the run folder.
        entries: each {"title", "text"} or {"title", "png_base64"}.
    """
    storage.write_json(storage.as_path(workdir) / SAMPLES, list(entries))


def write_parameters(
    workdir: PathLike,
    rows: Sequence[Mapping[str, Any]],
    activations: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes `parameters.json`, the rows of the parameter table, and `activations.json`.

    Args:
        workdir: the run folder.
        rows: each {"path", "shape", "dtype", "axes", "sharding", "bytes"}; axes are the logical
            axis names, one per dimension.
        activations: each {"axes", "shape", "dtype", "before", "sharding", "bytes"}; without any,
            there is no such file.
    """
    storage.write_json(storage.as_path(workdir) / PARAMETERS, list(rows))
    if activations:
        storage.write_json(storage.as_path(workdir) / ACTIVATIONS, list(activations))


def read_metrics(workdir: PathLike) -> list[records.Record]:
    """The run's records; see `records.read`."""
    return records.read(storage.as_path(workdir) / METRICS)


def is_run(workdir: PathLike) -> bool:
    """Tells whether a folder is a run's: whether it has a config or a status."""
    root = storage.as_path(workdir)
    return (root / CONFIG).exists() or (root / STATUS).exists()


def check_run(workdir: PathLike) -> None:
    """Raises a `UserError` where a folder isn't a run's."""
    if not is_run(workdir):
        raise UserError(f"{os.fspath(workdir)} is no run folder: it has no {CONFIG}")


def list_runs(root: PathLike) -> list[RunRow]:
    """The runs in a folder and below it, sorted by path.

    Args:
        root: the folder; a run folder itself is listed with the runs inside it.

    Returns:
        One row per folder that has a config or a status. A run with a corrupt file is listed as
        "unreadable" with the reason.

    Raises:
        UserError: there is no such folder.
    """
    top = storage.as_path(root)
    if not top.is_dir():
        raise UserError(f"There is no folder {os.fspath(root)} to list runs of.")
    return [_row(top, found) for found in _run_folders(top)]


def _run_folders(folder: Any) -> Iterator[Any]:
    if is_run(folder):
        yield folder
    for child in sorted(folder.iterdir(), key=lambda path: path.name):
        hidden = child.name.startswith(".")
        if not hidden and child.name not in (CHECKPOINTS, TENSORBOARD) and child.is_dir():
            yield from _run_folders(child)


def _row(top: Any, folder: Any) -> RunRow:
    path = folder.relative_to(top).as_posix()
    try:
        config, status = read_config(folder), read_status(folder)
        entries = read_metrics(folder)
        result = read_result(folder) or {}
    except UserError as error:
        return RunRow(path, os.fspath(folder), "unreadable", message=str(error))
    final = result.get("final")
    return RunRow(
        path=path,
        workdir=os.fspath(folder),
        state=str(status.get("state", "")),
        program=str(config.get("program", "")),
        step=max((entry.step for entry in entries), default=0),
        steps=config.get("steps"),
        final=final if isinstance(final, dict) else records.summarise(entries),
        start=str(status.get("start", "")),
        seconds=max((entry.time for entry in entries), default=None),
        message=str(status.get("message", "")),
    )


def _is_gone(workdir: PathLike, status: Mapping[str, Any]) -> bool:
    """Tells whether the process of a running status is known to have ended."""
    path = pathlib.Path(workdir) / LOCK
    if not storage.is_remote(workdir) and path.exists():
        return _is_free(path)
    return status.get("host") == socket.gethostname() and not _is_alive(status.get("pid"))


def _is_free(path: pathlib.Path) -> bool:
    import fcntl

    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is another user's
    return True
