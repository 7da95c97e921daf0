"""What a writer is: three functions that take a run's records somewhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from lamina.platform.reporting.records import Record
from lamina.platform.reporting.storage import PathLike


class Writer(NamedTuple):
    """Where records go.

    Attributes:
        write: takes the records of one moment, in the order in which they were made.
        sync: makes all that was written durable; called before a checkpoint is saved, so that no
            record is older than the state it belongs to.
        close: syncs and lets go; called once, also when the run fails.
    """

    write: Callable[[Sequence[Record]], None]
    sync: Callable[[], None]
    close: Callable[[], None]


class RunInfo(NamedTuple):
    """What writers know of the run that they write for.

    Attributes:
        workdir: the run folder, local or `gs://`.
        seeds: the values of `config.seeds`.
        steps: training steps that the run will take in all; 0 where unknown.
        start_step: the step that this session begins at (above 0 when it resumes).
        examples_per_step: examples of one step, over all seeds; 0 where unknown.
        config: the resolved config as plain data, for trackers.
        name: what to call the run; by default the folder's name.
        process_index: this process; only process 0 writes.
        stream: where the console writer prints; None is `sys.stdout`.
    """

    workdir: PathLike
    seeds: tuple[int, ...] = (0,)
    steps: int = 0
    start_step: int = 0
    examples_per_step: int = 0
    config: Mapping[str, Any] = {}
    name: str = ""
    process_index: int = 0
    stream: TextIO | None = None


def tag(record: Record, seeds: Sequence[int]) -> str:
    """The name of a record's curve: "split/name", or "split/name/seed_0" where there are several.

    Example:
        >>> tag(Record(1, "train", "loss", 0.5, seed=3), seeds=(3, 4))
        'train/loss/seed_3'
    """
    name = f"{record.split}/{record.name}"
    return f"{name}/seed_{record.seed}" if len(seeds) > 1 else name


def _nothing(*_: Any) -> None:
    """Does nothing."""


NULL = Writer(_nothing, _nothing, _nothing)
"""The writer that writes nowhere."""
