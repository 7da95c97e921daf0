"""Safetensors files, read tensor by tensor and written tensor by tensor, whatever their size.

A file is: the header's length (8 bytes, little-endian), a JSON header that gives each tensor's
dtype, shape and byte range, and the data. It is plain numbers and can run no code, but a file from
elsewhere is somebody's data: every statement of its header is checked before a byte of the data is
used. Pickles are never read.

Reading is by position (`pread`), not by mapping, so that a tensor read and dropped leaves nothing
behind, and a file that shrinks meanwhile is an error and not a signal. `safetensors`' own
Python functions read and write whole files at once; its Rust reader gives no bfloat16 to numpy.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from lamina.platform.checkpoints.failures import CheckpointError, cause
from lamina.platform.checkpoints.headers import (
    DTYPES,
    METADATA,
    Layout,
    file_order,
    header_bytes,
)
from lamina.platform.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of weights that can run code, and are never read."""

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_BLOCK = 16 << 20  # bytes read at once when only a part of each row is wanted


class Tensor:
    """A tensor in a file: shape and dtype are known, its values are read when asked for.

    `np.asarray(tensor)` reads it whole; `tensor[index]` reads no more than the rows that the index
    touches, and keeps no more than its result and a block of 16 MB.

    Attributes:
        name: in the file.
        shape: of the tensor.
        dtype: as numpy has it; bfloat16 and the 8-bit floats are those of `ml_dtypes`.
        nbytes: of its data.
    """

    def __init__(self, content: "Content", name: str, layout: Layout, start: int):
        self.name, self.shape, self.dtype = name, layout.shape, layout.dtype
        self.nbytes = layout.nbytes
        self._content, self._start = content, start

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # what is read is always new
        whole = self._rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the part at a tuple of slices (of step 1) and integers, or at one of them."""
        index = index if isinstance(index, tuple) else (index,)
        if not self.shape or not isinstance(index[0] if index else None, slice):
            return np.asarray(self)[index]
        first, last, step = index[0].indices(self.shape[0])
        if step != 1:
            return np.asarray(self)[index]
        row = self.nbytes // max(self.shape[0], 1)
        rest = (slice(None), *index[1:])
        whole_rows = all(
            isinstance(part, slice) and part.indices(extent) == (0, extent, 1)
            for part, extent in zip(index[1:], self.shape[1:], strict=False)
        )
        if whole_rows or last <= first:
            return self._rows(first, max(first, last))[rest]
        result = None
        rows = max(_BLOCK // max(row, 1), 1)
        for begin in range(first, last, rows):
            part = self._rows(begin, min(begin + rows, last))[rest]
            if result is None:
                result = np.empty((last - first, *part.shape[1:]), self.dtype)
            result[begin - first : begin - first + len(part)] = part
        assert result is not None
        return result

    def flat(self, first: int, last: int) -> np.ndarray:
        """Reads the elements `first` to `last` of the flattened tensor."""
        size = self.dtype.itemsize
        data = self._content.read(self._start + first * size, (last - first) * size)
        return data.view(self.dtype)

    def _rows(self, first: int, last: int) -> np.ndarray:
        """Reads rows of the leading dimension; a scalar is one row."""
        shape = (last - first, *self.shape[1:])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = self._content.read(self._start + first * row, (last - first) * row)
        try:
            return data.view(self.dtype).reshape(shape)
        except ValueError as error:  # dimensions that no array has, such as (2**70, 0)
            raise UserError(
                f"{self._content.path} is damaged: {self.name!r} has shape {list(self.shape)}: "
                f"{error}"
            ) from error

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.dtype}{list(self.shape)})"


class Content:
    """The bytes of an open file, read by position; closed when nothing refers to it any more."""

    def __init__(self, path: epath.Path):
        self.path = path
        self._local = "://" not in os.fspath(path)
        try:
            self._file: IO[bytes] = path.open("rb")
            self.size = self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror or error}") from error

    def read(self, start: int, count: int) -> np.ndarray:
        """Reads bytes of the file as uint8 [count].

        Raises:
            UserError: the file has become shorter, or the disk fails.
        """
        result = np.empty(count, np.uint8)
        view = result.data
        done = 0
        try:
            while done < count:
                got = self._read_into(view[done : done + (1 << 30)], start + done)
                if not got:
                    raise UserError(f"{self.path} is cut short: it ends at byte {start + done}")
                done += got
        except OSError as error:
            raise UserError(f"can't read {self.path}: {error.strerror or error}") from error
        return result

    def _read_into(self, view: memoryview, start: int) -> int:
        if self._local:
            return os.preadv(self._file.fileno(), [view], start)
        self._file.seek(start)
        content = self._file.read(len(view))
        view[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class File:
    """An open safetensors file whose header has been checked; a context manager.

    Attributes:
        path: of the file.
        tensors: by name, in the header's order.
        metadata: text by name, from the header.
    """

    def __init__(self, path: epath.PathLike):
        """Opens a file, local or `gs://`.

        Raises:
            UserError: there is no such file, it is something else (a pickle, a zip as PyTorch
                writes it), it is cut short, or its header lies; the message names the tensor.
        """
        self.path = epath.Path(path).expanduser()
        self._content = Content(self.path)
        header, data = _read_header(self._content)
        self.metadata: dict[str, str] = header.pop(METADATA, {})
        starts = _check(self.path, header, self._content.size - data)
        self.tensors = {
            name: Tensor(
                self._content,
                name,
                Layout(tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])),
                data + starts[name],
            )
            for name, entry in header.items()
        }

    def close(self) -> None:
        """Closes the file; tensors that were not read can't be read any more."""
        self._content.close()

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _read_header(file: Content) -> tuple[dict[str, Any], int]:
    """The header, its form checked, and the position where the data begin."""
    source, size = file.path, file.size
    first = file.read(0, min(size, 9)).tobytes()
    if first.startswith(b"PK"):
        raise UserError(
            f"{source} is a zip archive, such as PyTorch's pickles, not a safetensors file; "
            "pickles can run code and are never read: convert the file where it came from"
        )
    # A header's length may begin with a pickle's first byte too, but then a header follows.
    if first[:1] == b"\x80" and first[8:9] != b"{":
        raise UserError(
            f"{source} is a pickle, not a safetensors file; pickles can run code and are never "
            "read: convert the file where it came from"
        )
    if size < 8:
        raise UserError(f"{source} is no safetensors file: it has {size} bytes")
    length = int.from_bytes(first[:8], "little")
    if length > _MAX_HEADER or length < 2:
        raise UserError(f"{source} is no safetensors file: its header would have {length} bytes")
    if length > size - 8:
        raise UserError(f"{source} is cut short: its header has {length} bytes, the file {size}")
    try:
        header = json.loads(file.read(8, length).tobytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is damaged: its header is no JSON ({error})") from error
    metadata = header.get(METADATA, {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{source} is damaged: its header is no table of tensors")
    try:  # JSON may hold half of a surrogate pair, which no file that is written from this may
        "".join((*header, *metadata, *metadata.values())).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source} is damaged: its header holds text that is no Unicode") from error
    return header, 8 + length


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names all differ (an `object_pairs_hook`).

    Raises:
        ValueError: a name stands twice.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _check(source: epath.Path, header: dict[str, Any], size: int) -> dict[str, int]:
    """Where each tensor's data begin; they must fill `size` bytes without gap or overlap."""
    spans = sorted(_span(source, name, entry, size) for name, entry in header.items())
    end = 0
    for first, last, name in spans:
        if first != end:
            what = "overlaps the tensor before it" if first < end else "leaves a gap before it"
            raise UserError(f"{source} is damaged: the data of {name!r} {what}")
        end = last
    if end != size:
        raise UserError(f"{source} is damaged: {size - end} bytes belong to no tensor")
    return {name: first for first, _, name in spans}


def _span(source: epath.Path, name: str, entry: Any, size: int) -> tuple[int, int, str]:
    """(first byte, end, name) of a tensor, checked by itself."""
    where = f"{source} is damaged: the tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where} has the unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise UserError(f"{where} has shape {shape} and data_offsets {offsets}")
    if len(shape) > 32 or any(extent >= 2**63 for extent in shape):
        raise UserError(f"{where} has shape {shape}, which no array has")
    first, last = offsets
    count = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if first > last or last - first != count:
        raise UserError(
            f"{where} needs {count} bytes for {dtype}{shape}, its data_offsets {offsets} hold "
            f"{last - first}"
        )
    if last > size:
        raise UserError(
            f"{source} is cut short or damaged: the tensor {name!r} ends at byte {last} of the "
            f"data, which have {size}"
        )
    return first, last, name


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def write(
    path: epath.PathLike,
    layouts: Mapping[str, Layout],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file tensor by tensor, whole or not at all.

    Holds one tensor at a time. Tensors of wider dtypes stand first, as in the reference
    implementation, so that all are aligned.

    Args:
        path: the file, local or `gs://`; one that is there is replaced.
        layouts: shape and dtype by name, all known before the first value.
        read: gives a tensor by its name; called once for each, in the file's order.
        metadata: text to text, kept in the header.

    Raises:
        UserError: a dtype that the format doesn't have.
        CheckpointError: the file can't be written (then nothing is changed).
        ValueError: `read` gave another shape or dtype than was said.
    """
    target = epath.Path(path).expanduser()
    order = file_order(layouts)
    header = header_bytes(layouts, order, metadata)
    try:
        if "://" in os.fspath(target):
            with target.open("wb") as file:  # an object appears when it is closed, whole
                file.writelines(_content(header, layouts, order, read))
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{os.fspath(target)}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.writelines(_content(header, layouts, order, read))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {cause(error)}") from error


def _content(
    header: bytes,
    layouts: Mapping[str, Layout],
    order: list[str],
    read: Callable[[str], np.ndarray],
) -> Iterator[memoryview | bytes]:
    yield header
    for name in order:
        array = np.asarray(read(name), order="C")
        if Layout(array.shape, array.dtype) != layouts[name]:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, not {layouts[name]}")
        yield array.reshape(-1).view(np.uint8).data
