"""The merged model on the disk: written in pieces beside its place, then renamed, whole."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lamina.platform.checkpoints import safetensors
from lamina.platform.checkpoints.failures import cause
from lamina.platform.checkpoints.safetensors import PICKLES, Layout
from lamina.platform.errors import UserError
from lamina.platform.merging.sources import INDEX, Source

RECIPE = "merge.json"
"""The manifest of a merged folder."""
METADATA = "lamina_merge"
"""The manifest of a single merged file: its place in the file's metadata."""

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_WEIGHTS = (*PICKLES, ".safetensors", ".index.json", ".msgpack", ".h5", ".gguf", ".onnx")


class Stage:
    """A folder beside the output, in which it is written.

    Its name is the output's, so that the next merge to the same place removes what a killed one
    left. It is locked by the kernel, for as long as the process lives.

    Attributes:
        folder: the stage.
        out: the output's final path.
    """

    def __init__(self, out: pathlib.Path):
        self.out = out
        self.folder = out.with_name(f".{out.name}.merging")

    @contextlib.contextmanager
    def held(self) -> Iterator["Stage"]:
        """Makes the stage, empty, and removes it at the end.

        Raises:
            UserError: another merge writes there, or the disk is full or refuses.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A link in its place could lead to a folder whose files are somebody's.
            handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise UserError(f"can't write {self.out}: {cause(error)}") from error
        try:
            _lock(handle, self)
            try:
                _empty(self.folder)
                yield self
            finally:
                shutil.rmtree(self.folder, ignore_errors=True)
        except OSError as error:
            raise UserError(f"can't write {self.out}: {cause(error)}") from error
        finally:
            os.close(handle)

    def commit_file(self, name: str) -> None:
        """Gives the only file of the stage its final name."""
        os.replace(self.folder / name, self.out)
        _sync(self.out.parent)

    def commit_folder(self) -> None:
        """Gives the stage its final name; an earlier merge that is there is replaced."""
        _sync(self.folder)
        before = self.out.with_name(f".{self.out.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        if self.out.exists():
            os.rename(self.out, before)
        os.rename(self.folder, self.out)
        shutil.rmtree(before, ignore_errors=True)
        _sync(self.out.parent)


class Files:
    """Safetensors files that are written in pieces, in any order, by several threads."""

    def __init__(
        self,
        folder: pathlib.Path,
        shards: Mapping[str, Sequence[str]],
        layouts: Mapping[str, Layout],
        metadata: Mapping[str, Mapping[str, str]],
    ):
        """Makes the files at their full size, so that a disk without room is found at once."""
        self._folder, self._layouts, self._metadata = folder, layouts, dict(metadata)
        self._handles: dict[str, int] = {}
        self._places: dict[str, tuple[int, int]] = {}  # tensor to (handle, first byte)
        self._orders: dict[str, list[str]] = {}
        try:
            for file, names in shards.items():
                self._create(file, {name: layouts[name] for name in names})
        except BaseException:
            self.close()
            raise

    def _create(self, file: str, layouts: dict[str, Layout]) -> None:
        order = safetensors.file_order(layouts)
        header = safetensors.header_bytes(layouts, order, self._metadata[file])
        handle = os.open(self._folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._handles[file], self._orders[file] = handle, order
        place = len(header)
        for name in order:
            self._places[name] = (handle, place)
            place += layouts[name].nbytes
        try:
            os.posix_fallocate(handle, 0, place)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.truncate(handle, place)
        _write(handle, memoryview(header), 0)

    def write(self, name: str, first: int, values: np.ndarray) -> None:
        """Stores elements of a tensor, from a place of the flattened tensor on."""
        handle, start = self._places[name]
        _write(handle, values.view(np.uint8).data, start + first * values.itemsize)

    def finish(self, metadata: Mapping[str, Mapping[str, str]]) -> None:
        """Sets metadata of the length that they had before, and syncs the files."""
        for file, handle in self._handles.items():
            layouts = {name: self._layouts[name] for name in self._orders[file]}
            new = {**self._metadata[file], **metadata.get(file, {})}
            before, after = (
                safetensors.header_bytes(layouts, self._orders[file], m)
                for m in (self._metadata[file], new)
            )
            assert len(before) == len(after)
            _write(handle, memoryview(after), 0)
            os.fsync(handle)

    def close(self) -> None:
        """Closes the files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}


