"""The magnitude at which trimming cuts, for task vectors that are read in pieces.

It is the k-th largest, exact, and found by counting: a sample tells a narrow range of magnitudes,
and one pass counts what lies above it and each magnitude in it. Should the answer lie outside, or
the range hold too many magnitudes, further passes narrow it down. Nothing is sorted, and memory
doesn't depend on the size. Small tensors, which take less room than the counters, are held instead.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

HELD = 1 << 18
"""Entries of a scope that is held as a whole: as many as a pass has counters, which are 2 MB and
stay in a core's second-level cache."""

_COARSE = 16  # bits of a magnitude that are counted of the sample
_WAVE = 16  # pieces whose equal magnitudes are counted at once

Deltas = Callable[[Any, Sequence[int]], Iterator[tuple[int, list[np.ndarray]]]]
"""(piece, numbers of models) to blocks: (place in the scope, task vectors' entries)."""

Map = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
"""Calls a function for items, one after the other or by several threads."""


class Limit(NamedTuple):
    """What stays of a task vector: larger magnitudes than `value`, and equal ones up to a place.

    Attributes:
        value: a magnitude.
        last: the place of the last entry of this magnitude that stays, or -1.
    """

    value: float
    last: int

    def cut(self, values: np.ndarray, place: int) -> np.ndarray:
        """Sets what doesn't stay to zero, in place.

        Args:
            values: entries of the task vector that follow each other.
            place: of the first of them.
        """
        magnitudes = np.abs(values)
        if place + values.size <= self.last + 1:
            kept = magnitudes >= self.value
        else:
            kept = magnitudes > self.value
            equal = max(self.last + 1 - place, 0)
            kept[:equal] |= magnitudes[:equal] == self.value
        return np.multiply(values, kept, out=values)


NOTHING = Limit(math.inf, -1)
"""Nothing stays."""


def find(
    pieces: Sequence[Any],
    samples: Sequence[Any],
    deltas: Deltas,
    mapped: Map,
    keep: int,
    models: int,
    work: np.dtype,
) -> list[Limit]:
    """Finds the limit of each model for one scope: a tensor, or all of them.

    Args:
        pieces: of the scope, in the order in which equal magnitudes count.
        samples: parts of them.
        deltas: reads task vectors.
        mapped: how to go through pieces.
        keep: how many entries stay.
        models: how many task vectors there are.
        work: float32 or float64.
    """
    if keep <= 0:
        return [NOTHING] * models
    key = np.dtype(np.uint32 if work == np.float32 else np.uint64)
    top = 1 << (8 * key.itemsize - 1)
    everyone = list(range(models))
    size = sum(piece.last - piece.first for piece in pieces)
    if size <= HELD:
        held = [block for piece in pieces for _, block in deltas(piece, everyone)]
        each = (np.concatenate(blocks) for blocks in zip(*held, strict=True))
        return [_of_held(np.abs(values).view(key), keep, work) for values in each]
    whole = [_Range(0, top)] * models
    counted = _count(samples, deltas, mapped, dict(zip(everyone, whole, strict=True)), key, _COARSE)
    ranges = {t: _guess(counted[t], keep / size, top) for t in everyone}
    found: dict[int, tuple[int, int, int]] = {}
    while ranges:
        counted = _count(pieces, deltas, mapped, ranges, key)
        for t, (above, bins) in counted.items():
            span = ranges[t]
            inside = int(bins.sum())
            if keep <= above:
                ranges[t] = _Range(span.high, top)
            elif keep > above + inside:
                ranges[t] = _Range(0, span.low)
            else:
                from_top = np.cumsum(bins[::-1])
                position = bins.size - 1 - int(np.searchsorted(from_top, keep - above))
                larger = above + int(from_top[bins.size - 1 - position]) - int(bins[position])
                low = span.low + (position << span.shift())
                if span.shift():
                    ranges[t] = _Range(low, min(low + (1 << span.shift()), span.high))
                else:
                    del ranges[t]
                    found[t] = (low, keep - larger, int(bins[position]))
    limits = []
    for t in everyone:
        low, room, equal = found[t]
        value = float(np.asarray(low, key).view(work))
        last = (1 << 62) if room == equal else _last(pieces, deltas, mapped, t, value, room)
        limits.append(Limit(value, last))
    return limits


