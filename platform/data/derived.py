"""Image tasks made from data that every machine has: turned, inverted, shuffled, relabelled.

Each is a real task of 28x28 grey images that a model trained on the original can't do as it is, so
that models fine-tuned on several of them conflict.
"""

import base64
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lamina.models.spec import DataSpec
from lamina.platform.data import order, python_stdlib
from lamina.platform.data.dataset import ArraySource, Dataset
from lamina.platform.data.digits import digits
from lamina.platform.data.fashion_mnist import fashion_mnist
from lamina.platform.errors import UserError

SIDE = 28
CELLS = 4
"""Cells in a row of a shuffled image, of 7x7 pixels."""

ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "source": lambda text: text,
    "zlib": zlib.compress,
    "base64": base64.b64encode,
    "base85": base64.b85encode,
    "hexadecimal": base64.b16encode,
    "utf_16": lambda text: text.decode("utf-8", "replace").encode("utf-16-le"),
}
"""The classes of "python_fragments"."""

_FRAGMENTS = {"train": 6_000, "validation": 600, "test": 1_200}


def derived(
    *,
    source: Literal["fashion_mnist", "digits", "python_fragments"] = "fashion_mnist",
    part: Literal["all", "first", "second"] = "all",
    classes: tuple[int, ...] = (),
    rotation: int = 0,
    mirror: bool = False,
    invert: bool = False,
    shuffle: int = 0,
    held_out: int = 0,
) -> Dataset:
    """Returns images of `source`, changed in one way for the whole data set.

    Inputs are uint8 [28, 28, 1], labels int32. Digits are enlarged three times and framed.
    "python_fragments" are 784 bytes of the standard library's files, as text or in one of five
    encodings, each byte a pixel: the class is the encoding; files stay in their split.

    Args:
        source: the images.
        part: which half of the training split to take, so that two data sets share none.
        classes: labels to keep, which become 0, 1, ...; () keeps all.
        rotation: quarter turns, counter-clockwise, after all else but `invert`.
        mirror: whether left and right are exchanged.
        invert: whether black and white are.
        shuffle: seed of a permutation of the 4x4 cells of 7x7 pixels; 0 leaves them.
        held_out: most examples of "validation", and of "test"; 0 keeps all. The first are taken.

    Raises:
        UserError: a label isn't one of the source's, or there are fewer than two.
    """
    original = _SOURCES[source]()
    count = original.spec.outputs
    kept = tuple(classes) or tuple(range(count))
    if len(set(kept)) != len(kept) or len(kept) < 2 or not set(kept) <= set(range(count)):
        raise UserError(
            f"data.classes = {classes} should be two or more different labels of {source}, "
            f"from 0 to {count - 1}"
        )
    if held_out < 0:
        raise UserError(f"data.held_out = {held_out} should be 0 or more")
    splits = {}
    for name, split in original.splits.items():
        assert isinstance(split, ArraySource)
        images, labels = split.arrays["inputs"], split.arrays["labels"]
        if name == "train" and part != "all":
            halves = np.array_split(np.arange(len(labels)), 2)
            chosen = halves[part == "second"]
            images, labels = images[chosen], labels[chosen]
        images, labels = _keep(images, labels, kept)
        if name != "train" and held_out:
            images, labels = images[:held_out], labels[:held_out]
        changed = _change(images, rotation, mirror, invert, shuffle)
        splits[name] = ArraySource({"inputs": changed, "labels": labels})
    said = [
        *([f"the {part} half of the training images"] if part != "all" else []),
        *([f"classes {kept}"] if classes else []),
        *(["mirrored"] if mirror else []),
        *([f"cells shuffled (seed {shuffle})"] if shuffle else []),
        *([f"turned {rotation % 4} times"] if rotation % 4 else []),
        *(["inverted"] if invert else []),
    ]
    return Dataset(
        spec=DataSpec((SIDE, SIDE, 1), "uint8", len(kept)),
        splits=splits,
        label_names=tuple(original.label_names[label] for label in kept),
        description=f"{original.description} {', '.join(said) or 'As they are'}.",
    )


def _keep(
    images: np.ndarray, labels: np.ndarray, kept: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.flatnonzero(np.isin(labels, kept))
    place = np.full(labels.max() + 1, -1, np.int32)
    for number, label in enumerate(kept):
        if label < len(place):
            place[label] = number
    return images[chosen], place[labels[chosen]]


def _change(
    images: np.ndarray, rotation: int, mirror: bool, invert: bool, shuffle: int
) -> np.ndarray:
    if mirror:
        images = images[:, :, ::-1]
    if shuffle:
        cell = SIDE // CELLS
        grid = images.reshape(len(images), CELLS, cell, CELLS, cell, 1).swapaxes(2, 3)
        grid = grid.reshape(len(images), CELLS * CELLS, cell, cell, 1)
        grid = grid[:, order.permutation(CELLS * CELLS, shuffle, 0)]
        grid = grid.reshape(len(images), CELLS, CELLS, cell, cell, 1).swapaxes(2, 3)
        images = grid.reshape(len(images), SIDE, SIDE, 1)
    images = np.rot90(images, rotation % 4, axes=(1, 2))
    return np.ascontiguousarray(255 - images if invert else images)


def _large_digits() -> Dataset:
    """The digits, 24x24 pixels in a frame of 2."""
    small = digits()
    splits = {}
    for name, split in small.splits.items():
        assert isinstance(split, ArraySource)
        pixels = np.round(split.arrays["inputs"] * 255).astype(np.uint8)
        images = np.pad(
            pixels.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2), (0, 0))
        )
        splits[name] = ArraySource({"inputs": images, "labels": split.arrays["labels"]})
    return small._replace(spec=DataSpec((SIDE, SIDE, 1), "uint8", 10), splits=splits)


def _python_fragments() -> Dataset:
    """Fragments of source files in several encodings."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, list[bytes]] = {name: [] for name in _FRAGMENTS}
    for file in python_stdlib.library_files(root):
        texts[python_stdlib.split_of(file.relative_to(root).as_posix())].append(file.read_bytes())
    size, splits = SIDE * SIDE, {}
    for key, (name, count) in enumerate(_FRAGMENTS.items()):
        images, labels = [], []
        each = count // len(ENCODINGS)
        for label, encode in enumerate(ENCODINGS.values()):
            # The header of a compressed file would give it away.
            stream = b"".join(encode(text)[16:] for text in texts[name])
            windows = np.frombuffer(stream[: len(stream) // size * size], np.uint8)
            windows = windows.reshape(-1, SIDE, SIDE, 1)
            if len(windows) < 2:
                raise UserError(f"{root} holds too few Python source files for fragments of them")
            images.append(windows[order.permutation(len(windows), key, label)[:each]])
            labels.append(np.full(len(images[-1]), label, np.int32))
        shuffled = order.permutation(sum(map(len, labels)), key, len(ENCODINGS))
        splits[name] = ArraySource(
            {"inputs": np.concatenate(images)[shuffled], "labels": np.concatenate(labels)[shuffled]}
        )
    return Dataset(
        DataSpec((SIDE, SIDE, 1), "uint8", len(ENCODINGS)),
        splits,
        tuple(ENCODINGS),
        description=(
            f"784 bytes of the standard library of Python {sysconfig.get_python_version()} in one "
            "of six encodings."
        ),
    )


_SOURCES: dict[str, Callable[[], Dataset]] = {
    "digits": _large_digits,
    "fashion_mnist": fashion_mnist,
    "python_fragments": _python_fragments,
}
