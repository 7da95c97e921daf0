"""Files of what data-based mergers need of a model: diagonal Fishers and Gram matrices."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lamina.platform.checkpoints import exchange, names
from lamina.platform.errors import UserError
from lamina.platform.merging.sources import STATISTICS


def save(
    path: str | os.PathLike, tree: Any, kind: str, facts: Mapping[str, str] | None = None
) -> None:
    """Writes a tree of statistics to a safetensors file, whole or not at all.

    Args:
        path: the file.
        tree: as a collector gives it.
        kind: "fishers" or "grams", kept in the header.
        facts: more text for the header, such as how many examples were seen.

    Raises:
        UserError: the file can't be written.
    """
    exchange.export_params(path, tree, {STATISTICS: kind, **(facts or {})})


def load(path: str | os.PathLike, kind: str, like: Any = None) -> Any:
    """Reads what `save` wrote.

    Args:
        path: the file.
        kind: what it should hold.
        like: of "fishers", the parameters, whose structure the result has.

    Returns:
        A tree like the parameters, or path to matrix.

    Raises:
        UserError: it is no such file, is damaged, or doesn't fit the parameters.
    """
    found = exchange.import_tensors(path, finite=True)
    if found.metadata.get(STATISTICS) != kind:
        raise UserError(
            f"{os.fspath(path)} holds no {kind}: {found.metadata.get(STATISTICS) or 'a model'}"
        )
    arrays = {name: np.asarray(tensor) for name, tensor in found.arrays.items()}
    if like is None:
        return arrays
    exchange.import_params(path, like)
    return names.unflatten(arrays, like)
