"""The report of a run: one HTML file that needs no network, made from the run folder."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.platform.reporting import (
    curves,
    folder,
    formats,
    manifest,
    page,
    panels,
    records,
    storage,
)
from lamina.platform.reporting.charts import Line, chart
from lamina.platform.reporting.drawing import COLOURS
from lamina.platform.reporting.storage import PathLike

CHART_BYTES = 190_000  # what keeps a page below 300 KB with everything else at its limit
PARAMETER_ROWS = 150
SAMPLES = 12
TEXT_LIMIT = 2_000
IMAGE_LIMIT = 60_000
DIFF_LIMIT = 12_000
EXTRA_ROWS = 40
SPLIT_COLOURS = {"train": 0, "validation": 1, "test": 2}


def render(workdir: PathLike) -> Any:
    """Writes `report.html` into a run folder, from whatever of its files there are.

    Args:
        workdir: the run folder, of a run in any state.

    Returns:
        The report's path.

    Raises:
        UserError: a file of the folder is corrupt; the message names it.
    """
    path = storage.as_path(workdir) / folder.REPORT
    storage.write_text(path, build(workdir))
    return path


def build(workdir: PathLike) -> str:
    """The report as HTML; the same text for the same files.

    Args:
        workdir: the run folder.

    Returns:
        A whole page without scripts or links to other files, below about 300 KB.

    Raises:
        UserError: a file of the folder is corrupt.
    """
    config = folder.read_config(workdir)
    status = folder.read_status(workdir)
    result = folder.read_result(workdir)
    entries = folder.read_metrics(workdir)
    made_with = manifest.read(workdir)
    seeds = config.get("seeds") or sorted({entry.seed for entry in entries}) or [0]
    final = (result or {}).get("final")
    finished = isinstance(final, Mapping)
    rows = page.final_rows(final if finished else records.summarise(entries), len(seeds))
    known = result or {}
    seconds = known.get("seconds") or max((entry.time for entry in entries), default=None)
    drawn, undrawn = draw(curves.collect(entries))
    samples, samples_left = _samples(workdir)
    return page.render(
        "report.html",
        title=str(config.get("name") or storage.as_path(workdir).name or "Run"),
        workdir=str(workdir),
        state=re.sub(r"\W", "", str(status.get("state", ""))),
        message=str(status.get("message") or ""),
        lead=_lead(config),
        figures=_headline(rows, config, entries, seconds, len(seeds)),
        finished=finished,
        final=rows,
        seeds=list(seeds),
        several=len(seeds) > 1,
        charts=drawn,
        undrawn=undrawn,
        bands=len(seeds) > 1 and bool(drawn),
        matrix=page.matrix(known.get("accuracy")),
        panels=panels.build(workdir, config, known),
        activations=panels.activations(workdir),
        speed=speed(known),
        phases=_phases(known.get("phases")),
        samples=samples,
        samples_left=samples_left,
        extra=_extra(result or {}),
        **_config(config, storage.read_object(storage.as_path(workdir) / folder.DEFAULTS)),
        parameters=parameters(storage.read_json(storage.as_path(workdir) / folder.PARAMETERS, [])),
        environment=_environment(made_with),
        command=" ".join(map(str, made_with.get("command") or [])),
        diff=_cut(str((made_with.get("git") or {}).get("diff") or ""), DIFF_LIMIT),
        version=str((made_with.get("packages") or {}).get("lamina") or ""),
    )


def draw(
    collected: Mapping[str, Mapping[str, curves.Curve]],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Draws one chart per metric, as long as the page stays small.

    Args:
        collected: curves by metric and split.

    Returns:
        The charts for the template, and the names of metrics for which there was no room.
    """
    drawn: list[dict[str, Any]] = []
    undrawn: list[str] = []
    used = 0
    for name, splits in collected.items():
        if all(len(curve.steps) < 2 for curve in splits.values()):
            continue  # a single number is in the table
        if used >= CHART_BYTES:
            undrawn.append(name)
            continue
        others = [split for split in splits if split not in SPLIT_COLOURS]
        slots = {**SPLIT_COLOURS, **{split: 3 + place for place, split in enumerate(others)}}
        lines = [Line(split, slots[split], curve) for split, curve in splits.items()]
        svg = chart(lines, f"{name} over steps: {', '.join(splits)}")
        notes = [
            f"{split}: seed {seed} is not finite at step {step}"
            for split, curve in splits.items()
            for seed, step in curve.lost[:8]
        ]
        if svg or notes:
            used += len(svg)
            log = bool(svg) and curves.wants_log(list(splits.values()))
            drawn.append({"name": name, "svg": page.markup(svg), "log": log, "notes": notes})
    return drawn, undrawn


