"""Random data of a stated shape, to try out and time runs whose real data are elsewhere.

Nothing can be learnt from them but the examples themselves.
"""

import numpy as np

from lamina.models.spec import DataSpec
from lamina.platform.data import tokens
from lamina.platform.data.dataset import ArraySource, Dataset
from lamina.platform.errors import UserError

_SPLITS = ("train", "validation", "test")


def synthetic_images(
    *,
    shape: tuple[int, ...] = (224, 224, 3),
    classes: int = 1000,
    examples: int = 256,
    held_out: int = 64,
    seed: int = 0,
) -> Dataset:
    """Returns random pixels with random classes; by default of ImageNet's shape.

    Args:
        shape: of one image.
        classes: number of classes.
        examples: training images (256 of the default shape are 38 MB).
        held_out: validation images, and as many test images.
        seed: fixes the values.

    Raises:
        UserError: a size is below 1.
    """
    _check(classes=classes, examples=examples, held_out=held_out, shape=min(shape, default=0))
    splits = {}
    for i, name in enumerate(_SPLITS):
        generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, i]))
        n = examples if name == "train" else held_out
        pixels = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
        labels = generator.integers(0, classes, n, dtype=np.int32)
        splits[name] = ArraySource({"inputs": pixels, "labels": labels})
    return Dataset(
        spec=DataSpec(tuple(shape), "uint8", classes),
        splits=splits,
        description=f"Random pixels {shape} and random labels: for timing, nothing to learn.",
    )


def synthetic_tokens(
    *,
    vocabulary: int = 32_000,
    context: int = 1024,
    examples: int = 1024,
    held_out: int = 64,
    seed: int = 0,
) -> Dataset:
    """Returns uniformly random tokens for next-token prediction.

    Args:
        vocabulary: number of tokens.
        context: tokens predicted per example.
        examples: training examples.
        held_out: validation examples, and as many test examples.
        seed: fixes the values.

    Raises:
        UserError: a size is below 1.
    """
    _check(vocabulary=vocabulary, context=context, examples=examples, held_out=held_out)
    splits = {}
    for i, name in enumerate(_SPLITS):
        generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, i]))
        n = examples if name == "train" else held_out
        stream = generator.integers(0, vocabulary, n * context + 1, dtype=np.int32)
        splits[name] = tokens.WindowSource(stream, context)
    return Dataset(
        spec=DataSpec((context,), "int32", vocabulary),
        splits=splits,
        description=f"Random tokens of a vocabulary of {vocabulary}: for timing, nothing to learn.",
    )


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"data.{name} should be at least 1, not {size}")
