"""Packing of documents into rows of one length, and rows to ranks of equal work.

Short documents padded to a row's length waste a step; packed rows don't. But rows of the same
length don't cost the same: attention within a document grows with its square, and a step lasts as
long as its slowest rank. So rows go to ranks by their cost, not by their count (the idea behind
FlexSP, Wang et al. 2024, arXiv 2412.01523, ByteScale, Ge et al. 2025, arXiv 2502.21231, and
Zeppelin, Chen et al. 2025, arXiv 2509.21841; those also split long documents over several ranks).
All of it is a function of the lengths alone: equal on every process, and after a restart.
"""

import heapq
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


def row_costs(segments: np.ndarray, *, linear: float) -> np.ndarray:
    """Returns what rows of packed documents cost, in units of one token's attention to one other.

    A document of n tokens costs n (linear + n): the work for each token, and causal attention.

    Args:
        segments: int [N, T], as `pack` gives them; 0 is padding, which costs nothing where kernels
            skip it.
        linear: the length at which attention costs as much as all else. For a transformer of width
            D with an MLP of 4 D (or 8/3 D, gated) that is 12 D: a token's matrix products take
            24 D^2 operations a layer, its causal attention to a document of n tokens 2 D n.

    Returns:
        float64 [N].
    """
    tokens = (segments > 0).sum(1).astype(np.float64)
    squares = np.zeros(len(segments))
    for segment in range(1, int(segments.max(initial=0)) + 1):
        squares += (segments == segment).sum(1).astype(np.float64) ** 2
    return linear * tokens + squares


def balance(costs: Sequence[float] | np.ndarray, ranks: int) -> np.ndarray:
    """Assigns the rows of a batch to ranks of nearly equal cost.

    The dearest row that is left goes to the cheapest rank that has room (Graham 1969, with equal
    counts); equal ones in their order.

    Args:
        costs: [N] of each row; N is a multiple of `ranks`.
        ranks: number of data ranks.

    Returns:
        int64 [N]: a permutation of the rows; rank r takes the r-th N / ranks of them, which is what
        a batch that is split along the data axis gives it. The batch is the same set of rows, so
        its loss and gradient are too.

    Raises:
        ValueError: the rows can't be split evenly.

    Example:
        >>> balance([9, 1, 8, 2], ranks=2).tolist()
        [0, 1, 2, 3]
        >>> balance([9, 8, 1, 2], ranks=2).tolist()
        [0, 2, 1, 3]
    """
    values = np.asarray(costs, np.float64)
    if ranks < 1 or len(values) % ranks:
        raise ValueError(f"{len(values)} rows can't be split evenly over {ranks} ranks")
    room = len(values) // ranks
    taken: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, rank) for rank in range(ranks)]
    for row in np.argsort(-values, kind="stable").tolist():
        cost, rank = heapq.heappop(heap)
        taken[rank].append(row)
        if len(taken[rank]) < room:
            heapq.heappush(heap, (cost + float(values[row]), rank))
    return np.array([row for rows in taken for row in sorted(rows)], np.int64)


def step_time(costs: Sequence[float] | np.ndarray, ranks: int) -> float:
    """Returns the cost of the dearest rank of a batch that is split along the data axis."""
    return float(np.asarray(costs, np.float64).reshape(ranks, -1).sum(1).max())
