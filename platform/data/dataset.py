"""What a data set is: named splits of random-access examples, and what a model must know."""

import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lamina.models.spec import DataSpec
from lamina.platform.data import order
from lamina.platform.errors import UserError

Example = dict[str, np.ndarray]


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split.

    A source may also be `Held`, and may have a method `order(seed, first_position, count) -> int64
    [count]`: its own endless order of examples in place of `order.indices` (a mixture has one). It
    must be picklable if worker processes shall read it.
    """

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Returns one example: name to array, without a batch dimension."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Returns several examples at once."""
        ...


@runtime_checkable
class Held(Source, Protocol):
    """A source whose examples are in arrays, so that it can be held on the device.

    Attributes:
        arrays: name to array.
    """

    arrays: Mapping[str, Any]

    def gather(self, arrays: Mapping[str, Any], indices: Any) -> dict[str, Any]:
        """Returns the batch of the examples at `indices` (any shape).

        Pure, and for numpy and jax arrays alike; `arrays` are the source's own, wherever they are.
        """
        ...


class Dataset(NamedTuple):
    """A data set, as its factory returns it.

    Attributes:
        spec: what a model must fit.
        splits: "train", "validation" and "test".
        label_names: name of each class, or () where labels are not classes.
        decode: token ids -> text, for data sets of text.
        description: one paragraph for the report: what it is, where from, how it was split.
        bytes_per_token: for text, bytes of text per predicted token of each split; it turns a loss
            into bits per byte.
    """

    spec: DataSpec
    splits: Mapping[str, Source]
    label_names: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None
    description: str = ""
    bytes_per_token: Mapping[str, float] = {}


class ArraySource:
    """Examples held as arrays of one length.

    Args:
        arrays: name to array [N, ...]; `np.memmap`s are reopened, not copied, in workers.

    Raises:
        UserError: there are no arrays, or their lengths differ.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        lengths = {name: len(array) for name, array in arrays.items()}
        if not lengths or len(set(lengths.values())) != 1:
            raise UserError(f"the arrays of a split must have one length, got {lengths}")
        self.arrays = dict(arrays)

    @staticmethod
    def gather(arrays: Mapping[str, Any], indices: Any) -> dict[str, Any]:
        """Returns the examples at `indices` (any shape); numpy arrays and jax arrays alike."""
        return {name: array[indices] for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: np.asarray(array[index]) for name, array in self.arrays.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        return [self[i] for i in indices]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k}: {v.dtype}{list(v.shape)}" for k, v in self.arrays.items())
        return f"ArraySource({shapes})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: _Mapped.of(array) for name, array in self.arrays.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.arrays = {
            name: np.load(value.path, mmap_mode="r") if isinstance(value, _Mapped) else value
            for name, value in state.items()
        }


class _Mapped(NamedTuple):
    """Stands for a whole memory-mapped .npy file in a pickle."""

    path: str

    @classmethod
    def of(cls, array: np.ndarray) -> "_Mapped | np.ndarray":
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
            return cls(str(array.filename))
        return array


class Subset:
    """Some examples of another source, in a given order.

    Args:
        source: where the examples are.
        indices: int [N], which ones.
    """

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        return self.source.__getitems__([int(i) for i in self.indices[list(indices)]])

    def __repr__(self) -> str:
        return f"Subset({len(self)} of {self.source!r})"


def subset(source: Source, indices: np.ndarray) -> Source:
    """Returns the examples of `source` at `indices`; in memory if `source` is."""
    if isinstance(source, ArraySource) and not any(
        isinstance(array, np.memmap) for array in source.arrays.values()
    ):
        at = np.asarray(indices)
        if len(at) and at[0] >= 0 and np.all(np.diff(at) == 1):  # neighbours need no copy
            at = slice(at[0], at[-1] + 1)
        return ArraySource(source.gather(source.arrays, at))
    return Subset(source, indices)


def stratified(labels: np.ndarray, fractions: Sequence[float], key: int) -> list[np.ndarray]:
    """Splits examples so that each part has its fraction of every class.

    Args:
        labels: int [N], class of each example.
        fractions: share of each part; they sum to 1.
        key: fixes the draw.

    Returns:
        For each part the sorted int64 indices of its examples; each example is in exactly one.
    """
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[order.permutation(len(members), key, int(label))]
        cuts = np.round(np.cumsum(fractions)[:-1] * len(members)).astype(int)
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


def with_held_out(
    splits: Mapping[str, Source], validation: float, test: float, key: int = 0
) -> dict[str, Source]:
    """Makes the missing "validation" and "test" splits from fractions of "train".

    Args:
        splits: has "train"; may have the others, which are then kept as they are.
        validation: fraction of "train" for a missing "validation".
        test: fraction of "train" for a missing "test".
        key: fixes the draw.

    Returns:
        The three splits; each example of the given "train" is in exactly one.

    Raises:
        UserError: there is no "train", or a fraction leaves a split without examples.
    """
    if "train" not in splits:
        raise UserError(f"a data set needs a split 'train'; this one has {sorted(splits)}")
    shares = {"validation": validation, "test": test}
    missing = {name: share for name, share in shares.items() if name not in splits}
    if not missing:
        return dict(splits)
    n = len(splits["train"])
    sizes = {name: round(share * n) for name, share in missing.items()}
    if min(sizes.values()) < 1 or sum(sizes.values()) >= n:
        raise UserError(
            f"the {n} training examples can't be split into fractions {missing}: every split needs "
            "at least one example; give the split itself, or another fraction"
        )
    shuffled = order.permutation(n, key, 0)
    result, start = dict(splits), 0
    for name, size in sizes.items():
        result[name] = subset(splits["train"], np.sort(shuffled[start : start + size]))
        start += size
    result["train"] = subset(splits["train"], np.sort(shuffled[start:]))
    return result
