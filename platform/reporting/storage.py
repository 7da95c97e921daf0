"""Whole-file reads and writes that survive a kill, on local disks and on object stores alike.

A local file is written beside its target, synced and renamed over it, so a reader sees the old file
or the new one and never a part. An object store (`gs://`, through `etils.epath`) has neither append
nor rename, but replaces an object as a whole, so there a plain write does.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from lamina.platform.errors import UserError

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
    """Tells whether a path names an object store (`gs://...`) and not this machine's disk."""
    return "://" in os.fspath(path)


def as_path(path: PathLike) -> Any:
    """A path object for a local or a remote path.

    Args:
        path: a string or a path object.

    Returns:
        A `pathlib.Path`, or an `etils.epath.Path` where the path is remote; both have the same
        methods.
    """
    if is_remote(path):
        from etils import epath  # half a second of imports that a local run does not need

        return epath.Path(os.fspath(path))
    return pathlib.Path(path).expanduser()


def read_bytes(path: PathLike) -> bytes | None:
    """The content of a file, or None where there is no such file."""
    target = as_path(path)
    if is_remote(path) and not target.exists():
        return None  # what a missing object raises depends on the store's client
    try:
        return target.read_bytes()
    except FileNotFoundError:
        return None


def write_bytes(path: PathLike, data: bytes) -> None:
    """Replaces a file as a whole; a kill at any moment leaves the old file or the new one.

    Args:
        path: the file; its folder is made where it is missing.
        data: the new content.
    """
    target = as_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        target.write_bytes(data)
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write_text(path: PathLike, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: PathLike, data: Any) -> None:
    """Writes data as indented JSON; what is not finite becomes null, a numpy scalar a number."""
    write_text(path, json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def read_json(path: PathLike, default: Any = None) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        default: what to return where there is no such file.

    Returns:
        The parsed content.

    Raises:
        UserError: the file is not JSON; the message names it and the place.
    """
    data = read_bytes(path)
    if data is None:
        return default
    try:
        return json.loads(data.decode("utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise UserError(
            f"{os.fspath(path)} is not valid JSON ({error}). Lamina writes this file as a whole, "
            "so something else changed it: restore it from a copy, or remove it."
        ) from error


def read_object(path: PathLike) -> dict[str, Any]:
    """Reads a JSON file that holds an object; an empty dict where there is no such file.

    Raises:
        UserError: the file is not JSON, or holds something other than an object.
    """
    data = read_json(path, {})
    if not isinstance(data, dict):
        raise UserError(
            f"{os.fspath(path)} should hold a JSON object ({{...}}), but holds a "
            f"{type(data).__name__}."
        )
    return data


def plain(data: Any) -> Any:
    """Data as JSON can hold it: strings as keys, lists, Python numbers, None for what isn't finite.

    Example:
        >>> plain({"loss": float("nan"), 1: (2, 3)})
        {'loss': None, '1': [2, 3]}
    """
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [plain(value) for value in data]
    if data is None or isinstance(data, bool | int | str):
        return data
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if hasattr(data, "tolist"):  # numpy and jax scalars and arrays
        return plain(data.tolist())
    return str(data)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; an empty mapping stays as a value.

    Example:
        >>> flatten({"model": {"name": "mlp", "width": 8}, "steps": 3})
        {'model.name': 'mlp', 'model.width': 8, 'steps': 3}
    """
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            result.update(flatten(value, f"{name}."))
        else:
            result[name] = value
    return result


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename in this folder durable, where the system can open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse to sync a folder; the rename itself has happened
    finally:
        os.close(handle)
