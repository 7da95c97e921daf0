"""Next-token examples cut from a stream of tokens, and text as bytes."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lamina.platform.data.dataset import Example
from lamina.platform.errors import UserError

BYTES = 256
"""Vocabulary of text as bytes; byte 0, which text doesn't contain, separates documents."""

SEPARATOR = 0


class WindowSource:
    """Windows of `context` next-token predictions over one stream of tokens.

    Window `i` predicts the tokens at `i * stride + 1` to `i * stride + context`, so windows with
    the default stride predict each token after the first exactly once. Examples are
    "inputs" and "labels" int32 [T] and, with `whole`, "weights" float32 [T].

    Args:
        tokens: [N] unsigned bytes or int32.
        context: predictions in a window.
        stride: tokens from one window's start to the next; 0 is `context`. Smaller windows'
            strides give more training examples, which overlap.
        whole: keep the last, partial window, padded with weight 0 (for evaluation); otherwise it
            is dropped, and there are no weights.

    Raises:
        UserError: the stream is too short for one window.
    """

    def __init__(self, tokens: np.ndarray, context: int, *, stride: int = 0, whole: bool = False):
        if context < 1 or stride < 0:
            raise UserError(
                f"context = {context} should be at least 1, stride = {stride} at least 0"
            )
        self.context, self.stride, self.whole = context, stride or context, whole
        self.predicted = len(tokens) - 1
        if whole:
            self._windows = max(0, -(-max(self.predicted - context, 0) // self.stride) + 1)
        else:
            self._windows = (self.predicted - context) // self.stride + 1
        if self.predicted < 1 or self._windows < 1:
            raise UserError(
                f"{len(tokens)} tokens are too few for a window of context = {context}: "
                "give more text or a smaller context"
            )
        end = (self._windows - 1) * self.stride + context + 1
        padding = np.zeros(max(0, end - len(tokens)), tokens.dtype)
        self.arrays = {"tokens": np.concatenate([tokens, padding]) if len(padding) else tokens}

    def gather(self, arrays: Any, indices: Any) -> dict[str, Any]:
        """Returns the windows at `indices` (any shape), from numpy or jax arrays."""
        within = np.arange(self.context + 1, dtype=np.int32).reshape((1,) * indices.ndim + (-1,))
        positions = indices[..., None] * self.stride + within
        window = arrays["tokens"][positions].astype(np.int32)
        batch = {"inputs": window[..., :-1], "labels": window[..., 1:]}
        if self.whole:
            batch["weights"] = (positions[..., :-1] < self.predicted).astype(np.float32)
        return batch

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.gather(self.arrays, np.asarray(index % len(self)))

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        return [self[i] for i in indices]

    def __repr__(self) -> str:
        return f"WindowSource({self.predicted + 1} tokens, context={self.context})"


def join(documents: Iterable[bytes]) -> np.ndarray:
    """Returns the bytes of all documents, with a separator before the first and after each."""
    separator = bytes([SEPARATOR])
    return np.frombuffer(separator + b"".join(d + separator for d in documents), np.uint8)


def decode_bytes(tokens: Sequence[int]) -> str:
    """Returns the text of byte tokens; separators become form feeds, bad UTF-8 is replaced."""
    raw = bytes(int(token) for token in tokens)
    return raw.replace(bytes([SEPARATOR]), b"\f").decode("utf-8", "replace")
