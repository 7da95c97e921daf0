"""What an incremental run records: training metrics, accuracies on each task, the final scores."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lamina.platform.incremental import metrics
from lamina.platform.incremental.sequence import Segments
from lamina.platform.incremental.stream import Stream
from lamina.platform.reporting import storage
from lamina.platform.training import evaluation
from lamina.platform.training.recorder import Recorder
from lamina.platform.training.state import TrainState

ACCURACY, INITIAL = "accuracy.npy", "initial_accuracy.npy"
"""Files of the run folder: float64 [seed, time, task], and [seed, task] before training."""


def task_name(number: int) -> str:
    """Returns the split under which a task's accuracy is recorded."""
    return f"task_{number + 1}"


def record_training(recorder: Recorder, sums: np.ndarray, start: int, stop: int) -> None:
    """Writes the records of a dispatch.

    Args:
        recorder: of the run.
        sums: float32 [seeds, records, leaves of the metrics], of the whole run.
        start: steps before the dispatch.
        stop: steps after it.
    """
    parts = recorder.parts
    every, treedef = parts.config.log_every, jax.tree.structure(parts.state.metrics)
    for row in range(start // every, sums.shape[1]):
        step = min((row + 1) * every, parts.steps)
        if not start < step <= stop:
            continue
        columns = [sums[:, row, leaf] for leaf in range(sums.shape[2])]
        if parts.seeds.number == 1:
            columns = [column[0] for column in columns]
        totals = jax.tree.unflatten(treedef, columns)
        recorder.write(step, "train", evaluation.means(parts, totals))


def record_evaluations(
    recorder: Recorder, cut: Segments, span: np.ndarray, states: Any, streams: Sequence[Stream]
) -> None:
    """Writes the accuracies that were measured in a dispatch.

    Args:
        recorder: of the run.
        cut: the stream's segments.
        span: of the dispatch.
        states: of all seeds, stacked or as a list.
        streams: of the seeds, or one for all.
    """
    start, stop, first, last = (int(value) for value in span)
    right = right_of(states)
    counts = task_sizes(streams)
    points = [(0, 0)] if start == 0 else []
    points += [(int(cut.last[p]), p + 1) for p in range(first, last) if cut.last[p] <= stop]
    for step, place in dict(points).items():
        share = right[:, place] / counts
        for task in range(counts.shape[1]):
            values = [{"accuracy": float(value)} for value in share[:, task]]
            recorder.write(step, task_name(task), values)


def right_of(states: Any) -> np.ndarray:
    """Returns the right answers of all seeds, int [seed, 1 + time, task]."""
    if isinstance(states, TrainState):
        right = np.asarray(jax.device_get(states.learner["right"]))
        return right if right.ndim == 3 else right[None]
    return np.stack([np.asarray(jax.device_get(s.learner["right"])) for s in states])


def task_sizes(streams: Sequence[Stream]) -> np.ndarray:
    """Returns the number of answers to the test examples of each task, int [seed (or 1), task]."""
    count = lambda s: np.bincount(s.test_task, minlength=len(s.test_classes)) * s.answers
    return np.stack([count(s) for s in streams])


def accuracies(state: TrainState, streams: Sequence[Stream]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the accuracies [seed, time, task], and those before training [seed, task]."""
    share = right_of(state) / task_sizes(streams)[:, None]
    return share[:, 1:], share[:, 0]


def write_accuracies(workdir: storage.PathLike, accuracy: np.ndarray, initial: np.ndarray) -> None:
    """Writes both tensors into the run folder."""
    for name, array in ((ACCURACY, accuracy), (INITIAL, initial)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        storage.write_bytes(storage.as_path(workdir) / name, buffer.getvalue())


def scores(
    accuracy: np.ndarray, initial: np.ndarray, ends: Sequence[int]
) -> Mapping[str, np.ndarray]:
    """Returns every metric of `metrics.METRICS` for each seed."""
    options = {"forward_transfer": {"initial": initial}}
    return {
        name: function(accuracy, ends, **options.get(name, {}))
        for name, function in metrics.METRICS.items()
    }


def matrix(accuracy: np.ndarray, cut: Segments) -> dict[str, Any]:
    """Returns the accuracies for the report: means and spreads over seeds, and the steps."""
    spread = accuracy.std(0, ddof=1) if len(accuracy) > 1 else np.zeros(accuracy.shape[1:])
    return {
        "steps": [int(step) for step in cut.last],
        "ends": [int(p) for p in np.flatnonzero(cut.closes)],
        "mean": accuracy.mean(0).tolist(),
        "std": spread.tolist(),
    }
