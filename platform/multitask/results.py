"""What came of a merge of tasks: the numbers of `result.json` that reports draw."""

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.platform.multitask import cells
from lamina.platform.multitask.cells import Cell
from lamina.platform.reporting import records


def summarise(
    known: Mapping[str, Sequence[Cell]],
    chosen: Mapping[str, Mapping[str, Any]],
    metric: str,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Returns the result of all rows.

    Args:
        known: row ("individual", "pretrained" or a method) to its cell for each seed.
        chosen: method to the chosen point.
        metric: of the table.
        seeds: their values.

    Returns:
        "final" has for each row the test metric's mean over tasks, and the mean of what is left of
        each task's own model ("normalised"); "methods" has the rows of the table.
    """
    final, rows = {}, []
    for name, found in known.items():
        scores = [cell.scores["test"] for cell in found]
        own = [cell.scores["test"] for cell in known["individual"]]
        tasks = {
            task: records.summary([one[task][metric] for one in scores])._asdict()
            for task in scores[0]
        }
        shares = [cells.normalised(s, o, metric) for s, o in zip(scores, own, strict=True)]
        normalised = {
            task: records.summary([one[task] for one in shares])._asdict() for task in scores[0]
        }
        mean = records.summary([cells.mean(one, metric) for one in scores])._asdict()
        left = records.summary([sum(one.values()) / len(one) for one in shares])._asdict()
        final[f"test/{name}"], final[f"test/{name}_normalised"] = mean, left
        row = {
            "row": name,
            "keys": dict(chosen.get(name, {})),
            "mean": mean,
            "normalised_mean": left,
            "tasks": tasks,
            "normalised": normalised,
            "validation": records.summary(
                [cells.mean(cell.scores["validation"], metric) for cell in found]
            )._asdict(),
            "seconds": records.summary([cell.seconds for cell in found])._asdict(),
            "bytes": max(cell.bytes for cell in found),
        }
        if found[0].coefficients:
            row |= {"coefficients": found[0].coefficients, "losses": found[0].losses}
        rows.append(row)
    return {"final": final, "methods": rows, "seed_of_coefficients": seeds[0]}
