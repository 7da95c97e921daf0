"""Merging of model files: any size, in bounded memory, whole or not at all."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lamina.platform.checkpoints.safetensors import Layout
from lamina.platform.errors import UserError
from lamina.platform.merging import streaming, table
from lamina.platform.merging.method import Method
from lamina.platform.merging.output import (
    METADATA,
    RECIPE,
    Files,
    Stage,
    carry_over,
    check_place,
    other_files,
)
from lamina.platform.merging.sources import (
    FLOATS,
    SINGLE,
    STATISTICS,
    Source,
    check_fit,
    local_path,
)

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Names of the dtypes that an output may be given."""

_UNKNOWN = "0" * 64


class Recipe(NamedTuple):
    """What to merge.

    Attributes:
        name: of a leaf-wise method.
        keys: the method's.
        models: the models.
        base: their base, or None.
        weights: one for each model, or () for ones.
        dtype: of the output's floating-point tensors; "" keeps each tensor's of the base, or of
            the first model.
        metadata: for the header of a single file.
        aligned: whether the models' units were matched before.
        statistics: what each model comes with, of a method that needs it.
    """

    name: str
    keys: Mapping[str, Any]
    models: Sequence[Source]
    base: Source | None
    weights: Sequence[float] = ()
    dtype: str = ""
    metadata: Mapping[str, str] | None = None
    aligned: bool = False
    statistics: Sequence[Source] = ()


class Prepared(NamedTuple):
    """A merge that was checked, as far as headers go.

    Attributes:
        recipe: what to merge.
        method: its formulas.
        planned: the tensors, cut into pieces.
        weights: as the formulas take them.
        layouts: shape and dtype of the output's tensors.
        out: where the output goes.
        folder: whether that is a folder.
        elements: how many elements will be gone through.
    """

    recipe: Recipe
    method: Method
    planned: streaming.Plan
    weights: np.ndarray
    layouts: Mapping[str, Layout]
    out: pathlib.Path
    folder: bool
    elements: int


def prepare(recipe: Recipe, out: str) -> Prepared:
    """Checks that a merge can be done, reading headers only.

    Raises:
        UserError: the method isn't leaf-wise or a key is wrong, the models don't fit each other,
            or the output's place isn't free.
    """
    method = table.bind(recipe.name, recipe.keys)
    if not isinstance(method, Method):
        raise UserError(
            f"{recipe.name} isn't leaf-wise: it merges trees, not files. In Python it is "
            f"merging.create({recipe.name!r})(models, ...), or a method of the program merge"
        )
    if method.base and recipe.base is None:
        raise UserError(f"{recipe.name} needs --base: what the models were fine-tuned from")
    if recipe.dtype and recipe.dtype not in DTYPES:
        raise UserError(f"dtype = {recipe.dtype!r} should be one of {', '.join(DTYPES)}")
    try:
        weights = method.weights(len(recipe.models), recipe.weights or None)
    except ValueError as error:
        raise UserError(f"{recipe.name}: {error}") from error
    _check_statistics(recipe, method.needs)
    base = [recipe.base] if method.base and recipe.base is not None else []
    sources = [*base, *recipe.models, *recipe.statistics]
    check_fit(sources)
    planned = streaming.plan(sources, bool(base), whole=method.whole is not None)
    layouts = {}
    for name, tensor in sources[0].tensors.items():
        given = DTYPES[recipe.dtype] if recipe.dtype else tensor.dtype
        layouts[name] = Layout(
            tuple(tensor.shape), given if tensor.dtype in FLOATS else tensor.dtype
        )
    if not out:
        raise UserError("--out is missing: a folder, or a file that ends in .safetensors")
    path = local_path(out)
    folder = path.suffix != ".safetensors"
    if folder and not sources[0].shards:
        raise UserError(
            f"--out={out}: runs and aligned models are merged to one file, such as "
            f"{path}.safetensors"
        )
    check_place(path, [*sources, *([recipe.base] if recipe.base else [])], folder)
    if folder and sources[0].folder is not None:
        other_files(sources[0].folder)
    size = sum(piece.last - piece.first for piece in planned.pieces)
    total = size * streaming.passes(method)
    return Prepared(recipe, method, planned, weights, layouts, path, folder, total)


