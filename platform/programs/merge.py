"""The program `merge`: merges trained models, from files of any size or from runs."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from lamina.platform.merging import files, sources
from lamina.platform.merging.files import Prepared, Recipe
from lamina.platform.merging.sources import InMemory, Source


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

    Raises:
        UserError: a model can't be read, the models don't fit each other, or the method or the
            output's place is wrong.
    """
    opened = [open_model(path, trust) for path in (base, *models) if path]
    found = opened.pop(0) if base else None
    first = found or (opened[0] if opened else None)
    described = next(iter(first.metadata.values()), None) if first and not first.shards else None
    recipe = Recipe(name, keys, opened, found, tuple(weights), dtype, described)
    return files.prepare(recipe, out)


def open_model(path: str, trust: Sequence[str]) -> Source:
    """Opens a safetensors file, a Hugging Face folder, or a run.

    The parameters of a run are read whole; they keep their names and logical axes, and batch
    statistics stand under `model_state/`, as in `lamina export`.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    if sources.is_weights(path) or not os.path.exists(os.path.expanduser(path)):
        return sources.open_source(path)
    import numpy as np

    from lamina.platform.checkpoints import names
    from lamina.platform.training import trained

    found = trained.read(path, trust=trust)
    tree = dict(found.params)
    if found.model_state:
        tree["model_state"] = found.model_state
    tensors = {name: InMemory(np.asarray(leaf)) for name, leaf in names.flatten(tree).items()}
    return Source(path, tensors, {}, {"": trained.describe(found)}, None, _axes(found.model.axes))


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
