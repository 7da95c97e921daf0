"""Streams as data: which training example comes at which step, in which experience.

A stream is a set of numpy arrays, built before the run and never a loop. Steps of all experiences
stand one after another; the last batch of an experience is padded with rows that count nothing.

Letters: E experiences, S steps of the whole stream, B batch, C classes, J test tasks.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lamina.platform.data import order
from lamina.platform.errors import UserError
from lamina.platform.incremental.transforms import Transform


class Labels(NamedTuple):
    """What a stream is made from.

    Attributes:
        train: int [N], class of each training example; [N, T] where it is a text.
        test: int [n], of each test example, likewise.
        classes: their number.
        input_shape: of one example.
        domains: int [N] and [n], the domain of each example, where the data set tells it.
    """

    train: np.ndarray
    test: np.ndarray
    classes: int
    input_shape: tuple[int, ...]
    domains: tuple[np.ndarray, np.ndarray] | None = None


class Stream(NamedTuple):
    """A stream, for one seed.

    Attributes:
        rows: int32 [S, B]: training examples; where inputs are transformed, example + N * number
            of the transform, of N training examples.
        valid: bool [S, B]: False for padding.
        fresh: bool [S, B]: whether the example comes for the first time in its experience.
        steps: int64 [E]: steps of each experience.
        epoch_steps: int64 [E]: steps of its first pass.
        seed: of the order.
        epochs: passes over an experience.
        repeats: updates on each batch.
        classes: bool [E, C]: the classes of each experience.
        test_index: int32 [n]: test examples, likewise.
        test_task: int32 [n]: the task that each belongs to.
        test_classes: bool [J, C]: the classes of each task.
        boundaries: whether a learner may know where an experience begins.
        mask: which logits count in evaluation: "all", "seen" (so far) or "task" (its own).
        transform: of the inputs of each experience, or None.
        answers: that the model gives for one example: 1, or T tokens.
    """

    rows: np.ndarray
    valid: np.ndarray
    fresh: np.ndarray
    steps: np.ndarray
    epoch_steps: np.ndarray
    seed: int
    epochs: int
    repeats: int
    classes: np.ndarray
    test_index: np.ndarray
    test_task: np.ndarray
    test_classes: np.ndarray
    boundaries: bool
    mask: Literal["all", "seen", "task"]
    transform: Transform | None = None
    answers: int = 1

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.rows.shape[1]

    @property
    def arrives(self) -> np.ndarray:
        """Whether the example comes for the first time in its pass, bool [S, B]."""
        number = np.concatenate([np.arange(count) for count in self.steps])
        return self.valid & (number % self.repeats == 0)[:, None]


class Shared(NamedTuple):
    """Keys of the `stream` block that every stream has.

    Attributes:
        experiences: parts into which the data come.
        epochs: passes over the data of an experience.
        repeats: updates on each batch (online learning may take several).
        train_on: splits of the data set that the stream brings.
        evaluate_on: split that the test tasks are made from.
    """

    experiences: int = 5
    epochs: int = 1
    repeats: int = 1
    train_on: Literal["train", "train+validation"] = "train"
    evaluate_on: Literal["test", "validation"] = "test"


def schedule(
    parts: Sequence[np.ndarray], batch_size: int, epochs: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Returns the parts of a stream that say when an example comes.

    Every pass over an experience is one permutation of its examples, cut into batches.

    Args:
        parts: for each experience the training examples it brings.
        batch_size: rows of a batch.
        epochs: passes over each experience.
        repeats: times that each batch comes in a row.
        seed: of the permutations.

    Returns:
        "rows" to "repeats" of `Stream`.

    Raises:
        UserError: there are no examples.
    """
    blocks_of: dict[str, list[np.ndarray]] = {"rows": [], "valid": [], "fresh": []}
    steps, first_pass = [], []
    if not sum(len(part) for part in parts):
        raise UserError("the stream has no example")
    for number, part in enumerate(parts):
        count = math.ceil(len(part) / batch_size)
        padding = count * batch_size - len(part)
        for epoch in range(epochs):
            key = order.seed_for(seed, number)
            chosen = part[order.permutation(len(part), key, epoch)] if len(part) else part
            index = np.concatenate([chosen, np.zeros(padding, chosen.dtype)])
            valid = np.arange(count * batch_size) < len(part)
            for repeat in range(repeats):
                blocks_of["rows"].append(index.reshape(count, batch_size))
                blocks_of["valid"].append(valid.reshape(count, batch_size))
                fresh = valid & (epoch == 0) & (repeat == 0)
                blocks_of["fresh"].append(fresh.reshape(count, batch_size))
            if repeats > 1:  # the repeats of a batch follow it
                for name, blocks in blocks_of.items():
                    together = np.stack(blocks[-repeats:], 1).reshape(-1, batch_size)
                    blocks_of[name] = [*blocks[:-repeats], together]
        steps.append(count * epochs * repeats)
        first_pass.append(count * repeats)
    return {
        "rows": np.concatenate(blocks_of["rows"]).astype(np.int32),
        "valid": np.concatenate(blocks_of["valid"]),
        "fresh": np.concatenate(blocks_of["fresh"]),
        "steps": np.asarray(steps),
        "epoch_steps": np.asarray(first_pass),
        "seed": seed,
        "epochs": epochs,
        "repeats": repeats,
    }


