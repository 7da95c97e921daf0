"""Feeds bring batches to the jitted step: from the device's own memory, or through grain.

A feed has a host side (`read`) and a device side (`select`, pure, run inside the jitted step).
Both placements read the same order and give bit-identical batches:

- device: the whole split is put on the device once; `read` gives indices, `select` gathers;
- grain: threads or worker processes read ahead; `read` gives the batches themselves.

In a run of several processes each reads only its own rows `[p*B/P : (p+1)*B/P]` of every global
batch, under both placements.
"""

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lamina.platform.data import batches, order
from lamina.platform.data.dataset import Held, Source
from lamina.platform.errors import UserError

DEVICE_LIMIT = 2**30
"""Bytes up to which "auto" puts a split on the device. The smallest accelerators in use have
16 GiB (TPU v5e), so this leaves the model nearly all; CIFAR-10 takes 0.15 GiB, ImageNet 180."""

READING_THREADS = 4
"""Threads that read ahead without workers: enough to hide the latency of files; more of them
only contend for the interpreter's lock."""

INDEX_WINDOW = 64
"""Steps whose indices are put on the device at once: a transfer, of 50 us, is then nothing beside
the dispatch of a step, and the indices of a batch of 4,096 still take only a megabyte."""

Placement = Literal["auto", "device", "grain"]


class Feed(NamedTuple):
    """Where batches come from.

    Attributes:
        constants: device-resident arrays, {} under grain; pass them to the jitted step as an
            argument (closed over, they would be copied into the program).
        read: `(first_step, count)` -> host pytree with leading dimension `count`, always exactly
            `count` rows: indices int32 [count, B] (an evaluation feed adds float32 "weights"), or
            stacked batches. With several seeds [count, seeds, B].
        select: pure `(constants, row) -> batch`, with `row` one entry of what `read` returned.
        close: stops threads and workers; further calls do nothing.
        steps: batches until every example was seen once; 0 for endless training.
        window: steps worth reading and putting on the devices at once: many where a row is small.
    """

    constants: Any
    read: Callable[[int, int], Any]
    select: Callable[[Any, Any], dict[str, jax.Array]]
    close: Callable[[], None]
    steps: int = 0
    window: int = 1


