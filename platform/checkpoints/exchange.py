"""Parameters to and from safetensors files, which hold plain arrays and can run no code.

A file is: the header's length (8 bytes, little-endian), a JSON header that gives each tensor's
dtype, shape and byte range, and the data. A file from elsewhere is somebody's data: every statement
of its header is checked before a byte of the data is used. Pickles are never read.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import save, save_file

from lamina.platform.checkpoints.failures import CheckpointError, cause
from lamina.platform.checkpoints.names import flatten, nearest, nest, unflatten
from lamina.platform.errors import UserError

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_LISTED = 10
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def export_params(
    path: epath.PathLike, params: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a parameter tree to one safetensors file, whole or not at all.

    Args:
        path: the file, local or `gs://`; one that is there is replaced.
        params: a tree of arrays; names are '/'-joined. With several processes each array must be
            readable from this one (gather first), and one process calls this.
        metadata: text to text, kept in the header, for example the task and the model's config.

    Raises:
        UserError: a leaf can't be stored, or the file can't be written (then nothing is changed).
    """
    tensors = {}
    for name, leaf in flatten(params).items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise UserError(f"{name} holds random keys; safetensors files hold numbers only")
        tensors[name] = np.asarray(leaf, order="C")
        if tensors[name].dtype not in _NAMES:
            raise UserError(f"{name} is {leaf.dtype}, which safetensors files don't know")
    target = epath.Path(path).expanduser()
    header = dict(metadata) if metadata else None
    try:
        if "://" in os.fspath(target):
            target.write_bytes(save(tensors, header))  # an object appears whole or not at all
        else:
            _write_local(target, tensors, header)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {target}: {cause(error)}") from error


def _write_local(
    target: epath.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{os.fspath(target)}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


class Tensors(NamedTuple):
    """What a safetensors file holds."""

    arrays: dict[str, np.ndarray]  # by name; read-only, and read from the disk when used
    metadata: dict[str, str]

    def tree(self) -> dict[str, Any]:
        """The arrays as nested dicts, by the parts of their '/'-joined names.

        Raises:
            UserError: one name leads into another ("a" and "a/b").
        """
        try:
            return nest(flatten(self.arrays))
        except ValueError as error:
            raise UserError(f"these names make no tree: {error}") from error


def import_tensors(path: epath.PathLike, *, finite: bool = False) -> Tensors:
    """Reads a safetensors file, having checked all that its header says.

    Args:
        path: the file, local (mapped into memory, not read) or `gs://`.
        finite: also refuse NaN and infinities in floating tensors (reads all the data).

    Raises:
        UserError: there is no such file, it is something else (a pickle, a zip as PyTorch writes
            it), it is cut short, or its header lies; the message names the tensor.
    """
    source = epath.Path(path).expanduser()
    try:
        if "://" in os.fspath(source):
            content = np.frombuffer(source.read_bytes(), np.uint8)
        else:
            size = source.stat().length
            content = np.memmap(source, np.uint8, "r") if size else np.zeros(0, np.uint8)
    except OSError as error:
        raise UserError(f"can't read {source}: {error.strerror or error}") from error
    header, start = _read_header(source, content)
    metadata = header.pop("__metadata__", {})
    data = content[start:]
    spans = sorted(_spans(source, header, data.size))
    end = 0
    for first, last, name in spans:
        if first != end:
            what = "overlaps the tensor before it" if first < end else "leaves a gap before it"
            raise UserError(f"{source} is damaged: the data of {name!r} {what}")
        end = last
    if end != data.size:
        raise UserError(f"{source} is damaged: {data.size - end} bytes belong to no tensor")
    arrays = {}
    for first, last, name in spans:
        dtype, shape = _DTYPES[header[name]["dtype"]], header[name]["shape"]
        # A slice may begin at any byte; numpy reads unaligned views correctly.
        try:
            array = np.ndarray(shape, dtype, buffer=data[first:last].data)
        except ValueError as error:
            raise UserError(f"{source} is damaged: {name!r} has shape {shape}: {error}") from error
        if finite and jnp.issubdtype(dtype, jnp.floating):
            bad = array.size - int(np.isfinite(array.astype(np.float64)).sum())
            if bad:
                raise UserError(f"{source}: {name!r} holds {bad} values that are not finite")
        arrays[name] = array
    return Tensors({name: arrays[name] for name in header}, metadata)


def import_params(path: epath.PathLike, like: Any, *, finite: bool = False) -> dict[str, Any]:
    """Reads a safetensors file that must hold exactly the arrays of a tree.

    For a file of another model use `import_tensors` and `transfer.transfer`.

    Args:
        path: the file.
        like: the tree (arrays or ShapeDtypeStructs) whose names, shapes and dtypes are expected.
        finite: as for `import_tensors`.

    Returns:
        A tree with the structure of `like` and numpy arrays as leaves.

    Raises:
        UserError: as `import_tensors`; or arrays are missing, superfluous, or of another shape or
            dtype: all are listed.
    """
    arrays = import_tensors(path, finite=finite).arrays
    wanted = flatten(like)
    problems = []
    for name, leaf in wanted.items():
        if name not in arrays:
            problems.append(f"{name} is missing{nearest(name, arrays)}")
        elif arrays[name].shape != tuple(leaf.shape) or arrays[name].dtype != leaf.dtype:
            found = arrays[name]
            problems.append(
                f"{name} is {found.dtype}{list(found.shape)}, here {leaf.dtype}{list(leaf.shape)}"
            )
    problems += [f"{name} is not in this model" for name in arrays if name not in wanted]
    if problems:
        more = len(problems) - _MAX_LISTED
        listed = "\n".join(f"  {line}" for line in problems[:_MAX_LISTED])
        raise UserError(
            f"{path} does not fit this model:\n{listed}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
    return unflatten(arrays, like)


def _read_header(source: epath.Path, content: np.ndarray) -> tuple[dict[str, Any], int]:
    """The header, its form checked, and the position where the data begin."""
    first = content[:8].tobytes()
    if first.startswith(b"PK"):
        raise UserError(
            f"{source} is a zip archive, such as PyTorch's pickles, not a safetensors file; "
            "pickles can run code and are never read: convert the file where it came from"
        )
    # A header's length may begin with a pickle's first byte too, but then a header follows.
    if first[:1] == b"\x80" and content[8:9].tobytes() != b"{":
        raise UserError(
            f"{source} is a pickle, not a safetensors file; pickles can run code and are never "
            "read: convert the file where it came from"
        )
    if content.size < 8:
        raise UserError(f"{source} is no safetensors file: it has {content.size} bytes")
    length = int.from_bytes(first, "little")
    if length > _MAX_HEADER or length < 2:
        raise UserError(f"{source} is no safetensors file: its header would have {length} bytes")
    if length > content.size - 8:
        raise UserError(
            f"{source} is cut short: its header has {length} bytes, the file {content.size}"
        )
    try:
        header = json.loads(content[8 : 8 + length].tobytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is damaged: its header is no JSON ({error})") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{source} is damaged: its header is no table of tensors")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _spans(source: epath.Path, header: dict[str, Any], size: int) -> list[tuple[int, int, str]]:
    """(first byte, end, name) of every tensor, each checked by itself."""
    spans = []
    for name, entry in header.items():
        where = f"{source} is damaged: the tensor {name!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise UserError(f"{where} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise UserError(f"{where} has the unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise UserError(f"{where} has shape {shape} and data_offsets {offsets}")
        first, last = offsets
        count = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
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
        spans.append((first, last, name))
    return spans


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
