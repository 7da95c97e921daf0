"""Runs an experiment in a run folder, and gives trained models back: the Python entry points.

```python
from lamina.platform.run import restore, run

result = run(config, "runs/quickstart")
result.final["test/accuracy"].mean
model = restore("runs/quickstart")
```
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.checkpoints import lock, restoring
from lamina.platform.errors import DivergedError, InterruptedRun, UserError, blaming_files, writing
from lamina.platform.inference import TrainedModel, restore
from lamina.platform.programs import table as programs
from lamina.platform.programs.context import Context
from lamina.platform.programs.table import Program
from lamina.platform.reporting import (
    added,
    folder,
    manifest,
    notebook,
    records,
    report,
    storage,
)
from lamina.platform.reporting.records import Record, Summary
from lamina.platform.training import signals

__all__ = ["Result", "TrainedModel", "restore", "run"]


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

    The same call again resumes a run that was killed, and returns the result of a finished one
    (of a benchmark or a shoot-out it first runs the cells that were removed).
    A notebook's interrupt (SIGINT) and SIGTERM save a checkpoint and return what is there. A run
    that has diverged isn't repeated; one that has failed goes on from its last checkpoint. Seeds
    may be added to a finished run: they are trained in `seeds_1_2/` in its folder.

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
    root = storage.as_path(workdir)
    try:
        with blaming_files(f"the run in {root} can't go on"):
            return _run(config, root, trust, console, devices)
    except InterruptedRun as error:
        return read_result(os.fspath(root), "interrupted", str(error))
    except DivergedError as error:
        return read_result(os.fspath(root), "diverged", str(error))


def _run(config, workdir, trust, console, devices) -> Result:
    program = programs.find(config)
    resolved = program.resolve(config, trust)
    before = check_resumable(workdir, program, resolved)
    new_seeds = _new_seeds(before, resolved)
    if new_seeds:
        return _add_seeds(config, resolved, new_seeds, workdir, trust, console, devices)
    # What is wrong with the config shows here, before there is a folder.
    fresh = not restoring.list_steps(workdir / folder.CHECKPOINTS)
    prepared = program.prepare(resolved, trust, devices, fresh)
    with contextlib.ExitStack() as stack:
        with writing(workdir):
            _hold(stack, workdir, program, resolved, before)
            if before is not None:
                status = folder.read_status(workdir)
                if status["state"] == "done" and folder.read_result(workdir):
                    more = _longer(before, resolved) or _other_methods(before, resolved)
                    if not more and program.is_whole(prepared, os.fspath(workdir)):
                        return read_result(os.fspath(workdir), "done", "")
                elif status["state"] == "diverged" and before.to_dict() == configs.thaw(resolved):
                    raise DivergedError(f"{status.get('message')}\n{_DIVERGES_AGAIN}")
            _describe(workdir, config, resolved, prepared.parts.mesh)
            _write_status(workdir, "running")
        say = _printer(console)
        stop = stack.enter_context(signals.catch())
        with _status_at_end(workdir), blaming_files(f"the run in {workdir} can't go on"):
            context = Context(os.fspath(workdir), trust, stop, say, console)
            outcome = program.run(prepared, context)
            if jax.process_index() == 0:
                folder.write_result(workdir, outcome.result)
        if jax.process_index() == 0:
            report.render(workdir)
    return read_result(os.fspath(workdir), "done", "", outcome.state)


_DIVERGES_AGAIN = (
    "The same config diverges again: change it, and run it in another --workdir. (Or remove "
    f"{folder.STATUS} to train once more from the last checkpoint.)"
)


def _hold(stack: contextlib.ExitStack, workdir, program: Program, resolved, before) -> None:
    """Makes the run folder and holds its lock; nobody may have changed it since it was looked at.

    Raises:
        UserError: another run holds the folder, or has held it in the meantime.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index():
        return
    stack.enter_context(lock.hold(workdir))
    if check_resumable(workdir, program, resolved) != before:
        raise UserError(
            f"another run has used {workdir} in the meantime: the same command again goes on there"
        )


