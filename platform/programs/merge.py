"""The program `merge`: merges trained models, from files of any size or from runs."""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lamina.platform.errors import UserError
from lamina.platform.merging import files, sources
from lamina.platform.merging.files import Prepared, Recipe
from lamina.platform.merging.sources import InMemory, Source
from lamina.platform.reporting import folder


def prepare(
    name: str,
    keys: dict[str, Any],
    *,
    models: Sequence[str],
    base: str = "",
    weights: Sequence[float] = (),
    dtype: str = "",
    out: str,
    trust: Sequence[str] = (),
    align: bool = False,
    statistics: Sequence[str] = (),
) -> Prepared:
    """Opens the models, and checks that they can be merged; writes nothing.

    Args:
        name: the method.
        keys: the method's keys.
        models: safetensors files, Hugging Face folders or runs.
        base: another one, or "".
        weights: one for each model, or none.
        dtype: of the output, or "" for that of the base (or first model).
        out: a file that ends in .safetensors, or a folder.
        trust: packages whose factories the runs' configs may name.
        align: whether to match the units of each model to those of the base, or of the first model
            (weight matching, Ainsworth et al. 2022, 2209.04836), before merging. The first has to
            say what model it is: a run, or a file of `lamina export` or of merged runs.
        statistics: for methods with data: a file for each model, as `statistics.save` writes it.

    Raises:
        UserError: a model can't be read, the models don't fit each other, or the method or the
            output's place is wrong.
    """
    if statistics and align:
        raise UserError("--statistics are of a model's units as they stand: give no --align")
    if name == "weight_matching":
        raise UserError("weight_matching is --method=linear --align here")
    opened = _open_all([path for path in (base, *models) if path], trust, align)
    found = opened.pop(0) if base else None
    first = found or (opened[0] if opened else None)
    described = next(iter(first.metadata.values()), None) if first and not first.shards else None
    recipe = Recipe(name, keys, opened, found, tuple(weights), dtype, described, align)
    recipe = recipe._replace(statistics=[sources.open_source(path) for path in statistics])
    return files.prepare(recipe, out)


def open_model(path: str, trust: Sequence[str]) -> Source:
    """Opens a safetensors file, a Hugging Face folder, or a run.

    The parameters of a run are read whole; they keep their names and logical axes, and batch
    statistics stand under `model_state/`, as in `lamina export`.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    if not _is_run(path):
        return sources.open_source(path)
    from lamina.platform.checkpoints import names
    from lamina.platform.merging import symmetries
    from lamina.platform.training import trained

    found = trained.read(path, trust=trust)
    tree = names.flatten(symmetries.joined(found.params, found.model_state))
    arrays = {name: np.asarray(leaf) for name, leaf in tree.items()}
    return _in_memory(path, arrays, trained.describe(found), _axes(found.model.axes))


def _open_all(paths: Sequence[str], trust: Sequence[str], align: bool) -> list[Source]:
    """Opens models, and matches the units of all to those of the first if that is wanted."""
    if not align:
        return [open_model(path, trust) for path in paths]
    from lamina.platform.checkpoints import names
    from lamina.platform.merging import matching, symmetries
    from lamina.platform.training import trained

    opened: list[Source] = []
    reference, spec = None, None
    for path in paths:
        source = open_model(path, trust)
        # Units are matched in the models as a whole.
        held = {n: t.flat(0, t.size).reshape(t.shape) for n, t in source.tensors.items()}
        for name, array in held.items():
            if array.dtype in sources.FLOATS and not np.isfinite(array.astype(np.float64)).all():
                raise UserError(f"{path}: {name!r} holds NaN or infinities")
        if spec is None:
            header = next(iter(source.metadata.values()), {})
            model, data = trained.described(header, path, trust)
            wanted = names.flatten(symmetries.joined(model.params, model.model_state))
            told = Source(f"the model that it describes, {header['model']}", wanted, {}, {})
            sources.check_fit([source, told])
            reference, spec = held, symmetries.derive(model, data).spec
            opened.append(_in_memory(path, held, header, _axes(model.axes)))
            continue
        sources.check_fit([opened[0], source])
        opened.append(_in_memory(path, matching.align(spec, reference, held)))
    return opened


def _is_run(path: str) -> bool:
    """Tells whether a path is a run's folder or a checkpoint's, and not one of other weights."""
    local = sources.local_path(path)
    if (local / folder.STATUS).exists():  # whatever was exported into it
        return True
    if sources.is_weights(path) or not local.is_dir():
        return False
    # Hugging Face's folders have a file of that name too.
    return not (local / folder.CONFIG).exists() or "program" in folder.read_config(local)


def _in_memory(
    path: str,
    arrays: Mapping[str, Any],
    header: Mapping[str, str] | None = None,
    axes: Mapping[str, tuple[str | None, ...]] | None = None,
) -> Source:
    tensors = {name: InMemory(array) for name, array in arrays.items()}
    return Source(path, tensors, {}, {"": header or {}}, None, axes or {})


def _axes(tree: Any, prefix: str = "") -> dict[str, tuple[str | None, ...]]:
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _axes(value, f"{name}/") if isinstance(value, dict) else {name: value}
    return found


class Progress:
    """Tells on stderr how far a merge is: a line that changes, or a line each ten seconds."""

    def __init__(self, total: int):
        self._total, self._done = max(total, 1), 0
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._every = 0.2 if self._terminal else 10.0
        self._next = self._start + self._every

    def __call__(self, elements: int) -> None:
        """Adds elements that are done; may be called from any thread."""
        with self._lock:
            self._done += elements
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + self._every
            part, seconds = min(self._done / self._total, 1.0), now - self._start
            text = f"merged {part:4.0%}, {seconds * (1 - part) / part:.0f} s left"
            print(
                f"\r{text} " if self._terminal else text,
                end="" if self._terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leaves the line."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
