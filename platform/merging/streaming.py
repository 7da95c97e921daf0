"""Leaf-wise merging of tensors that are read and written in pieces, on the host, by numpy.

Workers take one piece after the other, each reading, computing and writing, so that these overlap
and memory is bounded by workers x pieces, whatever the size of the models. What is computed of a
piece depends on its place alone: the result is the same for any number of workers.
"""

import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lamina.platform.errors import UserError
from lamina.platform.merging import limits, random
from lamina.platform.merging.method import Drop, Method, Trim, count_kept
from lamina.platform.merging.sources import FLOATS, Source

PIECE = 1 << 20
"""Elements that a worker reads at once: 2 MB of a model in bfloat16."""

BLOCK = 1 << 17
"""Elements that are computed at once: enough that threads seldom wait for each other's turn at the
interpreter, few enough that a block's arrays stay in the caches."""

SAMPLE = 1 << 16
"""Elements of each piece by which trimming guesses its limit."""


class Unit(NamedTuple):
    """A tensor, or one layer of a stack: what methods per tensor look at.

    Attributes:
        name: of the tensor.
        first: its first element in the flattened tensor.
        last: its end.
        merged: whether it holds floating-point numbers.
        work: the dtype to compute in.
    """

    name: str
    first: int
    last: int
    merged: bool
    work: np.dtype


class Piece(NamedTuple):
    """A part of a unit: the elements `first` to `last` of the flattened tensor."""

    number: int
    unit: int
    first: int
    last: int


Write = Callable[[str, int, np.ndarray], None]
"""Stores elements of a merged tensor, from a place of the flattened tensor on."""


class Plan(NamedTuple):
    """What is merged, cut into pieces.

    Attributes:
        sources: the base first, if the method has one, then the models.
        base: whether the first source is the base.
        units: in the order in which they count: by the parts of their names.
        pieces: in the same order.
    """

    sources: Sequence[Source]
    base: bool
    units: list[Unit]
    pieces: list[Piece]

    def read(self, piece: Piece, chosen: Sequence[int] | None = None) -> list[np.ndarray]:
        """Reads a piece of every source, or of the sources with these numbers."""
        name = self.units[piece.unit].name
        sources = self.sources if chosen is None else [self.sources[n] for n in chosen]
        return [source.tensors[name].flat(piece.first, piece.last) for source in sources]

    def merged_pieces(self) -> list[Piece]:
        """The pieces of floating-point tensors."""
        return [piece for piece in self.pieces if self.units[piece.unit].merged]


def plan(sources: Sequence[Source], base: bool, *, whole: bool = False) -> Plan:
    """Cuts the tensors of sources that fit each other into pieces.

    Args:
        sources: the base first, if there is one.
        base: whether there is one.
        whole: whether a unit is one piece.
    """
    units, pieces = [], []
    axes = sources[0].axes
    for name in sorted(sources[0].tensors, key=lambda name: name.split("/")):
        tensors = [source.tensors[name] for source in sources]
        size, shape = tensors[0].size, tensors[0].shape
        merged = tensors[0].dtype in FLOATS
        wide = any(tensor.dtype == np.float64 for tensor in tensors)
        layers = shape[0] if axes.get(name, ())[:1] == ("layers",) and merged else 1
        step = size // max(layers, 1)
        for layer in range(layers):
            first, last = layer * step, (layer + 1) * step
            unit = Unit(name, first, last, merged, np.dtype(np.float64 if wide else np.float32))
            length = max(step, 1) if whole and merged else PIECE
            for start in range(first, last, length):
                pieces.append(Piece(len(pieces), len(units), start, min(start + length, last)))
            units.append(unit)
    return Plan(sources, base, units, pieces)


def merge(
    method: Method,
    planned: Plan,
    weights: np.ndarray,
    dtype: Callable[[str], np.dtype],
    write: Write,
    progress: Callable[[int], None],
) -> list[np.ndarray]:
    """Merges all pieces.

    Args:
        method: leaf-wise.
        planned: the sources, cut into pieces.
        weights: one for each model; normalised if the method asks for it.
        dtype: of a tensor of the output, by its name.
        write: called from several threads.
        progress: called with the number of elements that a pass has gone through.

    Returns:
        For each source the CRC-32 of each piece as it was read, uint32 [pieces].

    Raises:
        UserError: a tensor holds NaN or infinities, or the result is too large for its dtype.
    """
    _keep_freed_memory()
    state = _State(method, planned, weights)
    with np.errstate(all="ignore"):  # what isn't finite is looked for in the result
        state.prepare(progress)
    checks = [np.zeros(len(planned.pieces), np.uint32) for _ in planned.sources]

    def one(piece: Piece) -> None:
        unit = planned.units[piece.unit]
        contents = planned.read(piece)
        for check, content in zip(checks, contents, strict=True):
            check[piece.number] = zlib.crc32(content.view(np.uint8).data)
        target = dtype(unit.name)
        merged = state.combine(piece, contents, target) if unit.merged else contents[0]
        write(unit.name, piece.first, merged)
        progress(piece.last - piece.first)

    run(one, planned.pieces, 1 if method.whole else None)
    return checks


