"""What a stream is made of: labels and arrays of a data set, put on the devices."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lamina.platform import config as configs
from lamina.platform.data import order
from lamina.platform.data.dataset import ArraySource, Dataset, Held, Source
from lamina.platform.data.feed import choose_placement
from lamina.platform.errors import UserError
from lamina.platform.incremental import sequence
from lamina.platform.incremental.sequence import Examples, Plan, Segments, Tables
from lamina.platform.incremental.stream import Labels, Shared, Stream, aligned, check_labels
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.learners import MARKS, PLAIN, Learner
from lamina.sharding import rules as partition_rules
from lamina.sharding.mesh import batch_parallelism

TEST_BATCH = 1000
"""Test examples that are evaluated at once where the config doesn't say: large enough for the
matrix products to dominate."""


class Data(NamedTuple):
    """What is learned from and tested on.

    Attributes:
        train: name to array [N, ...].
        test: name to array [n, ...].
        labels: the classes of both.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    labels: Labels


def open_data(dataset: Dataset, train_on: str, evaluate_on: str) -> Data:
    """Returns the arrays of a data set's splits.

    Args:
        dataset: the data set.
        train_on: "train" or "train+validation".
        evaluate_on: "test" or "validation".

    Raises:
        UserError: they aren't examples with one class each, or not in memory.
    """
    parts = [_arrays(dataset.splits[name], name) for name in train_on.split("+")]
    train = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    test = _arrays(dataset.splits[evaluate_on], evaluate_on)
    spec = dataset.spec
    domains = (train.pop("domains"), test.pop("domains")) if "domains" in train else None
    labels = Labels(train["labels"], test["labels"], spec.outputs, tuple(spec.input_shape), domains)
    if domains is None:
        check_labels(labels)
    return Data(train, test, labels)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Returns them as one; a single one, which may be on disk, isn't copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def is_held(config: Any, data: Data) -> bool:
    """Tells whether the data are put on the devices, as `data.placement` says."""
    return choose_placement(ArraySource(data.train), config.data.placement) == "device"


def _arrays(source: Source, name: str) -> dict[str, np.ndarray]:
    if not isinstance(source, Held):
        raise UserError(
            f"the split {name!r} ({source!r}) isn't in memory, as a stream needs it: use a data "
            "set whose arrays are"
        )
    wanted = ("inputs", "labels", "domains")
    arrays = {key: np.asarray(source.arrays[key]) for key in wanted if key in source.arrays}
    if not {"inputs", "labels"} <= set(arrays):
        raise UserError(
            f"the split {name!r} ({source!r}) has no examples with labels, as a stream needs them"
        )
    if "weights" in source.arrays:
        raise UserError(
            f"the split {name!r} ({source!r}) has weights of its examples, and in a stream all "
            "count alike: leave them out"
        )
    return arrays


def build_streams(
    config: Any, kind: configs.Kind, trust: Sequence[str], labels: Labels, learner: Learner
) -> tuple[Stream, ...]:
    """Returns the stream of each seed, or one for all, as the learner arranges it.

    Raises:
        UserError: the stream refuses its keys or the labels, or a task has no test example.
    """
    data, block = config.data, config.stream
    shared = Shared(**{key: block[key] for key in Shared._fields})
    seeds = [data.seed]
    if data.order == "per_seed":
        seeds = [order.seed_for(data.seed, seed) for seed in config.seeds]
    built = []
    for seed in seeds:
        arguments = (labels, data.batch_size, seed, shared)
        built.append(learner.arrange(configs.build(block, kind, "stream", trust, *arguments)))
        sizes = np.bincount(built[-1].test_task, minlength=len(built[-1].test_classes))
        if not sizes.all():
            task = int(np.argmin(sizes))
            classes = np.flatnonzero(built[-1].test_classes[task]).tolist()
            raise UserError(
                f"the split {shared.evaluate_on!r} has no example of task {task + 1} (classes "
                f"{classes}), whose accuracy is then undefined: give it some, or evaluate on "
                "another split (stream.evaluate_on)"
            )
    return aligned(built)


