"""The manifest of a checkpoint: what each array is and its checksum, in a file that proves itself.

`manifest.json` in a step's folder is written last, so its presence marks the checkpoint as
complete. It holds a CRC-32 of its own text.
"""

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

MANIFEST = "manifest.json"
_FORMAT = 1


class ArrayRecord(NamedTuple):
    """One array of a checkpoint."""

    shape: tuple[int, ...]  # as the train state has it; typed keys without their data dimension
    dtype: str  # "float32", ..., or "key<fry>"
    key_impl: str = ""  # the generator's name if the array holds typed PRNG keys
    checksum: int | None = None  # of the stored data, see checksum.py; None before it is known

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    def data(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the stored data: keys are stored as their uint32 words."""
        if not self.key_impl:
            return jax.ShapeDtypeStruct(self.shape, np.dtype(self.dtype))
        one = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=self.key_impl)))
        return jax.ShapeDtypeStruct((*self.shape, *one.shape), one.dtype)


class Manifest(NamedTuple):
    """All that a checkpoint says about itself."""

    step: int
    arrays: dict[str, ArrayRecord]
    extra: dict[str, Any]  # the caller's JSON


class BadManifest(Exception):
    """The manifest is absent, unreadable or changed; the message says which."""


def is_key(leaf: Any) -> bool:
    """Whether a leaf (an array or a ShapeDtypeStruct) holds typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> ArrayRecord:
    """The record of an array or a ShapeDtypeStruct, without a checksum."""
    implementation = ""
    if is_key(leaf) and isinstance(leaf, jax.Array):
        implementation = str(jax.random.key_impl(leaf))
    return ArrayRecord(tuple(leaf.shape), str(leaf.dtype), implementation)


def is_local(path: epath.Path) -> bool:
    """Whether a path lies on a mounted file system, where rename is atomic."""
    return "://" not in os.fspath(path)


def write_file(path: epath.Path, text: str) -> None:
    """Writes a text whole and, on a mounted file system, down to the disk."""
    if not is_local(path):
        path.write_text(text)  # an object appears whole or not at all
        return
    temporary = f"{os.fspath(path)}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def seal(body: Mapping[str, Any]) -> str:
    """JSON text with a CRC-32 of itself, one line for the sum and one for the body."""
    text = json.dumps(body)
    return f"{zlib.crc32(text.encode()):08x}\n{text}\n"


def unseal(text: str) -> dict[str, Any]:
    """The body of a text made by `seal`.

    Raises:
        BadManifest: the text isn't what was written.
    """
    checksum, _, rest = text.partition("\n")
    body, newline, tail = rest.partition("\n")
    if not newline or tail or checksum != f"{zlib.crc32(body.encode()):08x}":
        raise BadManifest("is damaged: its text does not match its own checksum")
    return json.loads(body)


def write(folder: epath.Path, manifest: Manifest) -> None:
    """Writes `manifest.json` into a step's folder."""
    arrays = {
        name: {"shape": r.shape, "dtype": r.dtype, "key_impl": r.key_impl, "checksum": r.checksum}
        for name, r in manifest.arrays.items()
    }
    body = {"format": _FORMAT, "step": manifest.step, "arrays": arrays, "extra": manifest.extra}
    write_file(folder / MANIFEST, seal(body))


def read(folder: epath.Path) -> Manifest:
    """Reads and checks the manifest of a step's folder.

    Raises:
        BadManifest: with what is wrong, as the end of a sentence that begins with the folder.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode()
    except FileNotFoundError:
        if not any(folder.iterdir()):
            raise BadManifest("is an empty folder") from None
        raise BadManifest(f"is incomplete: {MANIFEST} is missing") from None
    except NotADirectoryError:
        raise BadManifest("is not a folder") from None
    except UnicodeDecodeError:
        raise BadManifest(f"is damaged: {MANIFEST} is not text") from None
    except OSError as error:
        raise BadManifest(f"can't be read: {error.strerror or error}") from None
    try:
        body = unseal(text)
    except BadManifest:
        what = "is empty" if not text else "does not match its own checksum"
        raise BadManifest(f"is damaged: {MANIFEST} {what}") from None
    if body["format"] != _FORMAT:
        raise BadManifest(f"has format {body['format']}; this version reads format {_FORMAT}")
    arrays = {
        name: ArrayRecord(tuple(r["shape"]), r["dtype"], r["key_impl"], r["checksum"])
        for name, r in body["arrays"].items()
    }
    return Manifest(body["step"], arrays, body["extra"])


def differences(saved: Mapping[str, ArrayRecord], wanted: Mapping[str, ArrayRecord]) -> list[str]:
    """What tells a saved state from the state that is asked for: one line per array."""
    lines = []
    for name in sorted({*saved, *wanted}):
        if name not in wanted:
            lines.append(
                f"{name}: the checkpoint has {saved[name]}, the state here has no such array"
            )
        elif name not in saved:
            lines.append(
                f"{name}: the state here has {wanted[name]}, the checkpoint has no such array"
            )
        elif str(saved[name]) != str(wanted[name]):
            lines.append(f"{name}: the checkpoint has {saved[name]}, the state here {wanted[name]}")
    return lines