def rescales(method: Method) -> bool:
    """Tells whether a method restores the sum of magnitudes of what it drops from."""
    return isinstance(method.prune, Drop) and method.prune.rescale == "l1"


def passes(method: Method) -> int:
    """How often a method goes through all elements, for the progress."""
    trims = isinstance(method.prune, Trim)
    measures = method.measure is not None or rescales(method)
    return 1 + trims + (method.vote is not None) + measures


def run(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int | None = None
) -> list[Any]:
    """Calls a function for each item, in order, by several threads; returns the results in order.

    The first error ends it.
    """
    workers = workers or min(max(os.cpu_count() or 1, 2), 8)
    results: list[Any] = [None] * len(items)
    numbers = iter(range(len(items)))
    lock = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        while not failed.is_set():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                with np.errstate(all="ignore"):  # a setting of each thread
                    results[number] = function(items[number])
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in [*done, *futures]:
                future.result()
        except BaseException:  # an interrupt too: the threads end after their pieces
            failed.set()
            raise
    return results


def _keep_freed_memory() -> None:
    """Lets the C library reuse the arrays of a block instead of returning them to the system.

    glibc returns a freed array at once if it is larger than the largest that was freed so before,
    up to 32 MB (mallopt(3), "dynamic mmap threshold"), and page faults would cost as much as the
    arithmetic. What is allocated here is never touched.
    """
    np.empty(30 << 20, np.uint8)


