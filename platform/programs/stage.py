"""A run that is a stage of another program's: in a sub-folder, done once."""

from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.checkpoints import restoring
from lamina.platform.errors import DivergedError, InterruptedRun
from lamina.platform.programs import train
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import folder, manifest, report, storage


def is_done(workdir: str) -> bool:
    """Tells whether a stage has its result."""
    return folder.read_status(workdir)["state"] == "done" and bool(folder.read_result(workdir))


def run(
    config: FrozenConfigDict,
    context: Context,
    devices: Sequence[Any] | None,
    prepare: Callable[..., Any] = train.prepare,
    go: Callable[..., Outcome] = train.train,
) -> None:
    """Does what the config says in `context.workdir`, or goes on there, unless that is done.

    Args:
        config: resolved.
        context: of the stage.
        devices: the devices to use.
        prepare: of the program that the config is for. Default: training.
        go: that runs what `prepare` gave.

    Raises:
        UserError: the config doesn't fit the data, the devices, or what `init_from` names.
        DivergedError: the loss of every seed became infinite or not a number.
        InterruptedRun: a signal asked the run to stop.
    """
    workdir = context.workdir
    if is_done(workdir):
        return
    fresh = not restoring.list_steps(storage.as_path(workdir) / folder.CHECKPOINTS)
    prepared = prepare(config, context.trust, devices, fresh)
    folder.write_config(workdir, configs.to_json(config))
    parents = [config.init_from] if config.init_from else []
    manifest.write(workdir, manifest.collect(mesh=dict(prepared.parts.mesh.shape), parents=parents))
    folder.write_status(workdir, "running")
    try:
        outcome = go(prepared, context)
    except (InterruptedRun, DivergedError) as error:
        state = "diverged" if isinstance(error, DivergedError) else "interrupted"
        folder.write_status(workdir, state, str(error))
        raise
    folder.write_result(workdir, outcome.result)
    folder.write_status(workdir, "done")
    report.render(workdir)
