"""Rows of packed documents to data ranks of equal work.

Rows of the same length don't cost the same: attention within a document grows with its square, and
a step lasts as long as its slowest rank. So rows go to ranks by their cost, not by their count (the
idea behind FlexSP, Wang et al. 2024, arXiv 2412.01523, ByteScale, Ge et al. 2025, arXiv 2502.21231,
and Zeppelin, Chen et al. 2025, arXiv 2509.21841; those also split long documents over several
ranks). All of it is a function of the lengths alone: equal on every process, and after a restart.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lamina.platform.data.batches import order_of
from lamina.platform.data.dataset import Example, Held, Source
from lamina.platform.errors import UserError


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


class BalancedRows:
    """Packed rows in an order that gives the data ranks of every batch equal work.

    Each batch is the same set of rows as without, so that losses and gradients are equal up to
    rounding (but for what is drawn by a row's place in the batch, such as dropout).

    Args:
        source: packed rows in memory.
        batch_size: rows of a global batch.
        ranks: parts into which the mesh splits a batch.
        accumulation: parts into which each rank's rows are cut, row i going to part i modulo it:
            these are computed one after another, so each of them is balanced.
        length: as `linear` of `row_costs`.

    Raises:
        UserError: the rows have no segments, or aren't in memory.
    """

    def __init__(
        self, source: Source, batch_size: int, ranks: int, accumulation: int, length: float
    ):
        if not isinstance(source, Held) or "segments" not in source.arrays:
            raise UserError(
                f"data.balance_length = {length:g} is for packed documents in memory, and "
                f"{source!r} has no 'segments': leave it at 0, or pack (data.packed=True of 'text')"
            )
        self._source, self._batch_size = source, batch_size
        self._ranks, self._accumulation = ranks, accumulation
        self._costs = row_costs(np.asarray(source.arrays["segments"]), linear=length)
        self.gather = source.gather

    @property
    def arrays(self) -> Mapping[str, Any]:
        """The source's own arrays."""
        return self._source.arrays

    def order(self, seed: int, first_position: int, count: int) -> np.ndarray:
        """Returns the source's order, int64 [count], rearranged within each batch.

        Raises:
            ValueError: the positions are no whole batches.
        """
        if first_position % self._batch_size or count % self._batch_size:
            raise ValueError(f"positions should be whole batches of {self._batch_size}")
        chosen = order_of(self._source)(seed, first_position, count)
        chosen = chosen.reshape(-1, self._batch_size)
        return np.concatenate([self._arranged(batch) for batch in chosen])

    def _arranged(self, batch: np.ndarray) -> np.ndarray:
        places = balance(self._costs[batch], self._ranks * self._accumulation)
        places = places.reshape(self._ranks, self._accumulation, -1).swapaxes(1, 2)
        return batch[places.ravel()]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return self._source[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        return self._source.__getitems__(indices)

    def __repr__(self) -> str:
        return f"BalancedRows({self._source!r})"


def step_time(costs: Sequence[float] | np.ndarray, ranks: int) -> float:
    """Returns the cost of the dearest rank of a batch that is split along the data axis."""
    return float(np.asarray(costs, np.float64).reshape(ranks, -1).sum(1).max())
