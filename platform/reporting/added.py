"""Seeds added to a finished run: each addition is a run in a sub-folder, and its numbers join."""

from collections.abc import Sequence
from typing import Any

from lamina.platform.reporting import folder, records, storage
from lamina.platform.reporting.storage import PathLike

PREFIX = "seeds_"
_SHOWN = 8  # seeds in the name of a folder


def sub_folder(workdir: PathLike, seeds: Sequence[int]) -> Any:
    """The folder in which a finished run trains further seeds: `seeds_1_2`.

    Args:
        workdir: the run folder.
        seeds: the values of the new seeds.
    """
    more = f"_and_{len(seeds) - _SHOWN}_more" if len(seeds) > _SHOWN else ""
    name = PREFIX + "_".join(map(str, seeds[:_SHOWN])) + more
    return storage.as_path(workdir) / name


def find(workdir: PathLike, seed: int) -> Any:
    """The folder of the addition that trained a seed; None where the run itself did."""
    for sub in storage.as_path(workdir).glob(f"{PREFIX}*"):
        if seed in folder.read_config(sub).get("seeds", ()) and (sub / folder.RESULT).exists():
            return sub
    return None


def join(workdir: PathLike, sub: PathLike, seeds: Sequence[int]) -> None:
    """Joins the numbers of a finished addition to those of its run; doing it again changes nothing.

    Args:
        workdir: the run folder.
        sub: the folder of the addition.
        seeds: all seeds, in the order of the final values.
    """
    root, name = storage.as_path(workdir), storage.as_path(sub).name
    new = set(folder.read_config(sub).get("seeds", ()))
    entries = [entry for entry in folder.read_metrics(root) if entry.seed not in new]
    entries += folder.read_metrics(sub)
    storage.write_bytes(root / folder.METRICS, records.lines(entries))
    result, part = folder.read_result(root) or {}, folder.read_result(sub) or {}
    result["final"] = records.summarise(entries, seeds=seeds)
    result["diverged"] = {**result.get("diverged", {}), **part.get("diverged", {})}
    result["added"] = [*(other for other in result.get("added", ()) if other != name), name]
    folder.write_result(root, result)
