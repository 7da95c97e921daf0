"""Where models to merge come from: safetensors files, Hugging Face folders, arrays in memory."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from lamina.platform.checkpoints import safetensors
from lamina.platform.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STATISTICS = "lamina_statistics"
"""In the header of a file of statistics: which they are."""

FLOATS = frozenset(
    np.dtype(d)
    for d in (
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
    )
)
"""What is merged; tensors of other dtypes are taken from the first source."""

_LISTED = 10


class Tensor(Protocol):
    """A tensor that can be read piece by piece."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        ...

    def flat(self, first: int, last: int) -> np.ndarray:
        """Reads the elements `first` to `last` of the flattened tensor."""
        ...


class InMemory:
    """An array as a `Tensor`."""

    def __init__(self, array: np.ndarray):
        self._flat = np.ascontiguousarray(array).reshape(-1)
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size

    def flat(self, first: int, last: int) -> np.ndarray:
        """Returns the elements `first` to `last` of the flattened array."""
        return self._flat[first:last]


class Source(NamedTuple):
    """One model.

    Attributes:
        path: as the user gave it.
        tensors: by name.
        shards: file name to the names of its tensors; empty for arrays in memory.
        metadata: of each file, by its name.
        folder: the folder whose other files belong to the model, or None.
        axes: logical axes by name, where they are known.
    """

    path: str
    tensors: Mapping[str, Tensor]
    shards: Mapping[str, Sequence[str]]
    metadata: Mapping[str, Mapping[str, str]]
    folder: pathlib.Path | None = None
    axes: Mapping[str, tuple[str | None, ...]] = {}


def is_weights(path: str) -> bool:
    """Tells whether a path is a safetensors file or a folder with such files."""
    if path.endswith(".safetensors"):
        return True
    folder = pathlib.Path(path).expanduser()
    return folder.is_dir() and any(folder.glob("*.safetensors*"))


def open_source(path: str) -> Source:
    """Opens a safetensors file, or a folder as Hugging Face's libraries write it.

    Raises:
        UserError: there is no such file, a header or the index lies, or the folder has none.
    """
    local = local_path(path)
    if not local.is_dir():
        if not local.is_file():
            raise UserError(f"there is no model at {path}")
        file = safetensors.File(local)
        return Source(
            path, file.tensors, {local.name: list(file.tensors)}, {local.name: file.metadata}
        )
    shards = _index(local) if (local / INDEX).exists() else _only_file(local)
    tensors: dict[str, Tensor] = {}
    metadata, order = {}, {}
    for name, listed in shards.items():
        file = safetensors.File(local / name)
        order[name] = list(file.tensors)
        metadata[name] = file.metadata
        if listed is not None:
            _same_names(f"{local / name} and {INDEX}", listed, file.tensors)
        tensors |= file.tensors
    return Source(path, tensors, order, metadata, local)


def local_path(path: str) -> pathlib.Path:
    """Returns a path of this machine.

    Raises:
        UserError: it is elsewhere, or no path can be so.
    """
    if "://" in path:
        raise UserError(f"{path} isn't on this machine: files are merged where they are, copy them")
    try:
        local = pathlib.Path(path).expanduser()
        local.exists()
    except (OSError, RuntimeError) as error:  # a name too long; ~nobody
        raise UserError(f"{path} can't be looked at: {error}") from error
    return local


def _only_file(folder: pathlib.Path) -> dict[str, None]:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if SINGLE in files or len(files) == 1:
        return {SINGLE if SINGLE in files else files[0]: None}
    if files:
        raise UserError(f"{folder} has several safetensors files and no {INDEX}")
    pickles = sorted(
        file.name for file in folder.iterdir() if file.name.endswith(safetensors.PICKLES)
    )
    hint = f": pickles can run code and are never read, convert {pickles[0]}" if pickles else ""
    raise UserError(f"{folder} has no safetensors file{hint}")


def _index(folder: pathlib.Path) -> dict[str, list[str]]:
    """File name to tensor names; a name may not lead out of the folder."""
    path = folder / INDEX
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=safetensors.unique)
        table: Any = found["weight_map"]
        pairs = list(table.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it has no table weight_map ({error})") from error
    shards: dict[str, list[str]] = {}
    for tensor, file in pairs:
        if not _plain(file) or not file.endswith(".safetensors"):
            raise UserError(
                f"{path}: {tensor!r} should be in a safetensors file of this folder, not {file!r}"
            )
        shards.setdefault(file, []).append(tensor)
    if not shards:
        raise UserError(f"{path} names no tensors")
    return shards


def _plain(file: Any) -> bool:
    """Tells whether what an index names is a file's name, without a way to other folders."""
    if not isinstance(file, str) or os.path.basename(file) != file or {"\\", "\0"} & set(file):
        return False
    try:
        return bool(file.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may hold
        return False


def _same_names(where: str, one: Sequence[str], other: Mapping[str, Any]) -> None:
    different = sorted(set(one) ^ set(other))
    if different:
        raise UserError(
            f"{where} differ in the tensors {', '.join(map(repr, different[:_LISTED]))}"
        )


def check_fit(sources: Sequence[Source]) -> None:
    """Checks that all models have the same tensors.

    Raises:
        UserError: tensors are missing, superfluous, of another shape or kind: lists them.
    """
    first = sources[0]
    problems = [
        f"{name!r} is {tensor.dtype} in {first.path}: only real numbers are merged"
        for name, tensor in first.tensors.items()
        if np.issubdtype(tensor.dtype, np.complexfloating)
    ]
    for source in sources[1:]:
        for name, tensor in first.tensors.items():
            if name not in source.tensors:
                problems.append(f"{name!r} is missing in {source.path}")
            elif tuple(source.tensors[name].shape) != tuple(tensor.shape):
                problems.append(
                    f"{name!r} has shape {list(source.tensors[name].shape)} in {source.path} and "
                    f"{list(tensor.shape)} in {first.path}"
                )
            elif (source.tensors[name].dtype in FLOATS) != (tensor.dtype in FLOATS):
                problems.append(
                    f"{name!r} is {source.tensors[name].dtype} in {source.path} and "
                    f"{tensor.dtype} in {first.path}"
                )
        problems += [
            f"{name!r} is in {source.path} and not in {first.path}"
            for name in source.tensors
            if name not in first.tensors
        ]
    if problems:
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        lines = "\n".join(f"  {problem}" for problem in problems[:_LISTED])
        raise UserError(f"the models don't fit each other:\n{lines}{more}")
