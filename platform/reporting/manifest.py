"""The manifest of a run: the code, the packages, the machine and the command that made it."""

import datetime
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.platform.reporting import folder, storage
from lamina.platform.reporting.storage import PathLike

PACKAGES = (
    "lamina",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "ml-collections",
    "safetensors",
    "tensorflow-datasets",
    "libtpu",
)
DIFF_LIMIT = 200_000
"""Characters of a git diff that are kept (our choice: a manifest should stay easy to open)."""


def collect(
    mesh: Mapping[str, int] | None = None,
    parents: Sequence[str] = (),
    command: Sequence[str] | None = None,
    source: PathLike = ".",
) -> dict[str, Any]:
    """Finds out what a run is made with.

    Args:
        mesh: axis name to size.
        parents: runs or checkpoints that this run starts from.
        command: the command line; by default this process's.
        source: a folder of the git work tree whose revision and changes count.

    Returns:
        Plain data for `manifest.json`.
    """
    import jax

    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv if command is None else command),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "git": git(source),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "mesh": dict(mesh or {}),
        "parents": list(parents),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git(source: PathLike = ".") -> dict[str, Any] | None:
    """The revision of a git work tree and what differs from it; None outside of one.

    Returns:
        {"revision", "diff" (of tracked files, at most `DIFF_LIMIT` characters), "untracked"
        (names)}
    """
    revision = _run_git(source, "rev-parse", "HEAD")
    if revision is None:
        return None
    diff = _run_git(source, "diff", "--no-ext-diff", "--no-color", "HEAD") or ""
    if len(diff) > DIFF_LIMIT:
        diff = diff[:DIFF_LIMIT] + f"\n... ({len(diff) - DIFF_LIMIT} more characters)\n"
    untracked = _run_git(source, "ls-files", "--others", "--exclude-standard") or ""
    return {
        "revision": revision.strip(),
        "diff": diff,
        "untracked": untracked.splitlines()[:100],
    }


def write(workdir: PathLike, manifest: Mapping[str, Any]) -> None:
    """Writes `manifest.json`.

    Where the run had one (it resumes), its differences from the new one are kept under "earlier",
    so that a change of code or of packages between two sessions can be seen.
    """
    path = storage.as_path(workdir) / folder.MANIFEST
    new = storage.plain(manifest)
    old = storage.read_object(path)
    earlier = old.pop("earlier", [])
    changed = {key: value for key, value in old.items() if new.get(key) != value}
    if changed:
        earlier.append(changed)
    storage.write_json(path, {**new, "earlier": earlier})


def read(workdir: PathLike) -> dict[str, Any]:
    """The run's manifest; empty where there is none.

    Raises:
        UserError: `manifest.json` is corrupt.
    """
    return storage.read_object(storage.as_path(workdir) / folder.MANIFEST)


def _run_git(source: PathLike, *arguments: str) -> str | None:
    command = ["git", "--no-pager", "-C", os.fspath(source), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace")
