"""Reading checkpoints: the newest that verifies, whole or in part."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Sharding

from lamina.platform.checkpoints import arrays as arrays_lib
from lamina.platform.checkpoints import checksum, folders, manifest
from lamina.platform.checkpoints.manifest import ArrayRecord, BadManifest, Manifest
from lamina.platform.checkpoints.names import nest
from lamina.platform.checkpoints.processes import any_process
from lamina.platform.checkpoints.reading import UnreadableError
from lamina.platform.errors import UserError

_MAX_LISTED = 8  # differences and notes that one message lists


class Restored(NamedTuple):
    """What a restore gives."""

    step: int
    state: Any
    extra: dict[str, Any]  # as given to save; JSON turns tuples into lists
    notes: tuple[str, ...]  # one sentence on each newer checkpoint that was skipped, newest first


def list_steps(directory: epath.PathLike) -> tuple[int, ...]:
    """Steps of the complete checkpoints in a folder, ascending; changes nothing there.

    A folder that does not exist holds none.
    """
    return tuple(sorted({e.step for e in folders.complete(folders.normal(directory))}))


def restore_subtree(
    directory: epath.PathLike,
    prefixes: str | Sequence[str],
    *,
    step: int | None = None,
    shardings: Callable[[str, ArrayRecord], Sharding | None] | None = None,
) -> Restored:
    """Reads parts of a checkpointed state without knowing the rest; changes nothing in the folder.

    Only the arrays asked for are read and verified.

    Args:
        directory: the folder of the checkpoints (`<run>/checkpoints`).
        prefixes: which parts: `"params"`, or several: `("params", "model_state")`. A part that the
            checkpoint does not have is an error, unless its prefix ends in "?": `"ema?"`.
        step: which step. Default: the newest that verifies.
        shardings: where an array goes, from its name and record. Default: numpy arrays on the host
            (typed keys: on the default device).

    Returns:
        `state` holds nested dicts, all keys strings (a list's positions too): the parts at their
        places, `state["params"]["dense"]["kernel"]`.

    Raises:
        UserError: there is no checkpoint, none of this step, none that is whole, or not this part.
    """
    path = folders.normal(directory)
    prefixes = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)

    def select(found: Manifest) -> tuple[dict[str, ArrayRecord], dict[str, Sharding | None]]:
        records: dict[str, ArrayRecord] = {}
        for prefix in prefixes:
            stem = prefix.removesuffix("?")
            part = {n: r for n, r in found.arrays.items() if n == stem or n.startswith(f"{stem}/")}
            if not part and stem == prefix:
                parts = sorted({name.split("/")[0] for name in found.arrays})
                raise UserError(
                    f"the checkpoint of step {found.step} in {path} has no {prefix!r}; "
                    f"it has {', '.join(parts)}"
                )
            records |= part
        places = {n: shardings(n, r) if shardings else None for n, r in records.items()}
        return records, places

    result = newest_good(path, step, select)
    if result is None:
        raise UserError(f"there is no checkpoint in {path}")
    _, found, flat, notes = result
    return Restored(found.step, nest(flat), found.extra, tuple(text for _, text in notes))


Select = Callable[[Manifest], tuple[dict[str, ArrayRecord], dict[str, Sharding | None]]]


def newest_good(
    directory: epath.Path, step: int | None, select: Select
) -> tuple[str, Manifest, dict[str, Any], list[tuple[str, str]]] | None:
    """The newest checkpoint that verifies: name, manifest, leaves, (name, note) of the skipped.

    Raises:
        UserError: there is no checkpoint of `step`, or none verifies.
    """
    found_folders = sorted(folders.listing(directory), reverse=True)
    if step is not None:
        chosen = [f for f in found_folders if f[0] == step]
        if not chosen:
            there = ", ".join(map(str, sorted({s for s, _, _ in found_folders}))) or "none"
            raise UserError(
                f"there is no checkpoint of step {step} in {directory} (steps: {there})"
            )
        found_folders = chosen
    if not found_folders:
        return None
    notes: list[tuple[str, str]] = []
    for folder_step, _, name in found_folders:
        folder = directory / name
        try:
            found = manifest.read(folder)
            renamed = found.step != folder_step
            problem = f"has been renamed: it holds step {found.step}" if renamed else ""
        except BadManifest as error:
            found, problem = None, str(error)
        if not any_process(bool(problem)):
            assert found is not None
            records, shardings = select(found)
            flat, problem = _read_verified(folder, records, shardings)
            if not problem:
                return name, found, flat, notes
        notes.append((name, f"checkpoint {folder} {problem or 'is unreadable in another process'}"))
    lines = "\n".join(f"  {text}" for _, text in notes[:_MAX_LISTED])
    which = "every checkpoint" if step is None else f"the checkpoint of step {step}"
    raise UserError(f"{which} in {directory} is damaged; nothing was deleted:\n{lines}")


def _read_verified(
    folder: epath.Path,
    records: dict[str, ArrayRecord],
    shardings: dict[str, Sharding | None],
) -> tuple[dict[str, Any], str]:
    """The leaves, and what is wrong with them (then empty)."""
    problem = ""
    data: dict[str, Any] = {}
    with jax.transfer_guard("allow"):
        try:
            data = arrays_lib.read(folder, records, shardings)
        except UnreadableError as error:
            problem = f"can't be read ({str(error)[:300]})"
        if any_process(bool(problem)):
            return {}, problem or "can't be read by another process"
        wrong = [n for n, r in records.items() if not arrays_lib.check_data(data[n], r)]
        if not wrong:
            placed = {n: a for n, a in data.items() if isinstance(a, jax.Array)}
            sums = checksum.checksums(placed)
            for name, value in data.items():
                if name not in placed:
                    sums[name] = checksum.partial_sum(value, (0,) * value.ndim, value.shape)
            wrong = [n for n, r in records.items() if sums[n] != r.checksum]
        if wrong:
            more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
            names = ", ".join(wrong[:_MAX_LISTED])
            return {}, f"is damaged: changed bits in the array(s) {names}{more}"
        return {n: arrays_lib.as_leaf(data[n], r) for n, r in records.items()}, ""


def other_model(directory: epath.Path, step: int, lines: list[str]) -> str:
    """The message on a checkpoint whose arrays aren't those of the state asked for."""
    listed = "\n".join(f"  {line}" for line in lines[:_MAX_LISTED])
    more = f"\n  and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
    return (
        f"the checkpoint of step {step} in {directory} was made by another model, optimizer or "
        f"number of seeds than this config describes:\n{listed}{more}"
    )