def check_labels(labels: Labels) -> None:
    """Raises a `UserError` where a label is no class."""
    for split, values in (("training", labels.train), ("test", labels.test)):
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
            raise UserError(
                "an incremental stream needs one class per example, but the labels of the "
                f"{split} data are {values.dtype}{list(values.shape)}"
            )
        bad = np.flatnonzero((values < 0) | (values >= labels.classes))
        if len(bad):
            raise UserError(
                f"the {split} data have the label {values[bad[0]]} (example {bad[0]}), outside of "
                f"0 to {labels.classes - 1}"
            )


def parts_of(stream: Stream) -> list[np.ndarray]:
    """Returns the training examples of each experience, sorted."""
    ends = np.cumsum(stream.steps)
    return [
        np.sort(stream.rows[end - count : end][stream.fresh[end - count : end]])
        for end, count in zip(ends, stream.steps, strict=True)
    ]


def shuffled(examples: np.ndarray, stream: Stream) -> np.ndarray:
    """Returns the examples in the random order of the stream's seed."""
    key = order.seed_for(stream.seed, 6 << 32)
    return examples[order.permutation(len(examples), key, 0)]


def rescheduled(stream: Stream, parts: Sequence[np.ndarray]) -> Stream:
    """Returns the stream with other examples in its experiences."""
    again = schedule(parts, stream.batch_size, stream.epochs, stream.repeats, stream.seed)
    return stream._replace(**again)


def aligned(built: Sequence[Stream]) -> tuple[Stream, ...]:
    """Returns streams whose experiences have as many steps as the longest of each.

    What is added are steps without a row, which the program leaves out: a seed computes what it
    would alone.
    """
    steps = np.max([stream.steps for stream in built], axis=0)
    first_pass = np.max([stream.epoch_steps for stream in built], axis=0)
    return tuple(_stretched(stream, steps)._replace(epoch_steps=first_pass) for stream in built)


def _stretched(stream: Stream, steps: np.ndarray) -> Stream:
    if (stream.steps == steps).all():
        return stream
    changed = {}
    for name in ("rows", "valid", "fresh"):
        parts = np.split(getattr(stream, name), np.cumsum(stream.steps)[:-1])
        changed[name] = np.concatenate(
            [
                np.pad(part, ((0, more - len(part)), (0, 0)))
                for part, more in zip(parts, steps, strict=True)
            ]
        )
    return stream._replace(**changed, steps=steps)
