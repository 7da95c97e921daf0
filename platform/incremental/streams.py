"""Streams as data: which training example comes at which step, in which experience.

A stream is a set of numpy arrays, built before the run and never a loop. Steps of all experiences
stand one after another; the last batch of an experience is padded with rows that count nothing.

Letters: E experiences, S steps of the whole stream, B batch, C classes, J test tasks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lamina.platform.data import order
from lamina.platform.errors import UserError
from lamina.platform.incremental import transforms
from lamina.platform.incremental.transforms import Transform


class Labels(NamedTuple):
    """What a stream is made from.

    Attributes:
        train: int [N], class of each training example.
        test: int [n], of each test example.
        classes: their number.
        input_shape: of one example.
    """

    train: np.ndarray
    test: np.ndarray
    classes: int
    input_shape: tuple[int, ...]


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

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.rows.shape[1]


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


def class_incremental(
    labels: Labels,
    batch_size: int,
    seed: int,
    shared: Shared,
    *,
    class_order: Literal["fixed", "shuffled"] = "fixed",
    classes: int = 0,
    mask: Literal["all", "seen", "task"] = "seen",
) -> Stream:
    """New classes with each experience; the test doesn't tell which experience an example is of.

    Args:
        labels: of the data.
        batch_size: rows of a batch.
        seed: of the order.
        shared: the keys of every stream.
        class_order: "fixed" takes 0, 1, 2 and so on, "shuffled" an order of the stream's seed.
        classes: how many classes the stream has; 0: all of the data set.
        mask: logits that count in evaluation: "all", those of classes "seen" so far, or of the
            "task" of the example.

    Raises:
        UserError: there are fewer classes than experiences, or than `classes`.
    """
    used = classes or labels.classes
    if used > labels.classes or classes < 0:
        raise UserError(f"stream.classes = {classes}: the data set has {labels.classes} classes")
    if not 1 <= shared.experiences <= used:
        raise UserError(
            f"stream.experiences = {shared.experiences} should lie between 1 and {used}: each "
            f"experience brings at least one of the {used} classes"
        )
    names = np.arange(labels.classes)
    if class_order == "shuffled":
        names = np.asarray(order.permutation(labels.classes, order.seed_for(seed, 1 << 32), 0))
    groups = np.array_split(names[:used], shared.experiences)
    parts = [np.flatnonzero(np.isin(labels.train, group)) for group in groups]
    for group, part in zip(groups, parts, strict=True):
        if not len(part):
            raise UserError(f"the training data have no example of the classes {group.tolist()}")
    present = np.zeros((len(groups), labels.classes), bool)
    task_of = np.full(labels.classes, -1)
    for number, group in enumerate(groups):
        present[number, group] = True
        task_of[group] = number
    tested = np.flatnonzero(task_of[labels.test] >= 0)
    return Stream(
        **schedule(parts, batch_size, shared.epochs, shared.repeats, seed),
        classes=present,
        test_index=tested.astype(np.int32),
        test_task=task_of[labels.test[tested]].astype(np.int32),
        test_classes=present,
        boundaries=True,
        mask=mask,
    )


def task_incremental(
    labels: Labels,
    batch_size: int,
    seed: int,
    shared: Shared,
    *,
    class_order: Literal["fixed", "shuffled"] = "fixed",
    classes: int = 0,
) -> Stream:
    """New classes with each experience; the test tells the experience, whose classes alone count.

    The arguments are those of `class_incremental`.
    """
    keys: dict[str, Any] = {"class_order": class_order, "classes": classes, "mask": "task"}
    return class_incremental(labels, batch_size, seed, shared, **keys)


def online(
    labels: Labels,
    batch_size: int,
    seed: int,
    shared: Shared,
    *,
    class_order: Literal["fixed", "shuffled"] = "fixed",
    classes: int = 0,
    mask: Literal["all", "seen", "task"] = "seen",
) -> Stream:
    """As `class_incremental`, in one pass, and a learner isn't told where an experience begins.

    The arguments are those of `class_incremental`.

    Raises:
        UserError: more than one epoch.
    """
    if shared.epochs != 1:
        raise UserError(f"stream.epochs = {shared.epochs}: an online stream has one pass")
    keys: dict[str, Any] = {"class_order": class_order, "classes": classes, "mask": mask}
    return class_incremental(labels, batch_size, seed, shared, **keys)._replace(boundaries=False)


def domain_incremental(
    labels: Labels,
    batch_size: int,
    seed: int,
    shared: Shared,
    *,
    transform: Literal["permuted", "rotated"] = "permuted",
    first_unchanged: bool = False,
    examples: int = 0,
) -> Stream:
    """The same classes with other inputs: each experience permutes or rotates the images its way.

    Args:
        labels: of the data.
        batch_size: rows of a batch.
        seed: of the order, and of the permutations or angles.
        shared: the keys of every stream.
        transform: "permuted" draws one permutation of the pixels for each experience (Goodfellow et
            al. 2013, arXiv 1312.6211), "rotated" one angle from U[0, 180) degrees, bilinear with
            zeros outside (Lopez-Paz and Ranzato 2017, arXiv 1706.08840).
        first_unchanged: whether the first experience has the images as they are.
        examples: of the training data in each experience; 0: all.

    Raises:
        UserError: there are fewer examples, or no images to rotate.
    """
    count = examples or len(labels.train)
    if not 0 < count <= len(labels.train):
        raise UserError(f"stream.examples = {examples}: there are {len(labels.train)}")
    if shared.experiences < 1:
        raise UserError(f"stream.experiences = {shared.experiences} should be at least 1")
    parts = []
    for number in range(shared.experiences):
        chosen = order.permutation(len(labels.train), order.seed_for(seed, 2 << 32), number)
        parts.append(np.sort(np.asarray(chosen[:count])) + number * len(labels.train))
    tests = np.arange(len(labels.test) * shared.experiences, dtype=np.int32)
    everything = np.ones((shared.experiences, labels.classes), bool)
    make = transforms.permuted if transform == "permuted" else transforms.rotated
    return Stream(
        **schedule(parts, batch_size, shared.epochs, shared.repeats, seed),
        classes=everything,
        test_index=tests,
        test_task=np.repeat(np.arange(shared.experiences, dtype=np.int32), len(labels.test)),
        test_classes=everything,
        boundaries=True,
        mask="all",
        transform=make(labels.input_shape, shared.experiences, seed, first_unchanged),
    )


def data_incremental(labels: Labels, batch_size: int, seed: int, shared: Shared) -> Stream:
    """The data in parts that are drawn alike: forgetting should be about 0.

    There is one test task for each part, with an equal share of the test examples.

    Args:
        labels: of the data.
        batch_size: rows of a batch.
        seed: of the order and of the parts.
        shared: the keys of every stream.
    """
    count = shared.experiences
    if not 1 <= count <= min(len(labels.train), len(labels.test)):
        raise UserError(f"stream.experiences = {count}: more than there are examples")
    shuffled = order.permutation(len(labels.train), order.seed_for(seed, 3 << 32), 0)
    everything = np.ones((count, labels.classes), bool)
    parts = [np.sort(part) for part in np.array_split(np.asarray(shuffled), count)]
    return Stream(
        **schedule(parts, batch_size, shared.epochs, shared.repeats, seed),
        classes=everything,
        test_index=np.arange(len(labels.test), dtype=np.int32),
        test_task=(np.arange(len(labels.test)) % count).astype(np.int32),
        test_classes=everything,
        boundaries=True,
        mask="all",
    )


def si_blurry(
    labels: Labels,
    batch_size: int,
    seed: int,
    shared: Shared,
    *,
    disjoint: int = 50,
    blurry: int = 10,
    sizes: Literal["random", "equal"] = "random",
) -> Stream:
    """Some classes come once, others are spread over experiences of random size (Si-Blurry).

    Moon et al. (2023, arXiv 2308.09303). Of the classes, which are permuted, `disjoint` percent
    belong to one experience each and the others have a home; `blurry` percent of the examples of
    the latter go into a pool that is dealt out over the experiences. A learner isn't told where an
    experience begins. Test task j has the test examples of the classes that come in experience j.

    Args:
        labels: of the data.
        batch_size: rows of a batch.
        seed: of the draws.
        shared: the keys of every stream.
        disjoint: N, percent. Default 50: the paper's.
        blurry: M, percent. Default 10: the paper's.
        sizes: "random" cuts the lists of classes and the pool at uniform random places, so that an
            experience may have no class of one kind; "equal" deals equal shares.

    Raises:
        UserError: percentages outside of 0 to 100, or no class left for the experiences.
    """
    count, rng = shared.experiences, np.random.Generator(np.random.Philox(key=seed % 2**64))
    if not (0 <= disjoint <= 100 and 0 <= blurry <= 100 and count >= 1):
        raise UserError("stream.disjoint and stream.blurry should lie between 0 and 100")
    apart = labels.classes * disjoint // 100 // count * count
    mixed = (labels.classes - apart) // count * count
    if not apart + mixed:
        raise UserError(f"stream.experiences = {count}: there are only {labels.classes} classes")
    names = rng.permutation(labels.classes)

    def cut(values: np.ndarray, number: int) -> list[np.ndarray]:
        if sizes == "equal" or not number:
            return np.array_split(values, count)
        return np.split(values, np.sort(rng.integers(0, number, count - 1)))

    members = lambda group: np.flatnonzero(np.isin(labels.train, group))
    own = [members(group) for group in cut(names[:apart], apart)]
    homes = [members(group) for group in cut(names[apart : apart + mixed], mixed)]
    dealt = blurry * sum(len(home) for home in homes) // 100
    shares = [len(part) for part in cut(np.arange(dealt), dealt)]
    taken = [home[:share] for home, share in zip(homes, shares, strict=True)]
    pool = rng.permutation(np.concatenate(taken))
    hands = np.split(pool, np.minimum(np.cumsum(shares), len(pool))[:-1])
    parts = [
        np.sort(np.concatenate([one, home[share:], hand]))
        for one, home, share, hand in zip(own, homes, shares, hands, strict=True)
    ]
    present = np.stack([np.isin(np.arange(labels.classes), labels.train[part]) for part in parts])
    # An experience without any example is tested on all classes, so that its accuracy is defined.
    tested = np.where(present.any(1, keepdims=True), present, True)
    groups = [np.flatnonzero(classes[labels.test]) for classes in tested]
    return Stream(
        **schedule(parts, batch_size, shared.epochs, shared.repeats, seed),
        classes=present,
        test_index=np.concatenate(groups).astype(np.int32),
        test_task=np.repeat(np.arange(count), [len(group) for group in groups]).astype(np.int32),
        test_classes=tested,
        boundaries=False,
        mask="seen",
    )


STREAMS: Mapping[str, Callable[..., Stream]] = {
    "class_incremental": class_incremental,
    "data_incremental": data_incremental,
    "domain_incremental": domain_incremental,
    "online": online,
    "si_blurry": si_blurry,
    "task_incremental": task_incremental,
}
"""Name to factory `(labels, batch size, seed, shared keys, *, options) -> Stream`."""


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
