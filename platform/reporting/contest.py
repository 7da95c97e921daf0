"""The sections of a shoot-out's report: scores, profiles, times with their misses, curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lamina.platform.reporting import curves, formats, page
from lamina.platform.reporting.charts import Line, chart
from lamina.platform.reporting.page import Panel, panel
from lamina.platform.reporting.stairs import Stairs, staircase

MISS = "∞"
LARGEST = 4.0
"""Where the profiles end; see `lamina.platform.sweeps.scoring`."""


def build(standings: Mapping[str, Any]) -> list[Panel]:
    """Returns the panels of a shoot-out.

    Args:
        standings: of its result, as JSON holds them: a missed target is null.
    """
    workloads = list(standings["targets"])
    optimizers = standings.get("ranked") or list(standings["fresh"])
    panels = [_ranking(standings, optimizers)] if standings.get("ranked") else []
    panels += [_times(standings, optimizers, workloads), _curves(standings, optimizers, workloads)]
    if len(workloads) > 1 and standings.get("ranked"):
        panels.append(_without(standings, optimizers))
    panels += [
        _tuning(standings, optimizers, workloads),
        _cost(standings, optimizers, workloads),
        _targets(standings, optimizers, workloads),
    ]
    return panels


def _ranking(s: Mapping[str, Any], optimizers: Sequence[str]) -> Panel:
    clock = s["clock"]
    number = "{:.3f}".format
    rows = []
    for name in optimizers:
        low, high = s["fresh_score_interval"][name]
        rows.append(
            [
                name,
                number(s["score"]["steps"][name]),
                number(s["score"]["seconds"][name]),
                number(s["fresh_score"][clock][name]),
                f"{low:.3f} to {high:.3f}",
            ]
        )
    stairs = [
        Stairs(name, slot, *_profile(list(s["ratios"][name].values())))
        for slot, name in enumerate(optimizers)
    ]
    svg = staircase(stairs, "times the fastest", "Performance profiles")
    drawn = {"name": f"Share of workloads solved within a multiple of the fastest {clock}"}
    heads = ["optimizer", "score (steps)", "score (seconds)", f"fresh seeds ({clock})", "interval"]
    note = (
        "A score is the integral of the profile from 1 to 4, over 3: 1 is the fastest on every "
        "workload, 0 is never within four times the fastest. Scores are of the tuned trials, as "
        "AlgoPerf has them, and of the best point's fresh seeds (median over seeds, and 95% "
        f"bootstrap interval over them). The order is that of the {clock}."
    )
    charts = [{**drawn, "svg": page.markup(svg)}] if svg else []
    return panel("Ranking", heads, rows, note, charts)


def _profile(ratios: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Returns where a profile rises, and to what; it begins at 1 and ends at `LARGEST`."""
    known = sorted(ratio for ratio in ratios if ratio is not None and ratio <= LARGEST)
    x = [1.0, *known, LARGEST]
    y = [sum(r <= place for r in known) / len(ratios) for place in x]
    return np.array(x), np.array(y)


def _times(s: Mapping[str, Any], optimizers: Sequence[str], workloads: Sequence[str]) -> Panel:
    rows = []
    for workload in workloads:
        for name in optimizers:
            own, fresh = s["times"], s["fresh"][name][workload]
            low, high = map(_time, fresh["steps"]["interval"])
            met = sum(value is not None for value in fresh["steps"]["values"])
            rows.append(
                [
                    workload,
                    f"{name} ★" if s["winners"].get(workload) == name else name,
                    _time(own["steps"][name][workload]),
                    _time(own["seconds"][name][workload]),
                    _time(fresh["steps"]["median"]),
                    f"{low} to {high}",
                    f"{met} of {len(fresh['steps']['values'])}",
                    _time(fresh["seconds"]["median"]),
                ]
            )
    heads = [
        "workload",
        "optimizer",
        "steps, tuned",
        "seconds, tuned",
        "steps, fresh seeds",
        "interval",
        "seeds that met it",
        "seconds, fresh seeds",
    ]
    note = (
        f"To the target; {MISS} is a miss. Tuned: the median over studies of the fastest trial. "
        "Fresh seeds: the median of the best point, with the 95% bootstrap interval of the median. "
        f"★ An optimizer wins a workload if its interval of {s['clock']} lies below all others. "
        "Seconds are those of the training steps, without evaluations (which a stream's program "
        "has among its steps) and compiling."
    )
    return panel("Time to the target", heads, rows, note)


