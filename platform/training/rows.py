"""What a feed has read, on the devices: the rows from which the jitted step makes its batches."""

from typing import Any

import jax
import numpy as np

from lamina.platform.data.feed import Feed
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.loop import Chunk
from lamina.sharding import rules as partition_rules


class RowWindows:
    """The rows of a training run, put on the devices a window of steps at a time.

    Rows that are mere indices are put there for many chunks at once: a transfer costs the host
    more than the dispatch of a step. Windows begin at absolute multiples of their size, wherever
    the run starts.

    Args:
        parts: the run's parts.
        feed: of the training split.
        start: the first step that will be asked for.

    Attributes:
        abstract: a window's rows, as `jax.ShapeDtypeStruct`s with shardings.
    """

    def __init__(self, parts: Experiment, feed: Feed, start: int):
        length = parts.config.steps_per_call
        self._feed = feed
        self._size = length * max(1, feed.window // length)
        self._first = start // self._size * self._size
        self._ahead = feed.read(self._first, self._size)
        self._placed: Any = None
        self._whole = partition_rules.replicated(parts.mesh)
        self._spans: dict[tuple[int, int], jax.Array] = {}
        self.abstract = abstract_rows(parts, self._ahead, parts.seeds.per_seed_rows)

    def of(self, chunk: Chunk) -> tuple[Any, jax.Array]:
        """Returns the window that holds a chunk's rows, and (place of its first, its steps)."""
        first = chunk.first // self._size * self._size
        if first != self._first:
            self._first, self._placed = first, None
            self._ahead = self._feed.read(first, self._size)
        if self._placed is None:
            self._placed, self._ahead = put(self._ahead, self.abstract), None
        span = (chunk.first - first, chunk.steps)
        if span not in self._spans:
            self._spans[span] = jax.device_put(np.asarray(span, np.int32), self._whole)
        return self._placed, self._spans[span]


def abstract_rows(parts: Experiment, rows: Any, per_seed: bool) -> Any:
    """Returns the global `jax.ShapeDtypeStruct`s, with shardings, of what a feed has read."""
    dimension = 2 if per_seed else 1
    sharding = partition_rules.batch_sharding(parts.mesh, dimension)
    processes = jax.process_count()

    def of(array: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = list(array.shape)
        shape[dimension] *= processes
        return jax.ShapeDtypeStruct(tuple(shape), array.dtype, sharding=sharding)

    return jax.tree.map(of, rows)


def put(rows: Any, abstract: Any) -> Any:
    """Puts what this process has read on its devices, as its part of the global rows."""
    if jax.process_count() == 1:
        return jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), rows, abstract)
    return jax.tree.map(
        lambda a, like: jax.make_array_from_process_local_data(like.sharding, a, like.shape),
        rows,
        abstract,
    )
