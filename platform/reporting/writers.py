"""The writers by name, and how several of them become one."""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lamina.platform.errors import UserError
from lamina.platform.reporting import folder, metrics_log, storage
from lamina.platform.reporting.console import console
from lamina.platform.reporting.protocol import NULL, RunInfo, Writer, tag
from lamina.platform.reporting.records import Record
from lamina.platform.reporting.trackers import mlflow, wandb

FAILURES = 5
"""After so many failures one after another a tracker is given up (our choice)."""


def jsonl(run: RunInfo) -> Writer:
    """Appends to the run's `metrics.jsonl`, the file that every report is made from."""
    return metrics_log.open_log(storage.as_path(run.workdir) / folder.METRICS)


def tensorboard(run: RunInfo) -> Writer:
    """Writes event files for TensorBoard; several seeds are curves "split/name/seed_0".

    A resumed run tells TensorBoard to drop what the session before wrote after the checkpoint, so
    that curves don't double back. A value that isn't finite is written as NaN, which TensorBoard
    marks with a triangle.
    """
    from tensorboardX import SummaryWriter

    purge_step = run.start_step + 1 if run.start_step else None
    events = SummaryWriter(
        str(storage.as_path(run.workdir) / folder.TENSORBOARD), purge_step=purge_step
    )

    def write(records: Sequence[Record]) -> None:
        for record in records:
            value = float("nan") if record.value is None else record.value
            events.add_scalar(tag(record, run.seeds), value, record.step)

    return Writer(write, events.flush, events.close)


WRITERS: dict[str, Callable[..., Writer]] = {
    "jsonl": jsonl,
    "tensorboard": tensorboard,
    "console": console,
    "wandb": wandb,
    "mlflow": mlflow,
}
"""Name to factory: `factory(run, **options) -> Writer`."""

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Writers that a run can do without: when one fails, the run warns once and goes on."""


def check_trackers(names: Sequence[str]) -> None:
    """Checks that trackers exist and that their packages are installed.

    Raises:
        UserError: one doesn't, or isn't.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"trackers: {name!r} is unknown; there are {', '.join(TRACKERS)}")
        package = {"tensorboard": "tensorboardX"}.get(name, name)
        if importlib.util.find_spec(package) is None:
            raise UserError(f"trackers: {name!r} needs the package: pip install 'lamina[{name}]'")


def open_writers(run: RunInfo, options: Mapping[str, Mapping[str, Any]]) -> Writer:
    """Opens writers by name, as one writer; on any process but the first it writes nowhere.

    Args:
        run: what the writers know of the run.
        options: name to keyword arguments, for instance `{"jsonl": {}, "wandb": {"project": "x"}}`.

    Returns:
        One writer for all of them, in the given order.

    Raises:
        UserError: an unknown name, or the package of an extra is not installed.
    """
    for name in options:
        if name not in WRITERS:
            raise UserError(f"There is no writer '{name}'. Writers are: {', '.join(WRITERS)}.")
    if run.process_index != 0:
        return NULL
    opened: list[Writer] = []
    try:
        for name, keywords in options.items():
            make = WRITERS[name]
            if name in TRACKERS:
                opened.append(forgiving(name, lambda make=make, kw=keywords: make(run, **kw)))
            elif name == "console":
                opened.append(while_read(make(run, **keywords)))
            else:
                opened.append(make(run, **keywords))
    except BaseException:
        fan_out(opened).close()
        raise
    return fan_out(opened)


def fan_out(writers: Sequence[Writer]) -> Writer:
    """One writer that writes to all of these; each is closed even if another one fails to."""
    writers = tuple(writers)

    def write(records: Sequence[Record]) -> None:
        for writer in writers:
            writer.write(records)

    def sync() -> None:
        for writer in writers:
            writer.sync()

    def close() -> None:
        with contextlib.ExitStack() as stack:
            for writer in reversed(writers):
                stack.callback(writer.close)

    return Writer(write, sync, close)


def while_read(writer: Writer) -> Writer:
    """A writer to a pipe that is written to no more when its reader has gone (`... | head -1`)."""
    gone = False

    def attempt(call: Callable[[], None]) -> None:
        nonlocal gone
        if not gone:
            try:
                call()
            except BrokenPipeError:
                gone = True

    return Writer(
        lambda records: attempt(lambda: writer.write(records)),
        lambda: attempt(writer.sync),
        lambda: attempt(writer.close),
    )


def forgiving(name: str, make: Callable[[], Writer]) -> Writer:
    """A writer whose failures (a network that is down) don't stop the run.

    The first failure warns. A call that fails is skipped; after `FAILURES` calls in a row that
    failed, or where the writer could not be opened at all, nothing more is tried.

    Args:
        name: the writer's name, for the warning.
        make: opens the writer.

    Returns:
        The writer.

    Raises:
        UserError: `make` says that the user has something to put right.
    """
    warned = False
    failures = 0

    def warn(doing: str, error: Exception) -> None:
        nonlocal warned
        if not warned:
            warned = True
            warnings.warn(
                f"The {name} writer failed to {doing} ({type(error).__name__}: {error}). The run "
                f"goes on, and {folder.METRICS} has every record.",
                RuntimeWarning,
                stacklevel=3,
            )

    try:
        writer = make()
    except UserError:
        raise
    except Exception as error:
        warn("open", error)
        return NULL

    def attempt(doing: str, call: Callable[[], None]) -> None:
        nonlocal failures
        if failures >= FAILURES:
            return
        try:
            call()
            failures = 0
        except Exception as error:
            failures += 1
            warn(doing, error)

    return Writer(
        lambda records: attempt("write", lambda: writer.write(records)),
        lambda: attempt("sync", writer.sync),
        lambda: attempt("close", writer.close),
    )
