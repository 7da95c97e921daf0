"""The cells of a shoot-out: what the trials of a study, or fresh seeds, have measured.

A cell is one JSON file, `cells/WORKLOAD/OPTIMIZER/study_0.json` or `.../fresh.json`, written whole.
Steps and seconds to the target are null where the target was missed.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.platform.reporting import records, storage
from lamina.platform.sweeps import scoring
from lamina.platform.sweeps.members import Ended
from lamina.platform.sweeps.pairs import Pair

CELLS = "cells"
BEST = "best"
FRESH = "fresh"
BUDGET_SHARE = 0.75
"""Share of the steps within which a target shall have been reached by those that it is made from
(AlgoPerf's, arXiv 2306.07179)."""

Cell = dict[str, Any]


def folder_of(workdir: str, pair: Pair) -> str:
    """Returns the folder of a pair's cells."""
    return os.path.join(workdir, CELLS, pair.workload, pair.optimizer)


def best_folder_of(workdir: str, pair: Pair) -> str:
    """Returns the run folder of a pair's best point."""
    return os.path.join(workdir, BEST, pair.workload, pair.optimizer)


def name_of(study: int | None) -> str:
    """Returns a cell's name; None: of the fresh seeds."""
    return FRESH if study is None else f"study_{study}"


def read(workdir: str, pair: Pair, study: int | None) -> Cell | None:
    """Returns a cell, or None if it isn't there yet.

    Raises:
        UserError: the file is corrupt.
    """
    path = os.path.join(folder_of(workdir, pair), f"{name_of(study)}.json")
    found = storage.read_json(path, None)
    return found if isinstance(found, dict) else None


def write(workdir: str, pair: Pair, study: int | None, cell: Cell) -> None:
    """Writes a cell."""
    path = os.path.join(folder_of(workdir, pair), f"{name_of(study)}.json")
    storage.write_json(path, storage.plain(cell))


def make(pair: Pair, by_trial: Mapping[int, Sequence[Ended]]) -> Cell:
    """Returns the cell of trials that have ended.

    Args:
        pair: whose trials.
        by_trial: number to the trial's members.
    """
    return {
        "workload": pair.workload,
        "optimizer": pair.optimizer,
        "metric": pair.metric,
        "target": pair.target,
        "of_steps": pair.parts.steps,
        "trials": [_trial(pair, number, by_trial[number]) for number in sorted(by_trial)],
    }


def _trial(pair: Pair, number: int, members: Sequence[Ended]) -> dict[str, Any]:
    split, _, name = pair.metric.rpartition("/")
    steps, total = pair.parts.steps, members[0].member.trial
    own = [[r for r in m.records if (r.split, r.name) == (split, name)] for m in members]
    curve = [r.step for r in own[0]]
    values = [[r.value for r in entries] for entries in own]
    reached = [scoring.to_target(curve, v, pair.target, pair.mode) for v in values]
    within = [step <= BUDGET_SHARE * steps for step in curve]
    early = [[v for v, soon in zip(row, within, strict=True) if soon] for row in values]
    return {
        "trial": number,
        "values": dict(total.values),
        "seeds": [m.member.seed for m in members],
        "steps": [records.finite(step) for step in reached],
        "seconds": [
            records.finite(step / steps * m.seconds)
            for step, m in zip(reached, members, strict=True)
        ],
        "training_seconds": [m.seconds for m in members],
        "diverged": {
            str(m.member.seed): m.nonfinite_step for m in members if m.nonfinite_step >= 0
        },
        "best": [best(row, pair.mode) for row in values],
        "best_early": [best(row, pair.mode) for row in early],
        "last": [row[-1] if row else None for row in values],
        "curve": {"steps": curve, "values": values},
    }


def best(values: Sequence[float | None], mode: str) -> float | None:
    """Returns the best of the values that are finite, or None."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    return max(known) if mode == "max" else min(known)


def times(trial: Mapping[str, Any], clock: str) -> list[float]:
    """Returns a trial's steps or seconds to the target, for each seed; a miss is infinite."""
    return [math.inf if value is None else float(value) for value in trial[clock]]


def best_trial(studies: Sequence[Cell], mode: str) -> dict[str, Any]:
    """Returns the trial that was the first to reach the target, or came nearest to it.

    Args:
        studies: the cells of all studies.
        mode: "max" or "min".
    """
    sign = -1.0 if mode == "max" else 1.0

    def place(trial: Mapping[str, Any]) -> tuple[float, float, int]:
        value = trial["best"][0]
        return times(trial, "steps")[0], math.inf if value is None else sign * value, trial["trial"]

    return min((trial for cell in studies for trial in cell["trials"]), key=place)