def _add_seeds(config, resolved, new_seeds, workdir, trust, console, devices) -> Result:
    """Trains further seeds of a finished run in a sub-folder, and joins their numbers to its own.

    The run's config is written last: a kill before that leaves a finished run of the old seeds, and
    the same command goes on with the new ones.
    """
    sub = added.sub_folder(workdir, new_seeds)
    part = ConfigDict(configs.thaw(config))
    with part.ignore_type():
        part.seeds = new_seeds
    before = check_resumable(workdir, programs.find(config), resolved)
    with contextlib.ExitStack() as stack:
        with writing(workdir):
            _hold(stack, workdir, programs.find(config), resolved, before)
        _printer(console)(f"adds the seeds {new_seeds}, in {sub}")
        _run(part, sub, trust, console, devices)
        if jax.process_index() == 0:
            added.join(workdir, sub, resolved.seeds)
        _describe(workdir, config, resolved)
        if jax.process_index() == 0:
            report.render(workdir)
    return read_result(os.fspath(workdir), "done", "")


def _new_seeds(before, resolved) -> tuple[int, ...]:
    """Returns the seeds of `resolved` that the run of the config `before` doesn't have."""
    known = before.get("seeds", ()) if before is not None else resolved.seeds
    return tuple(seed for seed in resolved.seeds if seed not in known)


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
    with blaming_files(f"--workdir={workdir} is no folder for a run"):
        text = storage.read_bytes(path)
    if text is None:
        return None
    before = _with_new_keys(program, configs.from_json(text.decode("utf-8", "replace"), str(path)))
    differences = program.changes(before, resolved)
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config:\n"
            f"{configs.describe_difference(differences)}\n"
            f"Choose another --workdir, or go on with the old config: --config={path}"
        )
    new_seeds, longer = _new_seeds(before, resolved), _longer(before, resolved)
    if new_seeds and (longer or folder.read_status(workdir)["state"] != "done"):
        raise UserError(
            f"the seeds {new_seeds} can be added once the run in {workdir} is done as it is: first "
            f"finish it, with --config={path}"
        )
    if longer and any(added.find(workdir, seed) for seed in before.get("seeds", ())):
        raise UserError(
            f"{workdir} can't be made longer, for seeds were added to it: choose another --workdir"
        )
    return before


def _with_new_keys(program: Program, before: ConfigDict) -> ConfigDict:
    """Returns a run's config with the defaults of keys that Lamina didn't have when it was made."""
    try:
        # Without trust: nobody's code is imported for the sake of a comparison.
        return ConfigDict(configs.thaw(program.resolve(before, ())))
    except UserError:
        return before


def _longer(before, resolved) -> bool:
    return (before.get("steps"), before.get("epochs")) != (resolved.steps, resolved.epochs)


def _other_methods(before, resolved) -> bool:
    """Tells whether a merge of tasks has been given other methods than it was finished with."""
    differences = configs.difference(configs.thaw(before), configs.thaw(resolved))
    return any(key.startswith("merge.methods") for key in differences)


def _describe(workdir, config, resolved, mesh: Mesh | None = None) -> None:
    if jax.process_index():
        return
    folder.write_config(workdir, configs.to_json(resolved), configs.to_json(config))
    sizes = dict(mesh.shape) if mesh is not None else None
    parents = [resolved.init_from] if resolved.get("init_from") else []
    parents += storage.read_object(storage.as_path(workdir) / folder.LINEAGE).get("parents", [])
    manifest.write(workdir, manifest.collect(mesh=sizes, parents=parents))


def _write_status(workdir, state: str, message: str = "") -> None:
    if jax.process_index() == 0:
        folder.write_status(workdir, state, message)


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
        with contextlib.suppress(OSError, UserError):  # the error itself is what matters
            _write_status(workdir, state, message)
            if jax.process_index() == 0:
                report.render(workdir)
        raise
    _write_status(workdir, "done")


def _printer(console: bool):
    def say(text: str) -> None:
        if console and jax.process_index() == 0:
            with contextlib.suppress(BrokenPipeError):
                print(text, file=sys.stderr, flush=True)

    return say