def normalise(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns `batch` with uint8 "inputs" as float32 in [0, 1]."""
    inputs = batch["inputs"]
    if inputs.dtype != jnp.uint8:
        return batch
    # XLA turns a division by 255 into this product in some programs and not in others, which
    # differ in the last bit; one product is rounded the same everywhere (and 255 still gives 1).
    return batch | {"inputs": jnp.asarray(inputs).astype(jnp.float32) * np.float32(1 / 255)}


def choose_placement(source: Source, placement: str = "auto") -> str:
    """Returns "device" or "grain".

    Args:
        source: the training split.
        placement: "auto" takes the device if the split is in memory and at most `DEVICE_LIMIT`.

    Raises:
        UserError: an unknown placement, or "device" for a split that isn't in memory.
    """
    if placement == "auto":
        fits = isinstance(source, Held) and (
            sum(array.nbytes for array in source.arrays.values()) <= DEVICE_LIMIT
        )
        return "device" if fits else "grain"
    if placement not in ("device", "grain"):
        raise UserError(f"data.placement = {placement!r} should be 'auto', 'device' or 'grain'")
    if placement == "device":
        _held(source)
    return placement


def training_feed(
    source: Source,
    batch_size: int,
    seed: int,
    *,
    placement: Placement = "auto",
    seeds: Sequence[int] = (),
    workers: int = 0,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> Feed:
    """Returns the device or grain feed of a training split; see `device_feed` and `grain_feed`."""
    common = {"seeds": seeds, "process_index": process_index, "process_count": process_count}
    if choose_placement(source, placement) == "device":
        return device_feed(source, batch_size, seed, sharding=sharding, **common)
    return grain_feed(source, batch_size, seed, workers=workers, prefetch=prefetch, **common)


def device_feed(
    source: Source,
    batch_size: int,
    seed: int,
    *,
    seeds: Sequence[int] = (),
    process_index: int = 0,
    process_count: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> Feed:
    """Returns a feed that gathers batches from arrays on the device.

    Args:
        source: the training split; it is `Held`.
        batch_size: rows of the global batch (of one seed).
        seed: data seed.
        seeds: values of the training seeds that have each their own order; () for one order.
        process_index: which slice of the batch's rows to read.
        process_count: number of slices.
        sharding: where to put the arrays (replicated over the mesh); default: the default device.
    """
    held = _held(source)
    _check_not_empty(source)
    rows = batches.rows_of_process(batch_size, process_index, process_count)
    order_seeds = _order_seeds(seed, seeds)

    def read(first_step: int, count: int) -> np.ndarray:
        chosen = batches.training_indices(
            source, batch_size, rows, order_seeds, first_step, count
        ).astype(np.int32)
        return chosen if seeds else chosen[:, 0]

    def select(constants: Any, row: Any) -> dict[str, jax.Array]:
        return normalise(held.gather(constants, row))

    return Feed(jax.device_put(held.arrays, sharding), read, select, _nothing, 0, INDEX_WINDOW)


def grain_feed(
    source: Source,
    batch_size: int,
    seed: int,
    *,
    seeds: Sequence[int] = (),
    workers: int = 0,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Feed:
    """Returns a feed that reads ahead with grain.

    Args:
        source: the training split; picklable if there are workers.
        batch_size: rows of the global batch (of one seed).
        seed: data seed.
        seeds: values of the training seeds that have each their own order; () for one order.
        workers: worker processes (for decoding that keeps the interpreter busy); 0: threads.
        prefetch: batches kept ready.
        process_index: which slice of the batch's rows to read.
        process_count: number of slices.
    """
    _check_not_empty(source)
    rows = batches.rows_of_process(batch_size, process_index, process_count)
    elements = batches.TrainingBatches(
        source, batch_size, rows, _order_seeds(seed, seeds), bool(seeds)
    )
    reader = Reader(elements, workers, prefetch)
    return Feed({}, reader.read, _select_batch, reader.close)


def evaluation_feed(
    source: Source,
    batch_size: int,
    *,
    placement: Placement = "auto",
    workers: int = 0,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> Feed:
    """Returns a feed over a split in its own order, each example with weight 1 exactly once.

    The last batch is padded with rows of weight 0, and every process has the same number of
    batches, `steps`. Batches beyond `steps` have weight 0 throughout, so a partial chunk can run
    at its full length. The arguments are those of the training feeds.
    """
    _check_not_empty(source)
    rows = batches.rows_of_process(batch_size, process_index, process_count)
    n = len(source)
    steps = math.ceil(n / batch_size)
    if choose_placement(source, placement) == "grain":
        reader = Reader(batches.EvaluationBatches(source, batch_size, rows), workers, prefetch)
        return Feed({}, reader.read, _select_batch, reader.close, steps)
    held = _held(source)

    def read(first_step: int, count: int) -> dict[str, np.ndarray]:
        chosen, weights = batches.evaluation_indices(n, batch_size, rows, first_step, count)
        return {"indices": chosen.astype(np.int32), "weights": weights}

    def select(constants: Any, row: Any) -> dict[str, jax.Array]:
        return normalise(batches.weighted(held.gather(constants, row["indices"]), row["weights"]))

    return Feed(jax.device_put(held.arrays, sharding), read, select, _nothing, steps)


def _select_batch(constants: Any, row: Any) -> dict[str, jax.Array]:
    del constants
    return normalise(row)


def _nothing() -> None:
    """Closes a feed that holds no threads."""


def _order_seeds(seed: int, seeds: Sequence[int]) -> tuple[int, ...]:
    return tuple(order.seed_for(seed, value) for value in seeds) or (seed,)


def _held(source: Source) -> Held:
    if not isinstance(source, Held):
        raise UserError(
            f"data.placement = 'device' needs a data set that is held in memory, and {source!r} "
            "is read example by example: use 'grain' or 'auto'"
        )
    return source


def _check_not_empty(source: Source) -> None:
    if len(source) == 0:
        raise UserError(f"the split {source!r} has no examples")


class Reader:
    """Reads a random-access sequence of batches ahead of time, from any step.

    Args:
        elements: batches by their number: name to array.
        workers: processes that read; 0: threads.
        prefetch: batches kept ready.

    Raises:
        UserError: there are fewer than none, or nothing is kept ready.
    """

    def __init__(self, elements: Any, workers: int, prefetch: int):
        if workers < 0 or prefetch < 1:
            raise UserError(
                f"data.workers = {workers} should be at least 0, and prefetch = {prefetch} at "
                "least 1"
            )
        self._elements, self._workers, self._prefetch = elements, workers, prefetch
        self._iterator: Any = None
        self._next_step = 0
        self._closed = False

    def read(self, first_step: int, count: int) -> dict[str, np.ndarray]:
        """Returns so many batches, stacked; quick where the last call ended at `first_step`.

        Raises:
            UserError: the data set raises an error at one of the examples.
            RuntimeError: the reader was closed.
        """
        if self._closed:
            raise RuntimeError("this feed was closed")
        iterator = self._iterator
        if iterator is None or first_step != self._next_step:
            iterator = self._start(first_step)
        try:
            rows = [next(iterator) for _ in range(count)]
        except UserError:
            self._stop()
            raise
        except Exception as error:
            self._stop()
            raise UserError(
                f"reading the batches of steps {first_step} to {first_step + count - 1} from "
                f"{self._elements!r} failed: {type(error).__name__}: {error}"
            ) from error
        self._next_step = first_step + count
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def close(self) -> None:
        """Stops what reads ahead."""
        self._closed = True
        self._stop()

    def _start(self, first_step: int) -> Any:
        import grain

        self._stop()
        # Grain reads its options from absl's flags, which only the command line parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        steps = grain.MapDataset.source(self._elements).slice(slice(first_step, None))
        if self._workers:
            each = math.ceil(self._prefetch / self._workers)
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            ahead = steps.to_iter_dataset(options).mp_prefetch(
                grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=each),
                worker_init_fn=_start_worker,
            )
        else:
            threads = min(READING_THREADS, self._prefetch)
            ahead = steps.to_iter_dataset(grain.ReadOptions(threads, self._prefetch))
        self._iterator = iterator = iter(ahead)
        iterator.start_prefetch()
        return iterator

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _start_worker(worker: int, workers: int) -> None:
    """Lets a worker end with its run, however that ends, and keeps it off the accelerators."""
    del worker, workers
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)  # a run that is killed can't stop its workers

        threading.Thread(target=end_with_parent, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")
