"""Sections of a report that only some programs have: the trials of a sweep, the shoot-out's score.

`page.panel` says what a panel is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lamina.platform.reporting import (
    charts,
    contest,
    curves,
    drawing,
    folder,
    formats,
    page,
    records,
    storage,
    tables,
)
from lamina.platform.reporting.charts import Line, Scatter, chart, scatter
from lamina.platform.reporting.page import Panel, panel
from lamina.platform.reporting.storage import PathLike

ROWS = 100
CURVES = 6


def build(workdir: PathLike, config: Mapping[str, Any], result: Mapping[str, Any]) -> list[Panel]:
    """Returns the panels of a run, by its program.

    Args:
        workdir: the run folder.
        config: of the run.
        result: of the run; empty if it has none yet.
    """
    program = config.get("program")
    if program == "sweep" and isinstance(result.get("table"), Sequence):
        return _sweep(workdir, result)
    if program == "merge" and isinstance(result.get("methods"), Sequence):
        return _merge(result)
    if program == "shootout" and isinstance(result.get("shootout"), Mapping):
        return contest.build(result["shootout"])
    if program == "rebasin" and isinstance(result.get("panels"), Sequence):
        return [_stored(entry) for entry in result["panels"]]
    return []


def activations(workdir: PathLike) -> list[Panel]:
    """Returns the table of activations of a run that had several devices.

    Args:
        workdir: the run folder.
    """
    rows = storage.read_json(storage.as_path(workdir) / folder.ACTIVATIONS, [])
    table = tables.activation_table([row for row in rows if isinstance(row, Mapping)])
    if not table.rows:
        return []
    note = (
        "Along a mesh axis an activation is split (S, with the dimension), the same everywhere "
        "(B), or a sum that is still to be taken (P). Sizes are of one device."
    )
    heads = [head.lstrip(">") for head in table.columns]
    return [panel("Activations", heads, table.rows, note)]


def _sweep(workdir: PathLike, result: Mapping[str, Any]) -> list[Panel]:
    rows, metric = result["table"], str(result.get("metric", ""))
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    cells = [
        [
            str(row["trial"]),
            *(page.value(row["values"].get(key, "")) for key in keys),
            formats.number(row["score"], missing=row["state"]),
            _spread(row, metric),
        ]
        for row in rows[:ROWS]
    ]
    left = f"{len(rows) - ROWS} more in sweep.jsonl. " if len(rows) > ROWS else ""
    table = panel(
        "Trials, the best first",
        ["trial", *keys, metric, "std over seeds"],
        cells,
        left + "Each has its folder below trials/, to report and compare.",
    )
    drawn = [_over(key, rows, metric) for key in keys]
    charts = [entry for entry in [_best_curves(workdir, rows, metric), *drawn] if entry["svg"]]
    note = "A cross is a trial that diverged." if any(r["score"] is None for r in rows) else ""
    return [panel("Search", charts=charts, note=note), table]


def _spread(row: Mapping[str, Any], metric: str) -> str:
    entry = row["final"].get(metric) or {}
    return formats.number(entry.get("std")) if len(entry.get("values") or []) > 1 else ""


def _over(key: str, rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Draws the score over one key; over the places of its values where they are no numbers."""
    values = [row["values"].get(key) for row in rows]
    score = np.array([np.nan if row["score"] is None else row["score"] for row in rows])
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    if len({page.value(v) for v in values}) < 2:
        return {"name": key, "svg": ""}
    if all(map(number, values)):
        groups = [Scatter(metric, 0, np.array(values, float), score)]
    else:
        names = list(dict.fromkeys(page.value(v) for v in values))
        place = np.array([names.index(page.value(v)) for v in values])
        groups = [
            Scatter(name[:14], i, place[place == i].astype(float), score[place == i])
            for i, name in enumerate(names)
        ]
    svg = scatter(groups, key, f"{metric} over {key}")
    return {"name": f"{metric} over {key}", "svg": page.markup(svg)}