class _State:
    """What is known of a method's numbers before the last pass."""

    def __init__(self, method: Method, planned: Plan, weights: np.ndarray):
        self.method, self.plan, self.weights = method, planned, weights
        self.numbers: list[Any] = [None] * len(planned.units)
        self.limits: list[list[limits.Limit]] = []  # by unit
        # Where a unit begins in what trimming looks at: the unit itself, or all of them.
        self.starts = [0] * len(planned.units)
        if isinstance(method.prune, Drop):
            paths = [unit.name for unit in planned.units]
            self.keys = random.tensor_keys(method.prune.seed, paths, len(planned.sources) - 1)

    def prepare(self, progress: Callable[[int], None]) -> None:
        """Goes through the data as often as the method needs before it can be merged."""
        method = self.method
        pieces = self.plan.merged_pieces()
        if isinstance(method.prune, Trim):
            self._find_limits(method.prune, pieces, progress)
        if method.vote is not None:
            total = sum(self._sums(pieces, self._vote, progress))
            self.numbers = [total] * len(self.plan.units)
        if method.settle is None:
            return
        measure = self._measure if method.measure is not None else self._magnitudes
        if method.measure is None and not rescales(method):
            self.numbers = [method.settle(np, None, self.weights)] * len(self.plan.units)
            return
        by_unit: dict[int, Any] = {}
        for piece, value in zip(pieces, self._sums(pieces, measure, progress), strict=True):
            by_unit[piece.unit] = by_unit.get(piece.unit, 0) + value
        for unit, sums in by_unit.items():
            self.numbers[unit] = method.settle(np, sums, self.weights)

    def _find_limits(self, trim: Trim, pieces: list[Piece], progress) -> None:
        units, models = self.plan.units, len(self.plan.sources) - 1
        size = lambda unit: unit.last - unit.first
        if not trim.per_tensor:
            ends = np.cumsum([size(unit) if unit.merged else 0 for unit in units])
            self.starts = [0, *map(int, ends[:-1])]
        beginning = lambda piece: piece._replace(last=min(piece.first + SAMPLE, piece.last))

        def search(scope: list[Piece], mapped: Any) -> list[limits.Limit]:
            # The beginnings of the pieces are the sample.
            whole = sum(piece.last - piece.first for piece in scope)
            keep, work = count_kept(whole, trim.density), units[scope[0].unit].work
            samples = [beginning(piece) for piece in scope]
            found = limits.find(scope, samples, self._deltas, mapped, keep, models, work)
            progress(whole)
            return found

        if not trim.per_tensor:
            wide = any(unit.work == np.float64 for unit in units if unit.merged)
            if wide:  # magnitudes of different widths have no common order of bits
                units[:] = [unit._replace(work=np.dtype(np.float64)) for unit in units]
            self.limits = [search(pieces, run)] * len(units) if pieces else []
            return
        scopes: dict[int, list[Piece]] = {}
        for piece in pieces:
            scopes.setdefault(piece.unit, []).append(piece)
        largest_first = sorted(scopes, key=lambda unit: (-size(units[unit]), unit))
        one_by_one = lambda function, items: [function(item) for item in items]
        found = run(lambda unit: search(scopes[unit], one_by_one), largest_first)
        by_unit = dict(zip(largest_first, found, strict=True))
        self.limits = [by_unit.get(number, []) for number in range(len(units))]

    def _deltas(self, piece: Piece, models: Sequence[int]):
        """Task vectors, block by block: (place in the scope, [T] arrays)."""
        unit = self.plan.units[piece.unit]
        base, *tuned = self.plan.read(piece, (0, *(1 + number for number in models)))
        start = self.starts[piece.unit] + piece.first - unit.first
        for first in range(0, piece.last - piece.first, BLOCK):
            block = slice(first, first + BLOCK)
            below = base[block].astype(unit.work)
            values = [model[block].astype(unit.work) for model in tuned]
            yield start + first, [np.subtract(value, below, out=value) for value in values]

    def _blocks(self, piece: Piece, contents: list[np.ndarray]):
        """What is merged, block by block: (models' entries or pruned task vectors, base)."""
        unit, prune = self.plan.units[piece.unit], self.method.prune
        for first in range(0, piece.last - piece.first, BLOCK):
            values = [c[first : first + BLOCK].astype(unit.work) for c in contents]
            base = values.pop(0) if self.plan.base else None
            if prune is not None:
                values = [np.subtract(value, base, out=value) for value in values]
            if isinstance(prune, Trim):
                place = self.starts[piece.unit] + piece.first - unit.first + first
                cuts = self.limits[piece.unit]
                values = [c.cut(value, place) for c, value in zip(cuts, values, strict=True)]
            if isinstance(prune, Drop):
                before = [np.abs(value).sum() for value in values] if rescales(self.method) else []
                random.drop(prune, self.keys[piece.unit], piece.first + first, values)
                yield values, base, before
                continue
            yield values, base, []

    def _sums(self, pieces: list[Piece], function: Callable[..., Any], progress) -> list[Any]:
        """Adds up over the blocks of each piece, in float64."""

        def one(piece: Piece) -> Any:
            contents = self.plan.read(piece)
            value = sum(function(*block) for block in self._blocks(piece, contents))
            progress(piece.last - piece.first)
            return value

        return run(one, pieces)

    def _vote(self, values, base, before) -> np.ndarray:
        assert self.method.vote is not None
        sums = self.method.vote(np, values, self.weights.astype(values[0].dtype))
        return np.asarray(sums, np.float64)

    def _measure(self, values, base, before) -> np.ndarray:
        assert self.method.measure is not None
        return self.method.measure(np, values, base).astype(np.float64)

    def _magnitudes(self, values, base, before) -> np.ndarray:
        return np.asarray([before, [np.abs(value).sum() for value in values]], np.float64)

    def combine(self, piece: Piece, contents: list[np.ndarray], target: np.dtype) -> np.ndarray:
        """Returns the merged elements of a piece.

        Raises:
            UserError: an input isn't finite, or the result is too large for its dtype.
        """
        method, unit = self.method, self.plan.units[piece.unit]
        weights = self.weights.astype(unit.work)
        if method.whole is not None:
            return self._whole(unit, contents, weights, target)
        numbers = self.numbers[piece.unit]
        numbers = None if numbers is None else np.asarray(numbers, unit.work)
        merged = np.empty(piece.last - piece.first, target)
        place, finite = 0, True
        for values, base, _ in self._blocks(piece, contents):
            assert method.combine is not None
            result = method.combine(np, values, base, weights, numbers)
            finite = finite and bool(np.isfinite(result.sum()))
            merged[place : place + result.size] = result
            place += result.size
        # A sum may overflow where no entry does: then a closer look decides.
        if not finite or unit.work != target:
            self._check(unit, contents, merged, finite)
        return merged

    def _whole(self, unit: Unit, contents, weights, target) -> np.ndarray:
        assert self.method.whole is not None
        tensor = self.plan.sources[0].tensors[unit.name]
        two = len(tensor.shape) == 2  # what has more may be a stack, or a kernel of any layout
        axes = self.plan.sources[0].axes.get(unit.name, (None, None) if two else ())
        layers = axes[:1] == ("layers",)
        shape = tensor.shape[1:] if layers else tensor.shape
        base, *models = (c.astype(unit.work).reshape(shape) for c in contents)
        try:
            merged = self.method.whole(np, models, base, weights, axes[1:] if layers else axes)
        except np.linalg.LinAlgError:
            merged = np.full(shape, np.nan)
        merged = np.asarray(merged).reshape(-1).astype(target)
        self._check(unit, contents, merged, False)
        return merged

    def _check(self, unit: Unit, contents, merged: np.ndarray, finite: bool) -> None:
        """Raises if an input or the result isn't finite."""
        wide = merged.dtype.itemsize >= 4 or merged.dtype == ml_dtypes.bfloat16
        if finite and wide:
            return
        for source, content in zip(self.plan.sources, contents, strict=True):
            bad = content.size - int(np.isfinite(content.astype(unit.work)).sum())
            if bad:
                raise UserError(f"{source.path}: {unit.name!r} holds NaN or infinities")
        if not np.isfinite(merged.astype(unit.work)).all():
            raise UserError(f"merged, {unit.name!r} is too large for {merged.dtype}")