def check_learner(config: Any, learner: Learner, stream: Stream) -> None:
    """Raises a `UserError` where the stream lacks what the learner needs."""
    name = config.learner.name
    if "boundaries" in learner.needs and not stream.boundaries:
        raise UserError(
            f"learner {name!r} needs to know where an experience begins, and the stream "
            f"{config.stream.name!r} doesn't tell: use class_incremental, or another learner"
        )
    if "classes" in learner.needs and stream.answers > 1:
        raise UserError(
            f"learner {name!r} needs one class for each example, and the examples of the stream "
            f"{config.stream.name!r} are texts: use finetune, cumulative, si, agem, gem, ema_merge "
            "or er with policy = 'reservoir'"
        )
    if "pretrained" in learner.needs and not config.init_from:
        raise UserError(
            f"learner {name!r} needs a model that was trained before: set init_from to a run, a "
            "checkpoint or a safetensors file"
        )
    if config.islands.name != "none":
        alone = ("begin", "end", "sweep", "review", "predict", "after")
        own = [hook for hook in alone if getattr(learner, hook) is not getattr(PLAIN, hook)]
        if own:
            raise UserError(
                f"learner {name!r} can't learn on islands yet: it acts beside the steps "
                f"({', '.join(own)}); learners that do so in the steps alone can, such as "
                "finetune, er, agem, gem, der and derpp"
            )
    memory = learner.memory
    if memory is not None:
        for draw in memory.draws.values():
            rows = draw.rows or config.data.batch_size // config.islands.get("number", 1)
            if memory.slots < rows:
                raise UserError(
                    f"learner.memory = {memory.slots} is smaller than the {rows} rows that are "
                    "replayed with each batch: make the memory larger, or learner.replay smaller"
                )


def example_batch(data: Data, stream: Stream) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch as `jax.ShapeDtypeStruct`s, as the step gets it."""
    rows = stream.batch_size
    arrays = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in data.train.items()}
    index = jax.ShapeDtypeStruct((rows,), np.int32)
    transform = stream.transform or ()
    batch = jax.eval_shape(lambda a, i: sequence.gathered(a, transform, i), arrays, index)
    marks = {name: jax.ShapeDtypeStruct((rows,), np.bool_) for name in MARKS}
    return batch | marks | {"weights": jax.ShapeDtypeStruct((rows,), np.float32)}


def plan(parts: Experiment, streams: Sequence[Stream]) -> Plan:
    """Returns what the program is made of."""
    sharding = partition_rules.batch_sharding(parts.mesh)
    alone = parts.mesh.size == 1
    constrain = lambda b: b if alone else jax.lax.with_sharding_constraint(b, sharding)
    ragged = any(not one.valid.any(axis=1).all() for one in streams)
    return Plan(parts.recipe, streams[0].mask, ragged, parts.steps, constrain)


def examples(parts: Experiment, cut: Segments, data: Data) -> Examples:
    """Returns the data on the devices."""
    whole = partition_rules.replicated(parts.mesh)
    return jax.device_put(Examples(data.train, data.test, cut), whole)


def tables(parts: Experiment, streams: Sequence[Stream]) -> list[Tables]:
    """Returns each seed's stream on the devices, all of the same shapes."""
    whole = partition_rules.replicated(parts.mesh)
    count = max(len(stream.test_index) for stream in streams)
    batch = parts.config.evaluation.batch_size or min(count, TEST_BATCH)
    ways = batch_parallelism(parts.mesh)
    batch = -(-batch // ways) * ways
    size = -(-count // batch) * batch

    def padded(array: np.ndarray, value: int) -> np.ndarray:
        filled = np.full(size, value, np.int32)
        filled[: len(array)] = array
        return filled.reshape(-1, batch)

    def of(stream: Stream) -> Tables:
        return Tables(
            rows=stream.rows,
            valid=stream.valid,
            fresh=stream.fresh,
            arrives=stream.arrives,
            classes=stream.classes,
            test_classes=stream.test_classes,
            test_rows=padded(stream.test_index, 0),
            test_task=padded(stream.test_task, len(stream.test_classes)),
            transform=stream.transform or (),
        )

    return [jax.device_put(of(stream), whole) for stream in streams]
