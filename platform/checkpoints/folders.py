"""The folders of checkpoints on the disk: their names, what lies there, completion, removal."""

import os
import re
from typing import Any

from etils import epath

from lamina.platform.checkpoints import manifest
from lamina.platform.checkpoints.manifest import BadManifest
from lamina.platform.checkpoints.retention import Entry

STAGE = ".saving-"  # what a save under way, or a killed one, is named by
_NAME = re.compile(r"(\d+)(?:-(\d+))?")


def normal(directory: epath.PathLike) -> epath.Path:
    """The folder as an absolute path (Orbax takes no other), or as given if it is remote."""
    path = epath.Path(directory).expanduser()
    return epath.Path(os.path.abspath(path)) if manifest.is_local(path) else path


def listing(directory: epath.Path) -> list[tuple[int, int, str]]:
    """(step, attempt, name) of all that is named like a checkpoint."""
    if not directory.exists():
        return []
    matches = (_NAME.fullmatch(path.name) for path in directory.iterdir())
    return [(int(m[1]), int(m[2] or 0), m[0]) for m in matches if m]


def complete(directory: epath.Path) -> list[Entry]:
    """The checkpoints whose manifest is there and whole."""
    found_entries = []
    for _, _, name in sorted(listing(directory)):
        try:
            found = manifest.read(directory / name)
        except BadManifest:
            continue
        found_entries.append(entry(name, found.step, found.extra))
    return found_entries


def entry(name: str, step: int, extra: dict[str, Any]) -> Entry:
    """The entry of a complete checkpoint, from its folder's name and its manifest's content."""
    _, _, attempt = name.partition("-")
    return Entry(name, step, int(attempt or 0), extra.get("metrics") or {})


def remove_leftovers(directory: epath.Path) -> None:
    """Removes what killed saves left; a damaged checkpoint is not a leftover."""
    for path in list(directory.glob(f"{STAGE}*")):
        remove(path)
    if not manifest.is_local(directory):
        for _, _, name in listing(directory):
            if not (directory / name / manifest.MANIFEST).exists():
                remove(directory / name)


def remove_stage(stage: epath.Path) -> None:
    """Removes a failed save: its folder, and Orbax's temporary ones, named after it."""
    for path in list(stage.parent.glob(f"{stage.name}*")):
        if path.name == stage.name or path.name.startswith(f"{stage.name}."):
            remove(path)


def remove(path: epath.Path) -> None:
    """Removes a folder, the manifest first: what is half removed must not look complete."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / manifest.MANIFEST).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)


def commit(stage: epath.Path, final: epath.Path) -> None:
    """Gives a finished save its name, in one step and down to the disk."""
    if stage == final:
        return
    os.rename(stage, final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
