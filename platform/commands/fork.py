"""`lamina fork`: goes on from a run's checkpoint with another config, in a folder of its own."""

import os
import shutil
from collections.abc import Sequence

from lamina.platform.commands import arguments as parsing
from lamina.platform.commands.arguments import Flag
from lamina.platform.errors import UserError, writing

FLAGS = {
    "from": Flag("", "the run folder to fork"),
    "at": Flag(-1, "the step of one of its checkpoints; default: the newest"),
    "workdir": Flag("", "the folder of the new run"),
    "trust": Flag((), "packages whose factories the run's config may name"),
}

USAGE = f"""lamina fork --from=DIR [--at=STEP] --workdir=NEW [--config.key=value ...]

Goes on from a checkpoint of the run in DIR as another run in NEW: its past, records included, is
that of DIR up to STEP, its future that of the config with the changes given here. The manifest
names the parent. The same command, or `lamina run` with NEW's config.json, resumes.

{parsing.describe_flags(FLAGS)}"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("fork", arguments, FLAGS)
    parsing.no_positional("fork", given)
    source, workdir = given.flags["from"], given.flags["workdir"]
    for flag, value in (("from", source), ("workdir", workdir)):
        if not value:
            raise UserError(f"--{flag} is missing: {FLAGS[flag].help}")
    if os.path.realpath(source) == os.path.realpath(workdir):
        raise UserError("--workdir should be another folder than --from")

    from lamina.platform.commands import run as running
    from lamina.platform.reporting import folder

    folder.check_run(source)
    path = os.path.join(source, folder.CONFIG)
    if not os.path.exists(os.path.join(workdir, folder.CONFIG)) or was_refused(workdir):
        copy_past(source, given.flags["at"], workdir)
    trust = [f"--trust={','.join(given.flags['trust'])}"] if given.flags["trust"] else []
    changes = [f"--config.{key}={text}" for key, text in given.overrides]
    return running.main([f"--config={path}", f"--workdir={workdir}", *trust, *changes])


def was_refused(workdir: str) -> bool:
    """Tells whether the folder has a fork that failed before it learned anything.

    So does one whose config doesn't fit the checkpoint: the mended command begins anew.
    """
    from lamina.platform.checkpoints import restoring
    from lamina.platform.reporting import folder, storage

    parents = storage.read_object(storage.as_path(workdir) / folder.LINEAGE).get("parents", [])
    begun = {_step_of(os.path.basename(parent)) for parent in parents}
    known = set(restoring.list_steps(os.path.join(workdir, folder.CHECKPOINTS)))
    return bool(begun) and known <= begun and folder.read_status(workdir)["state"] == "failed"


def copy_past(source: str, step: int, workdir: str) -> None:
    """Makes a folder that has a run's past up to one of its checkpoints.

    Of a fork that was begun there before, nothing stays that a run would go on from.

    Raises:
        UserError: there is no such checkpoint, or the folder isn't empty.
    """
    from lamina.platform.checkpoints import restoring
    from lamina.platform.reporting import folder, records, storage

    checkpoints = os.path.join(source, folder.CHECKPOINTS)
    steps = sorted(restoring.list_steps(checkpoints))
    if not steps:
        raise UserError(f"{source} has no checkpoint to fork")
    chosen = steps[-1] if step < 0 else step
    if chosen not in steps:
        raise UserError(
            f"--at={step}: {source} has checkpoints of the steps {', '.join(map(str, steps))}"
        )
    root = storage.as_path(workdir)
    if root.exists() and any(p.name != folder.LINEAGE for p in root.iterdir()):
        begun = storage.read_object(root / folder.LINEAGE)
        if not begun:
            raise UserError(f"--workdir={workdir} is not empty, and no fork that was begun")
    with writing(workdir):
        root.mkdir(parents=True, exist_ok=True)
        parent = os.path.join(checkpoints, str(chosen))
        storage.write_json(root / folder.LINEAGE, {"parents": [parent]})
        past = records.read(storage.as_path(source) / folder.METRICS)
        kept = records.lines(record for record in past if record.step <= chosen)
        storage.write_bytes(root / folder.METRICS, kept)
        target = root / folder.CHECKPOINTS
        target.mkdir(exist_ok=True)
        (root / folder.CONFIG).unlink(missing_ok=True)
        for other in list(target.iterdir()):
            if _step_of(other.name) not in (-1, chosen):
                shutil.rmtree(other)
        newest = max(
            (p for p in storage.as_path(checkpoints).iterdir() if _step_of(p.name) == chosen),
            key=lambda p: len(p.name),
        )
        stage = target / f".copying-{chosen}"
        shutil.rmtree(stage, ignore_errors=True)
        shutil.copytree(newest, stage)
        if not (target / str(chosen)).exists():
            stage.rename(target / str(chosen))
        else:
            shutil.rmtree(stage)


def _step_of(name: str) -> int:
    """Returns the step of a checkpoint's folder (`300`, or `300-1` where it was replaced)."""
    first = name.partition("-")[0]
    return int(first) if first.isdigit() else -1