def _of_held(magnitudes: np.ndarray, keep: int, work: np.dtype) -> Limit:
    """The limit of a scope whose magnitudes, as integers, are all here."""
    place = magnitudes.size - keep
    limit = np.partition(magnitudes, place)[place]
    room = keep - int(np.count_nonzero(magnitudes > limit))
    return Limit(float(limit.view(work)), int(np.flatnonzero(magnitudes == limit)[room - 1]))


class _Range(NamedTuple):
    """Magnitudes as integers: the bits of a float without its sign."""

    low: int
    high: int

    def shift(self, bits: int = 18) -> int:
        """By how much magnitudes are shifted, so that the counters suffice."""
        return max((self.high - self.low - 1).bit_length() - bits, 0)


def _count(
    pieces: Sequence[Any],
    deltas: Deltas,
    mapped: Map,
    ranges: dict[int, _Range],
    key: np.dtype,
    bits: int = 18,
) -> dict[int, tuple[int, np.ndarray]]:
    """For each model: how many magnitudes lie above its range, and how often each within."""
    top = 1 << (8 * key.itemsize - 1)
    reached = dict.fromkeys(ranges, 0)
    bins = {t: np.zeros(1 << bits, np.int64) for t in ranges}
    lock = threading.Lock()

    def one(piece: Any) -> None:
        for _, block in deltas(piece, tuple(ranges)):
            for (t, span), values in zip(ranges.items(), block, strict=True):
                magnitudes = np.abs(values, out=values).view(key)
                # What lies below the range wraps around to numbers that no magnitude has.
                magnitudes -= key.type(span.low)
                count = int(np.count_nonzero(magnitudes < key.type(top - span.low)))
                inside = magnitudes[magnitudes < key.type(span.high - span.low)]
                inside >>= key.type(span.shift(bits))
                with lock:
                    reached[t] += count
                    np.add.at(bins[t], inside, 1)

    mapped(one, pieces)
    return {t: (reached[t] - int(bins[t].sum()), bins[t]) for t in ranges}


def _guess(counted: tuple[int, np.ndarray], fraction: float, top: int) -> _Range:
    """A range that holds the answer, if the sample is like the whole."""
    _, bins = counted
    size = int(bins.sum())
    margin = 4 * math.sqrt(size) / size + 0.003 if size else 1.0
    from_top = np.cumsum(bins[::-1])
    ranks = (np.clip([fraction - margin, fraction + margin], 0, 1) * size).astype(np.int64)
    high, low = (bins.size - 1 - int(np.searchsorted(from_top, rank)) for rank in ranks)
    width = top // bins.size
    return _Range(max(low, 0) * width, min((high + 1) * width, top) if high >= 0 else top)


def _last(
    pieces: Sequence[Any], deltas: Deltas, mapped: Map, model: int, value: float, room: int
) -> int:
    """The place of the `room`-th entry whose magnitude is `value`."""

    def equal(piece: Any) -> int:
        blocks = deltas(piece, (model,))
        return sum(int(np.count_nonzero(np.abs(block[0]) == value)) for _, block in blocks)

    for first in range(0, len(pieces), _WAVE):
        wave = pieces[first : first + _WAVE]
        for piece, count in zip(wave, mapped(equal, wave), strict=True):
            if count < room:
                room -= count
                continue
            for place, (values,) in deltas(piece, (model,)):
                found = np.flatnonzero(np.abs(values) == value)
                if found.size >= room:
                    return place + int(found[room - 1])
                room -= found.size
    raise AssertionError("the entries have changed while they were counted")