def parameters(rows: Any) -> dict[str, Any]:
    """The parameter table's rows and totals, from the content of `parameters.json`.

    Args:
        rows: list of {"path", "shape", "dtype", "axes", "sharding", "bytes"}; what is missing in a
            row stays empty.

    Returns:
        "rows" (at most `PARAMETER_ROWS`, as text), "left" (rows that are not shown), "total_rows",
        "count" (all parameters) and "bytes" (of all).
    """
    rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    counts = [math.prod(row.get("shape") or []) for row in rows]
    shown = [
        {
            "path": str(row.get("path", "")),
            "shape": page.shape(row.get("shape")),
            "dtype": str(row.get("dtype", "")),
            "axes": ", ".join(str(axis) for axis in row.get("axes") or []),
            "sharding": str(row.get("sharding") or ""),
            "count": f"{count:,}",
            "bytes": row.get("bytes") or 0,
        }
        for row, count in zip(rows[:PARAMETER_ROWS], counts, strict=False)
    ]
    return {
        "rows": shown,
        "left": len(rows) - len(shown),
        "total_rows": len(rows),
        "count": f"{sum(counts):,}",
        "bytes": sum(row.get("bytes") or 0 for row in rows),
    }


def blocks(config: Mapping[str, Any], first: str) -> list[dict[str, Any]]:
    """A nested mapping as titled blocks of rows: plain values first, then a block per mapping.

    Args:
        config: the mapping.
        first: the title of the block of plain values.

    Returns:
        [{"name", "rows": [{"key", "path" (dotted), "text", "changed" (False)}]}]
    """
    found = []
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    for name, values in ((first, plain), *((k, v) for k, v in config.items() if k not in plain)):
        prefix = "" if values is plain else f"{name}."
        rows = [
            {"key": key, "path": f"{prefix}{key}", "text": page.value(value), "changed": False}
            for key, value in storage.flatten(values).items()
        ]
        if rows:
            found.append({"name": name, "rows": rows})
    return found


def _config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    shown = blocks(config, "experiment")
    if not defaults:
        for block in shown:
            for row in block["rows"]:
                row["changed"] = False
        return {"config": shown, "changes": None}
    before, now = storage.flatten(defaults), storage.flatten(config)
    for block in shown:
        for row in block["rows"]:
            path = row["path"]
            row["changed"] = path not in before or before[path] != now[path]
            row["before"] = page.value(before[path]) if path in before else "not in the file"
    changes = sum(row["changed"] for block in shown for row in block["rows"])
    return {"config": shown, "changes": changes}


def _lead(config: Mapping[str, Any]) -> str:
    """What was trained on what, in a line: the names of the config's blocks."""
    words = [str(config["program"])] if config.get("program") else []
    for block in ("model", "data", "optimizer", "learner", "merge", "sweep"):
        value = config.get(block)
        if isinstance(value, Mapping) and value.get("name"):
            words.append(str(value["name"]))
    return " · ".join(words)


def _figure(label: str, value: str, unit: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "unit": unit}


def _headline(
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    entries: Sequence[records.Record],
    seconds: float | None,
    seeds: int,
) -> list[dict[str, str]]:
    """The few numbers that a reader looks for first."""
    figures = []
    best = page.rank(rows[0]["split"]) if rows else 0
    for row in [row for row in rows if page.rank(row["split"]) == best][:2]:
        spread = row["std"] is not None and seeds > 1
        unit = f"± {formats.with_decimals(row['std'], row['mean'])}" if spread else ""
        label = " ".join(word for word in (row["split"], row["metric"]) if word)
        figures.append(_figure(label, formats.number(row["mean"]), unit))
    step = max((entry.step for entry in entries), default=0)
    steps = config.get("steps")
    if step or steps:
        of = f"of {steps:,}" if isinstance(steps, int) and steps != step else ""
        figures.append(_figure("steps", f"{step:,}", of))
    if seeds > 1:
        figures.append(_figure("seeds", str(seeds)))
    if seconds:
        figures.append(_figure("time", formats.duration(seconds)))
    return figures


