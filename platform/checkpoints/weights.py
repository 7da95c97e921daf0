"""Weights from elsewhere: a safetensors file, or a folder of them as Hugging Face writes it.

A folder holds `model.safetensors`, or several files and `model.safetensors.index.json`, which says
in which file each tensor is; and often `config.json`. All of it is somebody's data.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from lamina.platform.checkpoints import safetensors
from lamina.platform.checkpoints.names import nearest
from lamina.platform.checkpoints.safetensors import PICKLES, Tensor
from lamina.platform.errors import UserError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CONFIG = "config.json"
_STATE = "model_state/"


class Weights(NamedTuple):
    """Tensors by name, and what stands beside them.

    Attributes:
        tensors: read when used.
        metadata: of the file; of a folder with several files, nothing.
        config: the folder's config.json, or empty.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]


def is_weights(path: epath.PathLike) -> bool:
    """Whether a path is a safetensors file or a folder of them (or of pickles, to be refused)."""
    source = epath.Path(path).expanduser()
    if source.name.endswith(".safetensors"):
        return True
    if not source.is_dir():
        return False
    suffixes = ("safetensors", ".safetensors.index.json", *PICKLES)
    return any(child.name.endswith(suffixes) for child in source.iterdir())


def open_weights(path: epath.PathLike) -> Weights:
    """Opens a file or a folder, having checked all headers.

    Raises:
        UserError: nothing is there, a file is damaged (it is named), the index leads outside the
            folder or names what isn't there, or there are pickles only.
    """
    source = epath.Path(path).expanduser()
    if not source.is_dir():
        file = safetensors.File(source)
        return Weights(file.tensors, file.metadata, {})
    config = _json(source / _CONFIG) if (source / _CONFIG).exists() else {}
    if (source / _INDEX).exists():
        return Weights(_sharded(source), {}, config)
    name = _only_file(source)
    file = safetensors.File(source / name)
    return Weights(file.tensors, file.metadata, config)


def divided(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns parameters, and other state (batch statistics) without `model_state/` before it."""
    state = {
        name.removeprefix(_STATE): tensor
        for name, tensor in tensors.items()
        if name.startswith(_STATE)
    }
    return {n: t for n, t in tensors.items() if not n.startswith(_STATE)}, state


def _only_file(folder: epath.Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    files = [name for name in names if name.endswith(".safetensors")]
    if _SINGLE in files:
        return _SINGLE
    if len(files) == 1:
        return files[0]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not files and pickles:
        raise UserError(
            f"{folder} holds pickles only ({', '.join(pickles[:3])}); pickles can run code and are "
            "never read: convert them to safetensors where they came from"
        )
    if not files:
        raise UserError(f"{folder} holds no safetensors file")
    raise UserError(f"{folder} holds {len(files)} safetensors files and no {_INDEX}: name one")


def _sharded(folder: epath.Path) -> dict[str, Tensor]:
    index = folder / _INDEX
    table = _json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index} is damaged: it has no weight_map")
    files: dict[str, safetensors.File] = {}
    for tensor, name in table.items():
        if not isinstance(name, str) or not _plain(name):
            raise UserError(
                f"{index} leads outside its folder: {tensor!r} would be in {name!r}; a plain name "
                "of a .safetensors file should stand there"
            )
        if name not in files:
            if not (folder / name).exists():
                raise UserError(f"{index} names {name}, which is not in the folder")
            files[name] = safetensors.File(folder / name)
        if tensor not in files[name].tensors:
            hint = nearest(tensor, files[name].tensors)
            raise UserError(f"{index} says that {tensor!r} is in {name}; it is not{hint}")
    for name, file in files.items():
        for tensor in file.tensors:
            if table.get(tensor) != name:
                raise UserError(f"{folder / name} holds {tensor!r}, of which {index} knows nothing")
    return {tensor: files[name].tensors[tensor] for tensor, name in table.items()}


def _plain(name: str) -> bool:
    return name.endswith(".safetensors") and not any(part in name for part in ("/", "\\", "\0"))


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=safetensors.unique)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    return content
