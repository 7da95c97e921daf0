"""What a model must fit, and what it answers: the two records shared by all models."""

from typing import NamedTuple

import jax


class DataSpec(NamedTuple):
    """What a model must fit.

    Attributes:
        input_shape: the shape of one example, without the batch: ``(28, 28, 1)`` for images
            (height, width, channels), ``(64,)`` for vectors, ``(T,)`` for tokens.
        input_dtype: ``"float32"``, ``"uint8"`` or ``"int32"``. Images stored as uint8 reach the
            model as float32 in [0, 1].
        outputs: the number of classes, the size of the vocabulary, or the number of regression
            targets.
    """

    input_shape: tuple[int, ...]
    input_dtype: str
    outputs: int


class Output(NamedTuple):
    """What a model answers.

    Attributes:
        logits: float32, ``[B, outputs]``, or ``[B, T, outputs]`` for sequences.
        features: the input of the head (``[B, D]`` or ``[B, T, D]``), in the compute dtype; None
            for a module that does not tell.
        similarity: float32 ``[B]``, of an example and the prompts it chose; None for a model
            without a pool of prompts.
    """

    logits: jax.Array
    features: jax.Array | None = None
    similarity: jax.Array | None = None


def require_image(spec: DataSpec, model: str) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the spec.

    Raises:
        ValueError: the examples are no images.
    """
    if len(spec.input_shape) != 3:
        raise ValueError(
            f"{model} needs images of shape (height, width, channels), but one example has shape "
            f"{tuple(spec.input_shape)}. For vectors use mlp, for tokens transformer."
        )
    height, width, channels = spec.input_shape
    return height, width, channels


def require_sizes(dropout: float, **sizes: int | tuple[int, ...]) -> None:
    """Refuses a model's sizes below 1, and a dropout that isn't a rate.

    Raises:
        ValueError: it names the option.
    """
    for name, size in sizes.items():
        if any(each < 1 for each in (size if isinstance(size, tuple) else (size,))):
            raise ValueError(f"{name}={size} must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is a rate: it must lie in [0, 1)")