PERCENT = "{:.1%}".format
SPEED = (
    ("steps_per_second", "steps a second", formats.compact),
    ("examples_per_second", "examples a second", formats.compact),
    ("examples_per_second_per_device", "examples a second and device", formats.compact),
    ("tokens_per_second", "tokens a second", formats.compact),
    ("tokens_per_second_per_device", "tokens a second and device", formats.compact),
    ("model_flops_per_step", "model FLOPs a step", formats.compact),
    ("model_flops_per_second_per_device", "model FLOP/s and device", formats.compact),
    ("mfu", "MFU", PERCENT),
    ("goodput", "goodput", PERCENT),
    ("checkpoint_stall_seconds", "stalled by checkpoints", formats.duration),
    ("seconds", "without compiling", formats.duration),
    ("compile_seconds", "compiling", formats.duration),
    ("energy_joules", "processor energy", lambda value: f"{formats.compact(value)}J"),
)
"""Keys of the result, their labels, and how their numbers are written."""


def speed(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a result says of a run's speed, as figures."""
    return [
        _figure(label, show(result[key]))
        for key, label, show in SPEED
        if isinstance(result.get(key), int | float)
    ]


def _phases(phases: Any) -> list[dict[str, Any]]:
    phases = phases if isinstance(phases, Mapping) else {}
    known = {name: value for name, value in phases.items() if isinstance(value, int | float)}
    total = sum(known.values())
    return [
        {
            "name": name,
            "seconds": seconds,
            "share": f"{seconds / total:.4f}",
            "slot": place % COLOURS,
        }
        for place, (name, seconds) in enumerate(sorted(known.items(), key=lambda item: -item[1]))
        if seconds > 0
    ]


def _samples(workdir: PathLike) -> tuple[list[dict[str, str]], int]:
    found = storage.read_json(storage.as_path(workdir) / folder.SAMPLES, [])
    found = [entry for entry in found if isinstance(entry, Mapping)] if found else []
    shown = []
    for entry in found[:SAMPLES]:
        image = str(entry.get("png_base64") or "")
        text = _cut(str(entry.get("text") or ""), TEXT_LIMIT)
        if image and (len(image) > IMAGE_LIMIT or not re.fullmatch(r"[A-Za-z0-9+/=]+", image)):
            image, text = "", "(an image that is too large for this page, or no PNG in base64)"
        shown.append({"title": str(entry.get("title", "")), "text": text, "image": image})
    return shown, len(found) - len(shown)


def _extra(result: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of the result that no other section shows."""
    shown = {"final", "phases", "accuracy", "shootout", *(key for key, _, _ in SPEED)}
    rest = {key: value for key, value in result.items() if key not in shown}
    flat = storage.flatten(rest)
    plain = {k: v for k, v in flat.items() if isinstance(v, int | float | str) and str(v)}
    return dict(list(plain.items())[:EXTRA_ROWS])


def _environment(made_with: Mapping[str, Any]) -> list[dict[str, Any]]:
    git = made_with.get("git") or {}
    machine = {key: made_with.get(key) for key in ("host", "platform", "python", "folder")}
    machine["time"] = str(made_with.get("time") or "")[:16].replace("T", " ")
    code: dict[str, Any] = {"revision": str(git.get("revision", ""))[:12]}
    if git:
        code["changes"] = "uncommitted changes" if git.get("diff") else "none"
        code["untracked files"] = len(git.get("untracked") or [])
    code["parents"] = made_with.get("parents")
    groups = {
        "machine": machine,
        "devices": made_with.get("devices") or {},
        "mesh": made_with.get("mesh") or {},
        "packages": made_with.get("packages") or {},
        "code": code,
    }
    filled = {
        name: {key: value for key, value in values.items() if value not in (None, "", [])}
        for name, values in groups.items()
        if isinstance(values, Mapping)
    }
    return blocks({name: values for name, values in filled.items() if values}, "manifest")


def _cut(text: str, limit: int) -> str:
    return (
        text if len(text) <= limit else f"{text[:limit]}\n… ({len(text) - limit:,} more characters)"
    )