def other_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a model's folder that are no weights, relative to it, hidden ones not.

    Links to files are followed, which is how Hugging Face's cache keeps them; those to folders
    could lead anywhere, and are left out, as is what is no file.

    Raises:
        UserError: a link leads nowhere, or a file or folder can't be read.
    """

    def unreadable(error: OSError) -> None:
        raise UserError(f"can't read {error.filename}: {cause(error)}") from error

    found = []
    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = pathlib.Path(root, name)
            if name.startswith(".") or name == RECIPE or name.endswith(_WEIGHTS):
                continue
            if not path.exists():
                raise UserError(f"{path} is a link that leads nowhere: remove it")
            if path.is_file():
                if not os.access(path, os.R_OK):
                    raise UserError(f"can't read {path}: permission denied")
                found.append(path.relative_to(folder))
    return sorted(found)


def carry_over(
    source: Source,
    folder: pathlib.Path,
    shards: Mapping[str, Sequence[str]],
    layouts: Mapping[str, Layout],
    dtype: str,
) -> None:
    """Copies what else is in a model's folder, and writes the index of several shards."""
    if source.folder is not None:
        for file in other_files(source.folder):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / file, folder / file)
        if dtype and (folder / "config.json").exists():
            _set_dtype(folder / "config.json", dtype)
    if len(shards) > 1 or (source.folder is not None and (source.folder / INDEX).exists()):
        table = {name: file for file, names in shards.items() for name in names}
        total = sum(layout.nbytes for layout in layouts.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
    for file in folder.rglob("*"):
        if file.is_file() and not file.name.endswith(".safetensors"):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _set_dtype(path: pathlib.Path, dtype: str) -> None:
    try:
        text = json.dumps(_with_dtype(json.loads(path.read_bytes()), dtype), indent=2)
    except (ValueError, RecursionError):
        return  # not ours to judge: it is carried over as it is
    path.write_text(text + "\n")


def _with_dtype(content: Any, dtype: str) -> Any:
    """Returns a model's config with another dtype, also of the parts that it has configs of."""
    if not isinstance(content, dict):
        return content
    stated = lambda key, value: key in ("torch_dtype", "dtype") and value in _FLOATS
    return {k: dtype if stated(k, v) else _with_dtype(v, dtype) for k, v in content.items()}


def check_place(out: pathlib.Path, inputs: Sequence[Source], folder: bool) -> None:
    """Refuses to write over an input, or over a file or folder that no merge has made.

    An empty file or folder has nothing to lose.

    Raises:
        UserError: the output's place isn't free.
    """
    if out.name in ("", ".."):
        raise UserError(f"--out={out} should be a file or a folder with a name of its own")
    if folder and out.name.endswith(_WEIGHTS):
        raise UserError(f"--out={out} should end in .safetensors, or be a folder's name")
    real = os.path.realpath(out)
    for source in inputs:
        path = os.path.realpath(os.path.expanduser(source.path))
        if (
            real == path
            or path.startswith(real + os.sep)
            or (source.folder is not None and real.startswith(path + os.sep))
        ):
            raise UserError(f"--out={out} would write over the input {source.path}")
    if folder and out.exists() and not (out / RECIPE).exists():
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"--out={out} exists, and no merge has made it: choose another")
    elif not folder and out.is_dir():
        raise UserError(f"--out={out} is a folder")
    elif not folder and out.exists() and out.stat().st_size and METADATA not in _metadata(out):
        raise UserError(
            f"--out={out} exists, and no merge has made it: choose another, or remove it"
        )


def _metadata(path: pathlib.Path) -> Mapping[str, str]:
    """Returns what a file's header says, nothing if it is no safetensors file."""
    try:
        with safetensors.File(path) as file:
            return file.metadata
    except UserError:
        return {}


def _write(handle: int, view: memoryview, place: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], place + done)


def _lock(handle: int, stage: Stage) -> None:
    busy = UserError(f"another merge is writing {stage.out}: wait for it, or stop it")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    if not stage.folder.exists() or not os.path.samestat(os.fstat(handle), stage.folder.stat()):
        raise busy  # it has ended in between, and removed this folder


def _empty(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(folder: pathlib.Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