def _check_statistics(recipe: Recipe, needs: str) -> None:
    if needs and len(recipe.statistics) != len(recipe.models):
        raise UserError(
            f"{recipe.name} needs --statistics: for each model a file of its {needs}, as "
            "lamina.platform.merging.statistics.save writes it"
        )
    if recipe.statistics and not needs:
        raise UserError(f"{recipe.name} takes no --statistics")
    for source in recipe.statistics:
        kind = next(iter(source.metadata.values()), {}).get(STATISTICS, "a model")
        if kind != needs:
            raise UserError(f"{source.path} holds no {needs}: {kind}")


def run(
    prepared: Prepared, progress: Callable[[int], None] = lambda elements: None
) -> dict[str, Any]:
    """Merges, and puts the output in its place.

    Args:
        prepared: what to do.
        progress: called, from several threads, with how many more elements are done.

    Returns:
        The manifest, as the output has it: the method, its keys, and a hash of each input.

    Raises:
        UserError: an input is damaged or not finite, or the output can't be written; then nothing
            is changed.
    """
    recipe, planned, layouts = prepared.recipe, prepared.planned, prepared.layouts
    first = planned.sources[0]
    if prepared.folder:
        shards = first.shards if first.folder is not None else {SINGLE: list(layouts)}
        headers = {file: dict(first.metadata.get(file, {})) for file in shards}
    else:
        shards = {prepared.out.name: list(layouts)}
        given = dict(recipe.metadata or next(iter(first.metadata.values()), {}))
        placeholder = json.dumps(_manifest(recipe, prepared, None), sort_keys=True)
        headers = {prepared.out.name: given | {METADATA: placeholder}}
    with Stage(prepared.out).held() as stage:
        files = Files(stage.folder, shards, layouts, headers)
        try:
            checks = streaming.merge(
                prepared.method,
                planned,
                prepared.weights,
                lambda name: layouts[name].dtype,
                files.write,
                progress,
            )
            manifest = _manifest(recipe, prepared, checks)
            text = json.dumps(manifest, sort_keys=True)
            files.finish({} if prepared.folder else {prepared.out.name: {METADATA: text}})
        finally:
            files.close()
        if prepared.folder:
            (stage.folder / RECIPE).write_text(
                json.dumps(manifest, indent=2, sort_keys=True) + "\n"
            )
            carry_over(first, stage.folder, shards, layouts, recipe.dtype)
            stage.commit_folder()
        else:
            stage.commit_file(prepared.out.name)
    return manifest


def _manifest(
    recipe: Recipe, prepared: Prepared, checks: list[np.ndarray] | None
) -> dict[str, Any]:
    """What was merged; the same text for the same inputs, wherever and whenever."""
    sources = prepared.planned.sources
    entries = []
    for number, source in enumerate(sources):
        fingerprint = _UNKNOWN if checks is None else _fingerprint(source, checks[number])
        entries.append({"path": source.path, "sha256": fingerprint})
    base = [entries.pop(0)] if prepared.planned.base else []
    models, statistics = entries[: len(recipe.models)], entries[len(recipe.models) :]
    found: dict[str, Any] = {
        "lamina": metadata.version("lamina"),
        "method": recipe.name,
        "keys": dict(recipe.keys),
        "weights": list(recipe.weights),
        "dtype": recipe.dtype,
        "models": models,
    }
    found |= {"base": base[0]} if base else {}
    found |= {"statistics": statistics} if statistics else {}
    return found | ({"aligned": True} if recipe.aligned else {})


def _fingerprint(source: Source, checks: np.ndarray) -> str:
    """SHA-256 of a model's names, shapes and dtypes and of the CRC-32s of its pieces."""
    digest = hashlib.sha256()
    for name in sorted(source.tensors):
        tensor = source.tensors[name]
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
    digest.update(checks.astype("<u4").tobytes())
    return digest.hexdigest()
