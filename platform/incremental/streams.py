"""The streams by name: which classes, tasks or domains come in which experience.

Letters as in `stream`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from lamina.platform.data import order
from lamina.platform.errors import UserError
from lamina.platform.incremental import transforms
from lamina.platform.incremental.stream import Labels, Shared, Stream, check_labels, schedule

ClassOrder = Literal["fixed", "shuffled"] | tuple[int, ...]
"""How a stream of classes is ordered."""


def class_incremental(
    labels: Labels,
    batch_size: int,
    seed: int,
    shared: Shared,
    *,
    class_order: ClassOrder = "fixed",
    classes: int = 0,
    mask: Literal["all", "seen", "task"] = "seen",
) -> Stream:
    """New classes with each experience; the test doesn't tell which experience an example is of.

    Args:
        labels: of the data.
        batch_size: rows of a batch.
        seed: of the order.
        shared: the keys of every stream.
        class_order: "fixed" takes the classes of the training data from the lowest on, "shuffled"
            an order of the stream's seed; or the classes in the order in which they come, such as
            (3, 0, 2, 1).
        classes: how many classes the stream has; 0: all of the training data.
        mask: logits that count in evaluation: "all", those of classes "seen" so far, or of the
            "task" of the example.

    Raises:
        UserError: there are fewer classes than experiences, or than `classes`, or the order names
            what is no class, or one twice.
    """
    check_labels(labels)
    names = _in_order(class_order, labels, seed)
    used = classes or len(names)
    if not 0 < used <= len(names):
        raise UserError(f"stream.classes = {classes}: there are {len(names)} classes")
    if not 1 <= shared.experiences <= used:
        raise UserError(
            f"stream.experiences = {shared.experiences} should lie between 1 and {used}: each "
            f"experience brings at least one of the {used} classes"
        )
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


def _in_order(class_order: ClassOrder, labels: Labels, seed: int) -> np.ndarray:
    """Returns the classes in the order in which they come."""
    present, classes = np.unique(labels.train), labels.classes
    if class_order == "fixed":
        return present
    if class_order == "shuffled":
        return present[order.permutation(len(present), order.seed_for(seed, 1 << 32), 0)]
    known = set(class_order) <= set(range(classes))
    if not class_order or len(set(class_order)) < len(class_order) or not known:
        raise UserError(
            f"stream.class_order = {class_order} should name classes from 0 to {classes - 1}, each "
            "at most once"
        )
    return np.asarray(class_order, np.int64)


def task_incremental(
    labels: Labels,
    batch_size: int,
    seed: int,
    shared: Shared,
    *,
    class_order: ClassOrder = "fixed",
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
    class_order: ClassOrder = "fixed",
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
    check_labels(labels)
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

    Raises:
        UserError: there are fewer examples than experiences.
    """
    count = shared.experiences
    most = min(len(labels.train), len(labels.test))
    if not 1 <= count <= most:
        raise UserError(
            f"stream.experiences = {count} should lie between 1 and {most}, the number of examples"
        )
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
        answers=_answers(labels),
    )


def domains(labels: Labels, batch_size: int, seed: int, shared: Shared) -> Stream:
    """One domain of the data set after the other, such as the languages or the styles of texts.

    The data set tells the domain of each example (`python_domains`). All outputs count.

    Args:
        labels: of the data.
        batch_size: rows of a batch.
        seed: of the order.
        shared: the keys of every stream; the first `experiences` domains come.

    Raises:
        UserError: the data set tells no domains, or fewer.
    """
    if labels.domains is None:
        raise UserError("stream 'domains' needs a data set with domains, such as python_domains")
    count = int(labels.domains[0].max()) + 1
    if not 1 <= shared.experiences <= count:
        raise UserError(
            f"stream.experiences = {shared.experiences} should lie between 1 and {count}, the "
            "number of domains"
        )
    train, test = labels.domains
    parts = [np.flatnonzero(train == number) for number in range(shared.experiences)]
    tested = np.flatnonzero(test < shared.experiences)
    everything = np.ones((shared.experiences, labels.classes), bool)
    return Stream(
        **schedule(parts, batch_size, shared.epochs, shared.repeats, seed),
        classes=everything,
        test_index=tested.astype(np.int32),
        test_task=test[tested].astype(np.int32),
        test_classes=everything,
        boundaries=True,
        mask="all",
        answers=_answers(labels),
    )


def _answers(labels: Labels) -> int:
    """Returns how many answers an example wants."""
    return int(np.prod(labels.test.shape[1:]))


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
        UserError: percentages outside of 0 to 100, or more experiences than classes.
    """
    check_labels(labels)
    count, rng = shared.experiences, np.random.Generator(np.random.Philox(key=seed % 2**64))
    for name, share in (("disjoint", disjoint), ("blurry", blurry)):
        if not 0 <= share <= 100:
            raise UserError(f"stream.{name} = {share} should lie between 0 and 100 (percent)")
    known = np.unique(labels.train)
    if not 1 <= count <= len(known):
        raise UserError(
            f"stream.experiences = {count} should lie between 1 and {len(known)}, the number of "
            "classes in the training data"
        )
    apart = len(known) * disjoint // 100 // count * count
    mixed = (len(known) - apart) // count * count
    names = rng.permutation(known)

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
    "domains": domains,
    "online": online,
    "si_blurry": si_blurry,
    "task_incremental": task_incremental,
}
"""Name to factory `(labels, batch size, seed, shared keys, *, options) -> Stream`."""
