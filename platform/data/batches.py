"""Reads the batches of one process from a source: the part of a feed that runs in grain's workers.

The element at index `s` is the batch of step `s`, a pure function of the step, so that reading from
any step, with any number of workers, gives the same batches. All is numpy: workers never touch a
device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lamina.platform.data import order as orders
from lamina.platform.data.dataset import Held, Source
from lamina.platform.errors import UserError

_ENDLESS = 2**40
_OUT_OF_SIGHT = 80


def order_of(source: Source) -> Callable[[int, int, int], np.ndarray]:
    """Returns `(seed, first_position, count) -> indices`: a source's own order or the default."""
    own = getattr(source, "order", None)
    if own is not None:
        return own
    return lambda seed, first, count: orders.indices(len(source), seed, first, count)


def rows_of_process(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns which rows of the global batch a process reads.

    Raises:
        UserError: the processes can't have equal shares.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"data.batch_size = {batch_size} can't be divided among {process_count} processes: "
            f"use a positive multiple of {process_count}"
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def training_indices(
    source: Source,
    batch_size: int,
    rows: slice,
    order_seeds: Sequence[int],
    first_step: int,
    count: int,
) -> np.ndarray:
    """Returns int64 [count, len(order_seeds), rows]: the examples of `count` steps.

    Args:
        source: the training split.
        batch_size: rows of the global batch of one seed.
        rows: the rows wanted.
        order_seeds: seed of each order.
        first_step: first step wanted.
        count: number of steps.
    """
    order = order_of(source)
    per_seed = [
        order(seed, first_step * batch_size, count * batch_size).reshape(count, batch_size)[:, rows]
        for seed in order_seeds
    ]
    return np.stack(per_seed, axis=1)


def evaluation_indices(
    n: int, batch_size: int, rows: slice, first_step: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples of `count` evaluation batches, in order, and their weights.

    Rows past the last example repeat the first one with weight 0.

    Returns:
        int64 [count, rows] and float32 [count, rows].
    """
    positions = np.arange(first_step * batch_size, (first_step + count) * batch_size)
    positions = positions.reshape(count, batch_size)[:, rows]
    real = positions < n
    return np.where(real, positions, 0), real.astype(np.float32)


def fetch(source: Source, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the examples at `indices` (any shape), stacked: name to array [*indices.shape, ...].

    Raises:
        UserError: an example can't be read (the message names it), or examples differ in shape.
    """
    if isinstance(source, Held):
        return {k: np.asarray(v) for k, v in source.gather(source.arrays, indices).items()}
    flat = [int(i) for i in indices.ravel()]
    try:
        examples = source.__getitems__(flat)
    except Exception as error:
        raise _unreadable(source, flat, error) from error
    try:
        stacked = {k: np.stack([example[k] for example in examples]) for k in examples[0]}
    except (KeyError, ValueError) as error:
        shapes = sorted({str({k: np.shape(v) for k, v in e.items()}) for e in examples})
        raise UserError(
            f"the examples of {_shown(source)} differ in shape, so they make no batch: "
            + " and ".join(shapes[:3])
        ) from error
    return {k: v.reshape(*indices.shape, *v.shape[1:]) for k, v in stacked.items()}


def _unreadable(source: Source, indices: Sequence[int], error: Exception) -> UserError:
    for index in indices:
        try:
            source[index]
        except Exception as own:
            return UserError(f"example {index} of {_shown(source)} can't be read: {_said(own)}")
    return UserError(f"a batch of {_shown(source)} can't be read: {_said(error)}")


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _shown(source: Source) -> str:
    text = repr(source)
    return text if len(text) <= _OUT_OF_SIGHT else text[:_OUT_OF_SIGHT] + "..."


class TrainingBatches:
    """The endless training batches of one process: random access by step.

    Args:
        source: the training split.
        batch_size: rows of the global batch of one seed.
        rows: the rows of this process.
        order_seeds: seed of each order.
        stacked: whether batches have a leading dimension of seeds.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        rows: slice,
        order_seeds: Sequence[int],
        stacked: bool,
    ):
        self._source, self._batch_size, self._rows = source, batch_size, rows
        self._order_seeds, self._stacked = tuple(order_seeds), stacked

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> dict[str, Any]:
        indices = training_indices(
            self._source, self._batch_size, self._rows, self._order_seeds, step, 1
        )[0]
        return fetch(self._source, indices if self._stacked else indices[0])

    def __repr__(self) -> str:
        return f"TrainingBatches({_shown(self._source)}, batch_size={self._batch_size})"


class EvaluationBatches:
    """The evaluation batches of one process: random access by step, "weights" always present.

    Args:
        source: the split to evaluate.
        batch_size: rows of the global batch.
        rows: the rows of this process.
    """

    def __init__(self, source: Source, batch_size: int, rows: slice):
        self._source, self._batch_size, self._rows = source, batch_size, rows

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> dict[str, Any]:
        indices, weights = evaluation_indices(
            len(self._source), self._batch_size, self._rows, step, 1
        )
        return weighted(fetch(self._source, indices[0]), weights[0])

    def __repr__(self) -> str:
        return f"EvaluationBatches({_shown(self._source)}, batch_size={self._batch_size})"


def weighted(batch: dict[str, Any], weights: Any) -> dict[str, Any]:
    """Returns `batch` with "weights" multiplied by the rows' `weights` [B] (numpy or jax)."""
    own = batch.get("weights")
    if own is not None:
        weights = own * weights.reshape(weights.shape + (1,) * (own.ndim - weights.ndim))
    return batch | {"weights": weights}
