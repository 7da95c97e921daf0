"""The cells of a merge of tasks: one small file for each thing that was computed, done once."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lamina.platform.errors import UserError
from lamina.platform.reporting import storage

FOLDER = "cells"

Scores = dict[str, dict[str, float]]
"""Task to metric to value."""


class Cell(NamedTuple):
    """What is known of a model on all tasks.

    Attributes:
        scores: split to task to metric to value.
        seconds: for merging, compilation included; 0 where nothing was merged.
        bytes: of what the merge held at once: models, base, result and statistics.
        coefficients: of a learned merge, name to nested lists.
        losses: of a learned merge, at most 100 of them.
    """

    scores: Mapping[str, Scores]
    seconds: float = 0.0
    bytes: int = 0
    coefficients: Mapping[str, Any] = {}
    losses: tuple[float, ...] = ()


def path_of(workdir: str, name: str, what: str, seed: int) -> Any:
    """The file of a cell."""
    return storage.as_path(workdir) / FOLDER / name / f"{what}_seed{seed}.json"


def read(path: Any, point: Mapping[str, Any]) -> Cell | None:
    """Returns a cell, or None where it hasn't been computed, or for other keys.

    Args:
        path: its file.
        point: the method and its keys.

    Raises:
        UserError: the file is no cell.
    """
    found = storage.read_bytes(path)
    if found is None:
        return None
    try:
        whole = json.loads(found)
        return Cell(**whole["cell"]) if whole["point"] == storage.plain(dict(point)) else None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no cell of a merge: {error}: remove it") from error


def write(path: Any, point: Mapping[str, Any], cell: Cell) -> None:
    """Writes a cell, whole or not at all."""
    storage.write_json(path, storage.plain({"point": dict(point), "cell": cell._asdict()}))


def thinned(losses: np.ndarray, most: int = 100) -> tuple[float, ...]:
    """Returns the means of up to `most` stretches of a sequence of losses."""
    parts = np.array_split(np.asarray(losses, np.float64), min(most, len(losses)))
    return tuple(float(part.mean()) for part in parts)


def mean(scores: Scores, metric: str) -> float:
    """Returns the metric's mean over tasks."""
    return float(np.mean([one[metric] for one in scores.values()]))


def normalised(scores: Scores, individual: Scores, metric: str) -> dict[str, float]:
    """Returns each task's metric over that of its own model; NaN over 0."""
    return {
        task: one[metric] / individual[task][metric] if individual[task][metric] else float("nan")
        for task, one in scores.items()
    }