def _best_curves(workdir: PathLike, rows: Sequence[Mapping[str, Any]], metric: str) -> Any:
    split, _, name = metric.rpartition("/")
    lines = []
    for slot, row in enumerate(row for row in rows[:CURVES] if row["score"] is not None):
        path = storage.as_path(workdir) / "trials" / f"{row['trial']:03d}" / folder.METRICS
        found = [r for r in records.read(path) if (r.split, r.name) == (split, name)]
        curve = curves.collect(found).get(name, {}).get(split)
        if curve is not None and len(curve.steps) > 1:
            lines.append(Line(f"trial {row['trial']}", slot, curve))
    svg = chart(lines, f"{metric} of the best trials over steps") if lines else ""
    return {"name": f"{metric} of the best trials", "svg": page.markup(svg) if svg else ""}


def _merge(result: Mapping[str, Any]) -> list[Panel]:
    """The tables of merged models, a radar of their tasks, and what learned ones have learned."""
    rows, tasks, metric = result["methods"], result["tasks"], str(result.get("metric", ""))
    several = len(rows[0]["mean"]["values"]) > 1
    note = "Mean and standard deviation over seeds. " if several else ""
    heads = ["model", "keys", "mean", *tasks]
    return [
        panel("Tasks", charts=_merge_charts(rows, tasks, metric)),
        panel(
            f"Test {metric}",
            heads,
            _merge_cells(rows, tasks, "tasks", "mean", several),
            note + "Keys were chosen on validation.",
        ),
        panel(
            f"Test {metric}, normalised",
            heads,
            _merge_cells(rows, tasks, "normalised", "normalised_mean", several),
            note + "Each task's number over that of its own model.",
        ),
        panel(
            "Cost",
            ["model", f"validation {metric}", "merging", "memory", "objective"],
            [_merge_cost(row) for row in rows],
            "Merging with its compilation; memory of models, base, result and statistics. The "
            "objective of a learned merge at its begin and end, first seed.",
        ),
    ]


def _merge_cells(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], kind: str, mean: str, several: bool
) -> list[list[str]]:
    """Returns a row of texts for each merged model: its keys, its mean, and its tasks."""

    def spread(entry: Mapping[str, Any]) -> str:
        if entry["mean"] is None:
            return "not finite"
        return f"{entry['mean']:.1%}" + (f" ± {entry['std'] * 100:.1f}" if several else "")

    return [
        [
            row["row"],
            ", ".join(f"{k} {page.value(v)}" for k, v in row["keys"].items() if k != "name"),
            spread(row[mean]),
            *[spread(row[kind][task]) for task in tasks],
        ]
        for row in rows
    ]


def _merge_charts(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], metric: str
) -> list[dict[str, Any]]:
    # The first two rows are the tasks' own models and the base.
    best = sorted(rows[2:], key=lambda row: -(row["mean"]["mean"] or 0.0))[: drawing.COLOURS - 1]
    polygons = [
        charts.Polygon(row["row"], slot, [row["tasks"][task]["mean"] for task in tasks])
        for slot, row in enumerate([rows[0], *best])
    ]
    drawn = [{"name": f"test {metric} by task", "svg": charts.radar(polygons, tasks, metric)}]
    for row in rows:
        if row.get("coefficients"):
            svg = charts.coefficients(row["coefficients"], tasks, f"coefficients of {row['row']}")
            drawn.append({"name": f"coefficients of {row['row']}, first seed", "svg": svg})
    return [{**entry, "svg": page.markup(entry["svg"])} for entry in drawn if entry["svg"]]


def _merge_cost(row: Mapping[str, Any]) -> list[str]:
    losses = row.get("losses")
    return [
        row["row"],
        formats.number(row["validation"]["mean"]),
        formats.duration(row["seconds"]["mean"]) if row["bytes"] else "",
        formats.compact(row["bytes"]) + "B" if row["bytes"] else "",
        " → ".join(formats.number(losses[place]) for place in (0, -1)) if losses else "",
    ]


def _stored(stored: Mapping[str, Any]) -> Panel:
    """Returns a panel whose charts are given as the points of lines."""
    charts = []
    for entry in stored.get("charts", ()):
        lines = [
            Line(
                line["label"],
                slot,
                curves.Curve(
                    np.asarray(line["x"]), np.asarray(line["y"], float), np.zeros(len(line["x"])), 1
                ),
            )
            for slot, line in enumerate(entry["lines"])
        ]
        svg = chart(lines, entry["name"])
        if svg:
            charts.append({"name": entry["name"], "svg": page.markup(svg)})
    return {**stored, "charts": charts}