def _curves(s: Mapping[str, Any], optimizers: Sequence[str], workloads: Sequence[str]) -> Panel:
    charts = []
    for workload in workloads:
        lines = []
        for slot, name in enumerate(optimizers):
            own = s["curves"][workload][name]
            values = np.array([np.nan if v is None else v for v in own["values"]])
            steps = np.asarray(own["steps"])
            if len(steps) > 1:
                lines.append(Line(name, slot, curves.Curve(steps, values, np.zeros(len(steps)), 1)))
        title = f"{workload}: {s['targets'][workload]['metric']}"
        svg = chart(lines, f"{title} over steps") if lines else ""
        if svg:
            charts.append({"name": title, "svg": page.markup(svg)})
    note = "The best point of each optimizer: median over fresh seeds."
    return panel("Curves", [], [], note if charts else "", charts)


def _without(s: Mapping[str, Any], optimizers: Sequence[str]) -> Panel:
    left = list(s["without"])
    rows = [[name, *(f"{s['without'][w][name]:.3f}" for w in left)] for name in optimizers]
    note = f"The score ({s['clock']}) if one workload is left out: a ranking that turns isn't one."
    return panel("Without one workload", ["optimizer", *(f"no {w}" for w in left)], rows, note)


def _tuning(s: Mapping[str, Any], optimizers: Sequence[str], workloads: Sequence[str]) -> Panel:
    rows = []
    for name in optimizers:
        own = s["tuning"][name]
        cells = []
        for workload in workloads:
            point = s["best_points"][name][workload].values()
            lost = s["diverged"][name][workload]
            text = f"{s['sensitivity'][name][workload]:.0%}; {', '.join(map(page.value, point))}"
            cells.append(text + (f"; {lost} diverged" if lost else ""))
        rows.append([name, ", ".join(own["keys"]), f"{own['studies']} x {own['trials']}", *cells])
    note = "Of each workload: the share of trials that met the target, and the best point."
    heads = ["optimizer", "tuned", "studies x trials", *workloads]
    return panel("Tuning and sensitivity", heads, rows, note)


def _cost(s: Mapping[str, Any], optimizers: Sequence[str], workloads: Sequence[str]) -> Panel:
    rows = []
    for name in optimizers:
        own = [s["cost"][name][workload] for workload in workloads]
        shown = (
            f"{formats.number(c['step_milliseconds'], 3)} ms, {formats.size(c['state_bytes'])}"
            for c in own
        )
        rows.append([name, *shown])
    note = "A step of one seed on its device or core, beside others, and the optimizer's state."
    return panel("Cost", ["optimizer", *workloads], rows, note)


def _targets(s: Mapping[str, Any], optimizers: Sequence[str], workloads: Sequence[str]) -> Panel:
    rows = []
    for workload in workloads:
        own = s["targets"][workload]
        sign = "≥" if own["mode"] == "max" else "≤"
        target = f"{own['metric']} {sign} {formats.number(own['target'])}"
        early = (formats.number(own["early"][name]) for name in optimizers)
        rows.append([workload, target, f"{own['steps']:,}", *early])
    note = (
        "Of each optimizer: the best value in the first three quarters of the steps, median over "
        "fresh seeds. Targets are made of such values, once, and then frozen."
    )
    return panel("Targets", ["workload", "target", "steps", *optimizers], rows, note)


def _time(value: float | None) -> str:
    return formats.number(value, 3, MISS)
