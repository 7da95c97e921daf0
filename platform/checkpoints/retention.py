"""Which checkpoints to keep: the newest few, and the best by a metric."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Entry(NamedTuple):
    """A complete checkpoint."""

    name: str  # its folder: the step, or "step-n" for its n-th replacement
    step: int
    attempt: int
    metrics: dict[str, float]


def best_entry(entries: Sequence[Entry], criterion: tuple[str, str] | None) -> Entry | None:
    """The entry with the best value of (metric, "min" or "max"); of equal ones the earlier.

    Entries without the metric, or with NaN, never win.
    """
    if criterion is None:
        return None
    metric, mode = criterion
    scored = [e for e in entries if not math.isnan(e.metrics.get(metric, math.nan))]
    sign = 1.0 if mode == "min" else -1.0
    return min(scored, key=lambda e: (sign * e.metrics[metric], e.step), default=None)


def surplus(
    folders: Sequence[tuple[int, int, str]],
    entries: Sequence[Entry],
    bad: Collection[str],
    new_step: int,
    keep: int,
    keep_best: tuple[str, str] | None,
) -> list[str]:
    """Names of the folders to delete, once the checkpoint of `new_step` is complete.

    Kept are the `keep` newest good checkpoints up to `new_step`, the best one, and every later step
    (a run that was taken back must pass a step again before its folder is touched). Damaged folders
    don't count, and go when they are older than all that is kept, or replaced.

    Args:
        folders: (step, attempt, name) of all that lies there, whole or not.
        entries: the complete ones.
        bad: names of those that failed to verify.
        new_step: the step just saved.
        keep: how many of the newest to keep.
        keep_best: (metric, mode) or None.
    """
    good = [e for e in entries if e.name not in bad]
    latest = {e.step: e for e in sorted(good, key=lambda e: e.attempt)}
    newest = sorted((s for s in latest if s <= new_step), reverse=True)[:keep]
    kept = {latest[s].name for s in newest}
    best = best_entry(list(latest.values()), keep_best)
    if best is not None:
        kept.add(best.name)
    oldest = min(newest)
    return [
        name
        for step, attempt, name in folders
        if name not in kept
        and (step < oldest or (step in latest and attempt < latest[step].attempt))
    ]
