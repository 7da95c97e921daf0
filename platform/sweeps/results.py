"""What a sweep knows of its trials: `sweep.jsonl`, a folder for each trial, and `best.json`."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lamina.platform import config as configs
from lamina.platform.errors import UserError
from lamina.platform.reporting import folder, records, storage
from lamina.platform.sweeps.members import Ended, Finished
from lamina.platform.sweeps.planning import Trial

TABLE = "sweep.jsonl"
BEST = "best.json"
TRIALS = "trials"

Row = dict[str, Any]
"""One line of the table: "trial", "values", "state" ("done" or "diverged"), "score" (the selection
metric's mean over seeds, None of a diverged trial), "final", "diverged" (seed to step), "seconds"
(this trial's share of the time that its unit took)."""


def read(workdir: str) -> dict[int, Row]:
    """Returns the rows of the finished trials, by number.

    Raises:
        UserError: a line is no row.
    """
    path = storage.as_path(workdir) / TABLE
    found = {}
    for number, line in enumerate((storage.read_bytes(path) or b"").splitlines(), start=1):
        try:
            row = json.loads(line)
            found[int(row["trial"])] = row
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}, is no trial: {error!r}") from error
    return found


def write(workdir: str, rows: Mapping[int, Row]) -> None:
    """Replaces the table."""
    lines = [json.dumps(storage.plain(rows[number]), allow_nan=False) for number in sorted(rows)]
    storage.write_text(storage.as_path(workdir) / TABLE, "".join(f"{line}\n" for line in lines))


def of_unit(finished: Finished, metric: str) -> list[tuple[Trial, list[Ended], Row]]:
    """Returns each trial of a unit with its members and its row."""
    by_trial: dict[int, list[Ended]] = {}
    for ended in finished.ended:
        by_trial.setdefault(ended.member.trial.number, []).append(ended)
    busy = sum(ended.seconds for ended in finished.ended) or 1.0
    found = []
    for number, members in by_trial.items():
        trial = members[0].member.trial
        all_records = [entry for ended in members for entry in ended.records]
        final = records.summarise(all_records, seeds=trial.config.seeds)
        bad = {str(e.member.seed): e.nonfinite_step for e in members if e.nonfinite_step >= 0}
        score = None if bad else final.get(metric, {}).get("mean")
        row = {
            "trial": number,
            "values": dict(trial.values),
            "state": "diverged" if bad else "done",
            "score": score,
            "final": final,
            "diverged": bad,
            "seconds": finished.seconds * sum(e.seconds for e in members) / busy,
        }
        found.append((trial, members, row))
    return found


def folder_of(workdir: str, trial: Trial) -> str:
    """Returns the folder of a trial."""
    return os.path.join(workdir, TRIALS, f"{trial.number:03d}")


def write_trial(path: str, trial: Trial, members: Sequence[Ended], row: Row) -> None:
    """Writes the folder of a trial: a run without checkpoints, to list, report and compare."""
    root = storage.as_path(path)
    folder.write_config(root, configs.to_json(trial.config))
    entries = [entry for ended in members for entry in ended.records]
    storage.write_bytes(root / folder.METRICS, records.lines(entries))
    folder.write_result(
        root, {"final": row["final"], "diverged": row["diverged"], "seconds": row["seconds"]}
    )
    steps = ", ".join(f"seed {seed} at step {step}" for seed, step in row["diverged"].items())
    message = f"the loss was no longer finite: {steps}" if steps else ""
    folder.write_status(root, row["state"], message)


def ranked(rows: Iterable[Row], mode: str) -> list[Row]:
    """Returns the rows from the best to the worst; without a score come last, by number.

    Args:
        rows: of the table.
        mode: "max" or "min".
    """
    sign = -1.0 if mode == "max" else 1.0

    def place(row: Row) -> tuple[float, int]:
        score = row["score"]
        if score is None or not math.isfinite(score):
            return math.inf, row["trial"]
        return sign * score, row["trial"]

    return sorted(rows, key=place)


def summary(rows: Mapping[int, Row], mode: str) -> dict[str, Any]:
    """Returns what the result says of the trials as a whole."""
    scores = [row["score"] for row in rows.values() if row["score"] is not None]
    diverged = sum(row["state"] == "diverged" for row in rows.values())
    found: dict[str, Any] = {"trials": len(rows), "diverged_trials": diverged}
    if scores:
        found["best_score"] = max(scores) if mode == "max" else min(scores)
        found["median_score"] = statistics.median(scores)
    return found
