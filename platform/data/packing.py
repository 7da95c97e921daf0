"""Packing of documents into rows of one length: short ones padded to it would waste a step.

It is a function of the lengths alone: equal on every process, and after a restart.
"""

from collections.abc import Sequence

import numpy as np


def first_fit(lengths: Sequence[int], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Places items in rows: each into the first row that has room for it.

    Args:
        lengths: [N] length of each item, from 1 to `capacity`.
        capacity: length of a row.

    Returns:
        int64 [N] row of each item and int64 [N] its offset in the row. Takes O(N log N).

    Raises:
        ValueError: an item is empty or longer than a row.

    Example:
        >>> rows, offsets = first_fit([3, 4, 2, 1], capacity=5)
        >>> rows.tolist(), offsets.tolist()
        ([0, 1, 0, 1], [0, 0, 3, 4])
    """
    if any(not 1 <= length <= capacity for length in lengths):
        raise ValueError(f"items of length 1 to {capacity} fit in a row; got {list(lengths)[:9]}")
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    # A tree of maxima: node i holds the most room that any row below it has.
    room = [capacity] * (2 * leaves)
    rows = np.empty(len(lengths), np.int64)
    offsets = np.empty(len(lengths), np.int64)
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        rows[item], offsets[item] = node - leaves, capacity - room[node]
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows, offsets


def pack(documents: Sequence[np.ndarray], context: int, separator: int) -> dict[str, np.ndarray]:
    """Packs documents into rows of next-token predictions.

    A document `d` is read as `separator, d, separator`, so each of its tokens and its end are
    predicted exactly once. Documents with more than `context` predictions are cut into pieces, each
    a segment of its own.

    Args:
        documents: integer tokens [any length] of each.
        context: predictions in a row.
        separator: token before and after each document.

    Returns:
        "inputs", "labels", "segments" (1, 2, ... in each row; 0 is padding), "positions" (from 0 in
        each segment), all int32 [N, T], and "weights" float32 [N, T] (0 is padding).
    """
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    for document in documents:
        whole = np.concatenate([[separator], document, [separator]]).astype(np.int32)
        for start in range(0, len(whole) - 1, context):
            piece = whole[start : start + context + 1]
            pieces.append((piece[:-1], piece[1:]))
    rows, offsets = first_fit([len(inputs) for inputs, _ in pieces], context)
    shape = (int(rows.max(initial=-1)) + 1, context)
    fields = ("inputs", "labels", "segments", "positions")
    packed = {name: np.zeros(shape, np.int32) for name in fields}
    segments = np.zeros(shape[0], np.int32)
    for (inputs, labels), row, offset in zip(pieces, rows, offsets, strict=True):
        place = (row, slice(offset, offset + len(inputs)))
        segments[row] += 1
        packed["inputs"][place], packed["labels"][place] = inputs, labels
        packed["segments"][place] = segments[row]
        packed["positions"][place] = np.arange(len(inputs))
    return packed | {"weights": (packed["segments"] > 0).astype(np.float32)}
