"""A mixture of data sets in fixed shares, with random access."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from lamina.platform import config as configs
from lamina.platform.data import order
from lamina.platform.data.dataset import ArraySource, Dataset, Example, Source
from lamina.platform.errors import UserError

LARGEST_WINDOW = 10_000
"""Positions after which shares must be exact; weights that need more are not round numbers."""


class _Weighted(NamedTuple):
    weight: float = 1.0


def mixture(*, sources: Mapping) -> Dataset:
    """Returns the data sets `sources` mixed in proportion to their weights.

    Training reads each source in its own order, epoch by epoch, at its own pace; over each window
    of positions (3 for weights 2 and 1, 10 for 0.7 and 0.3) the shares are exact. Validation and
    test are those of all sources, one after another.

    Args:
        sources: label -> dict(name=<data set>, weight=<positive number, default 1>, its options).

    Raises:
        UserError: no sources, a wrong name, option or weight, or sources that don't fit one model.
    """
    from lamina.platform.data.table import DATASETS

    if len(sources) < 1:
        raise UserError("data.sources is empty: name at least one data set")
    datasets, weights = {}, {}
    for label, block in sources.items():
        # Only names of the table: nobody is asked for trust in code that this block would name.
        schema = configs.Schema(
            configs.NoSettings, {}, {"source": configs.Kind(DATASETS, shared=_Weighted)}
        )
        try:
            source = configs.resolve({"source": block}, schema, trust=())["source"]
        except UserError as error:
            raise UserError(f"data.sources.{label}: {error}") from error
        options = {k: configs.thaw(v) for k, v in source.items() if k not in ("name", "weight")}
        datasets[label], weights[label] = DATASETS[source["name"]](**options), source["weight"]
    return mix(datasets, weights)


def mix(datasets: Mapping[str, Dataset], weights: Mapping[str, float]) -> Dataset:
    """Returns data sets mixed in proportion to their weights, see `mixture`.

    Raises:
        UserError: the data sets differ in what a model must fit, or a weight isn't positive.
    """
    labels = list(datasets)
    first = datasets[labels[0]]
    for label, dataset in datasets.items():
        ours, theirs = (first.spec, first.label_names), (dataset.spec, dataset.label_names)
        if ours != theirs:
            raise UserError(
                f"the sources {labels[0]!r} and {label!r} don't fit one model: {ours} and {theirs}"
            )
    pattern = interleave([weights[label] for label in labels])
    parts = lambda split: [dataset.splits[split] for dataset in datasets.values()]
    splits: dict[str, Source] = {"train": concatenate(parts("train"), pattern)}
    for split in ("validation", "test"):
        splits[split] = concatenate(parts(split))
    shares = ", ".join(f"{label} {weights[label]:g}" for label in labels)
    descriptions = " ".join(dataset.description for dataset in datasets.values())
    return Dataset(
        spec=first.spec,
        splits=splits,
        label_names=first.label_names,
        decode=first.decode,
        description=f"Mixture with weights {shares}. {descriptions}",
        bytes_per_token=_bytes_per_token(list(datasets.values())),
    )


def interleave(weights: Sequence[float]) -> np.ndarray:
    """Returns the shortest sequence of source numbers with shares exactly as the weights.

    Each position goes to the source that is furthest behind its share, so sources alternate as
    evenly as they can.

    Args:
        weights: positive; taken as fractions with denominators up to 1000.

    Returns:
        int64 [window].

    Raises:
        UserError: a weight isn't positive, or the window would be above `LARGEST_WINDOW`.

    Example:
        >>> interleave([2.0, 1.0]).tolist()
        [0, 1, 0]
    """
    if any(not np.isfinite(weight) or weight <= 0 for weight in weights):
        raise UserError(f"the weights of a mixture should be positive numbers: {list(weights)}")
    exact = [Fraction(weight).limit_denominator(1000) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    window = lcm(*(share.denominator for share in shares))
    if 0 in exact or window > LARGEST_WINDOW:
        raise UserError(
            f"the weights {list(weights)} are exact only over {window} examples (at most "
            f"{LARGEST_WINDOW}): use rounder numbers, such as 7 and 3"
        )
    counts = np.array([int(share * window) for share in shares])
    given = np.zeros(len(counts), np.int64)
    pattern = np.empty(window, np.int64)
    for position in range(window):
        behind = counts * (position + 1) - given * window
        pattern[position] = np.argmax(np.where(given < counts, behind, np.iinfo(np.int64).min))
        given[pattern[position]] += 1
    return pattern


class Concatenation:
    """Sources one after another; with `pattern`, an order that mixes them.

    Args:
        sources: the parts.
        pattern: number of the source at each position of a window, see `interleave`; None reads all
            examples in one order.
    """

    def __init__(self, sources: Sequence[Source], pattern: np.ndarray | None = None):
        self.sources = list(sources)
        self.starts = np.cumsum([0, *map(len, sources)])
        if pattern is not None:
            self.order = Mixing(pattern, [len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        flat = np.asarray(indices)
        if ((flat < 0) | (flat >= len(self))).any():
            raise IndexError(f"an index outside of 0 to {len(self) - 1}")
        which = np.searchsorted(self.starts, flat, side="right") - 1
        result: list[Example] = [{}] * len(flat)
        for k, source in enumerate(self.sources):
            places = np.flatnonzero(which == k)
            wanted = [int(i) for i in flat[places] - self.starts[k]]
            for place, example in zip(places, source.__getitems__(wanted), strict=True):
                result[place] = example
        return result

    def __repr__(self) -> str:
        return f"Concatenation({', '.join(map(repr, self.sources))})"


class MixedArrays(ArraySource):
    """Arrays of several sources, one after another, with an order that mixes them."""

    def __init__(self, arrays: Mapping[str, np.ndarray], mixing: "Mixing"):
        super().__init__(arrays)
        self.order = mixing

    def __getstate__(self) -> dict[str, Any]:
        return {"arrays": super().__getstate__(), "order": self.order}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["arrays"])
        self.order = state["order"]


class Mixing:
    """The order of a mixture: `(seed, first_position, count) -> int64 [count]`.

    Args:
        pattern: number of the source at each position of a window.
        lengths: number of examples of each source.
    """

    def __init__(self, pattern: np.ndarray, lengths: Sequence[int]):
        self._pattern, self._lengths = pattern, list(lengths)

    def __call__(self, seed: int, first_position: int, count: int) -> np.ndarray:
        """Returns the examples at `count` positions; each source keeps its own epochs."""
        window = len(self._pattern)
        positions = np.arange(first_position, first_position + count)
        chosen = self._pattern[positions % window]
        result = np.empty(count, np.int64)
        start = 0
        for k, length in enumerate(self._lengths):
            members = chosen == k
            if members.any():
                earlier = (self._pattern[: first_position % window] == k).sum()
                before = first_position // window * (self._pattern == k).sum() + earlier
                own_seed = order.seed_for(seed, k)
                result[members] = start + order.indices(
                    length, own_seed, int(before), int(members.sum())
                )
            start += length
        return result


def concatenate(sources: Sequence[Source], pattern: np.ndarray | None = None) -> Source:
    """Returns sources one after another, in memory if all are; see `Concatenation`."""
    held = [source for source in sources if type(source) is ArraySource]
    keys = sorted(held[0].arrays) if held else []
    if len(held) < len(sources) or any(sorted(source.arrays) != keys for source in held):
        return Concatenation(sources, pattern)
    arrays = {key: np.concatenate([source.arrays[key] for source in held]) for key in keys}
    if pattern is None:
        return ArraySource(arrays)
    return MixedArrays(arrays, Mixing(pattern, [len(source) for source in sources]))


def _bytes_per_token(datasets: Sequence[Dataset]) -> dict[str, float]:
    """Returns the means over the sources of "validation" and "test", weighted by examples."""
    if not all(dataset.bytes_per_token for dataset in datasets):
        return {}
    result = {}
    for split in ("validation", "test"):
        sizes = [len(dataset.splits[split]) for dataset in datasets]
        values = [dataset.bytes_per_token[split] for dataset in datasets]
        result[split] = float(np.average(values, weights=sizes))
    return result
