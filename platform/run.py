"""Runs an experiment in a run folder, and gives trained models back: the Python entry points.

from lamina.platform.run import run, restore

result = run(config, "runs/quickstart")
result.final["test/accuracy"].mean
model = restore("runs/quickstart")
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.checkpoints import lock
from lamina.platform.errors import DivergedError, InterruptedRun, UserError
from lamina.platform.inference import TrainedModel, restore
from lamina.platform.programs.context import Context
from lamina.platform.programs.table import PROGRAMS, Program
from lamina.platform.reporting import folder, manifest, notebook, records, report, storage
from lamina.platform.reporting.records import Record, Summary
from lamina.platform.training import signals

__all__ = ["Result", "TrainedModel", "restore", "run"]

logger = logging.getLogger(__name__)


class Result(NamedTuple):
    """What a run gave.

    Attributes:
        workdir: its folder.
        status: "done", "interrupted" or "diverged".
        message: why it ended before its end, or "".
        seeds: their values.
        final: "split/metric" to its last value: `mean`, `std` and `values`, one for each seed.
        metrics: all records.
        summary: what `result.json` holds; empty if the run has not finished.
        state: the train state at the end; None if nothing was trained in this call.
    """

    workdir: str
    status: str
    message: str
    seeds: tuple[int, ...]
    final: dict[str, Summary]
    metrics: list[Record]
    summary: dict[str, Any]
    state: Any = None

    def _repr_html_(self) -> str:
        final = {name: entry._asdict() for name, entry in self.final.items()}
        return notebook.result_html(final, self.metrics, title=f"{self.workdir} ({self.status})")


def run(
    config: ConfigDict | FrozenConfigDict,
    workdir: str | os.PathLike,
    *,
    trust: Sequence[str] = configs.EVERYONE,
    console: bool = True,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """Runs an experiment in `workdir`, or goes on with the one that is there.

    The same call again resumes a run that was killed, and returns the result of a finished one.
    A notebook's interrupt (SIGINT) and SIGTERM save a checkpoint and return what is there.

    Args:
        config: the experiment; it is not changed.
        workdir: the run folder, local or `gs://`.
        trust: packages whose factories the config may name, as `("my_package",)`; by default all,
            for a config that is your own code.
        console: whether to print progress.
        devices: the devices to use, all of them; default: all that jax has.

    Returns:
        The result; `status` tells whether the run is done.

    Raises:
        UserError: something about the config, the data or the folder is wrong.
    """
    with contextlib.ExitStack() as stack:
        try:
            return _run(stack, config, storage.as_path(workdir), trust, console, devices)
        except (InterruptedRun, DivergedError) as error:
            status = "interrupted" if isinstance(error, InterruptedRun) else "diverged"
            return read_result(os.fspath(workdir), status, str(error))


def _run(stack: contextlib.ExitStack, config, workdir, trust, console, devices) -> Result:
    program = find_program(config)
    resolved = program.resolve(config, trust)
    before = check_resumable(workdir, program, resolved)
    # What is wrong with the config shows here, before there is a folder.
    prepared = program.prepare(resolved, trust, devices, before is None)
    with _writable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock.hold(workdir))
        status = folder.read_status(workdir).get("state")
        if status == "done" and before is not None and not _longer(before, resolved):
            return read_result(os.fspath(workdir), "done", "")
        _describe(workdir, config, resolved)
        folder.write_status(workdir, "running")
    say = _printer(console)
    with _status_at_end(workdir), signals.catch() as stop:
        context = Context(os.fspath(workdir), trust, stop, say, console)
        outcome = program.run(prepared, context)
        folder.write_result(workdir, outcome.result)
    if jax.process_index() == 0:
        report.render(workdir)
    return read_result(os.fspath(workdir), "done", "", outcome.state)


def find_program(config: ConfigDict | FrozenConfigDict) -> Program:
    """Returns the program that `config.program` names (default: train).

    Raises:
        UserError: there is no such program.
    """
    name = config.get("program", "train")
    if name not in PROGRAMS:
        raise UserError(f"program = {name!r} is unknown: one of {', '.join(sorted(PROGRAMS))}")
    return PROGRAMS[name]


def read_result(workdir: str, status: str, message: str, state: Any = None) -> Result:
    """Returns the result of the run in `workdir` as its files tell it.

    Raises:
        UserError: a file is corrupt.
    """
    root = storage.as_path(workdir)
    summary = folder.read_result(root) or {}
    found = records.read(root / folder.METRICS)
    seeds = tuple(folder.read_config(root).get("seeds", ()))
    final = summary.get("final") or records.summarise(found, seeds=seeds)
    final = {name: Summary(**entry) for name, entry in final.items()}
    return Result(workdir, status, message, seeds, final, found, summary, state)


def check_resumable(workdir: str | os.PathLike, program: Program, resolved: Any) -> Any:
    """Returns the config of the run in `workdir` that `resolved` can go on with, or None if new.

    Raises:
        UserError: the folder holds a run of another config.
    """
    path = storage.as_path(workdir) / folder.CONFIG
    text = storage.read_bytes(path)
    if text is None:
        return None
    before = configs.from_json(text.decode("utf-8", "replace"), str(path))
    differences = program.changes(before, resolved)
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config:\n"
            f"{configs.describe_difference(differences)}\n"
            f"Choose another --workdir, or go on with the old config: --config={path}"
        )
    return before


def _longer(before, resolved) -> bool:
    return (before.get("steps"), before.get("epochs")) != (resolved.steps, resolved.epochs)


def _describe(workdir, config, resolved) -> None:
    if jax.process_index():
        return
    folder.write_config(workdir, configs.to_json(resolved), configs.to_json(config))
    manifest.write(workdir, manifest.collect(parents=_parents(resolved)))


def _parents(resolved) -> list[str]:
    return [resolved.init_from] if resolved.get("init_from") else []


@contextlib.contextmanager
def _writable(workdir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--workdir={workdir} can't be written: {error}") from error


@contextlib.contextmanager
def _status_at_end(workdir) -> Iterator[None]:
    """Writes how the body ended into `status.json`."""
    try:
        yield
    except BaseException as error:
        states = {InterruptedRun: "interrupted", DivergedError: "diverged"}
        state = states.get(type(error), "failed")
        if isinstance(error, KeyboardInterrupt):
            state = "interrupted"
        message = str(error) if state != "failed" else f"{type(error).__name__}: {error}"
        if state == "failed" and not isinstance(error, UserError):
            logger.debug("%s", traceback.format_exc())
        with contextlib.suppress(OSError):
            folder.write_status(workdir, state, message)
            report.render(workdir)
        raise
    folder.write_status(workdir, "done")


def _printer(console: bool):
    def say(text: str) -> None:
        if console and jax.process_index() == 0:
            print(text, file=sys.stderr, flush=True)

    return say
