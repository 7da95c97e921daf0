"""The source text of Python's own standard library, as bytes: text that every machine has."""

import hashlib
import sysconfig
from pathlib import Path

from lamina.models.spec import DataSpec
from lamina.platform.data import tokens
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError

# Installed packages are not the standard library. Tests are left out because distributions package
# them apart (Debian's python3 has none), and because they hold generated tables and deliberately
# broken files; with them the same Python would give different data on different machines.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# _sysconfigdata_*.py and the folder config-*/ hold the paths and flags of one build.
_OF_THE_BUILD = ("_sysconfig", "config-")
_VALIDATION_PERCENT, _TEST_PERCENT = 5, 5


def python_stdlib(*, context: int = 256, stride: int = 0) -> Dataset:
    """Returns next-byte prediction over the running interpreter's standard library.

    Files are split 90/5/5 by a hash of their relative path, so a file stays in its split when the
    library changes. The text depends on the Python version; compare only runs on the same one.
    In "validation" and "test" each byte is predicted exactly once.

    Args:
        context: bytes predicted per example.
        stride: bytes from one training window to the next; 0 is `context` (no overlap).

    Raises:
        UserError: this interpreter has no source files (some embedded ones), or `context` is too
            large.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = library_files(root)
    split_files: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for file in files:
        split_files[split_of(file.relative_to(root).as_posix())].append(file)
    if not all(split_files.values()):
        raise UserError(
            f"{root} holds {len(files)} Python source files, too few for three splits: use an "
            "interpreter with its library as source, or the data set 'text'"
        )
    streams = {
        name: tokens.join(file.read_bytes() for file in members)
        for name, members in split_files.items()
    }
    described = ", ".join(f"{name} {len(s) - 1} bytes" for name, s in streams.items())
    return Dataset(
        spec=DataSpec((context,), "int32", tokens.BYTES),
        splits={
            name: tokens.WindowSource(
                stream,
                context,
                stride=stride if name == "train" else 0,
                whole=name != "train",
            )
            for name, stream in streams.items()
        },
        decode=tokens.decode_bytes,
        description=(
            f"Source text of the standard library of Python {sysconfig.get_python_version()} as "
            f"bytes, without tests: {len(files)} files, split by file ({described})."
        ),
        bytes_per_token=dict.fromkeys(streams, 1.0),
    )


def library_files(root: Path) -> list[Path]:
    """Returns the library's own source files under `root`, sorted by relative path."""
    found = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        ours = not _LEFT_OUT.intersection(relative.parts)
        if ours and not relative.parts[0].startswith(_OF_THE_BUILD):
            found.append((relative.as_posix(), file))
    return [file for _, file in sorted(found)]


def split_of(relative_path: str) -> str:
    """Returns the split of a file, from a hash of its path with forward slashes."""
    digest = hashlib.blake2b(relative_path.encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    if percent < _TEST_PERCENT:
        return "test"
    return "validation" if percent < _TEST_PERCENT + _VALIDATION_PERCENT else "train"
