"""What a safetensors file says before its data: dtypes, layouts, and the bytes of a header."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lamina.platform.errors import UserError

METADATA = "__metadata__"
"""The entry of a header that is no tensor."""

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "C64": np.complex64,
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
"""The format's names of the dtypes that numpy and ml_dtypes have."""

_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Layout(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_order(layouts: Mapping[str, Layout]) -> list[str]:
    """The names in the order of the data in a file: wider dtypes first, so that all are aligned."""
    return sorted(layouts, key=lambda name: (-layouts[name].dtype.itemsize, name))


def header_bytes(
    layouts: Mapping[str, Layout], order: list[str], metadata: Mapping[str, str] | None
) -> bytes:
    """What stands before the data of a file, its length included.

    Raises:
        UserError: a dtype that the format doesn't have.
    """
    table: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        layout = layouts[name]
        if layout.dtype not in _NAMES:
            raise UserError(f"{name} is {layout.dtype}, which safetensors files don't know")
        start, end = end, end + layout.nbytes
        table[name] = {
            "dtype": _NAMES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
