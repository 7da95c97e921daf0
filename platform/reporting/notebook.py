"""What a notebook shows of a result: the final numbers and one small curve, as a bit of HTML."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lamina.platform.reporting import curves, formats, page
from lamina.platform.reporting.records import Record

_WIDTH, _HEIGHT = 260, 56


def result_html(
    final: Mapping[str, Any],
    records: Sequence[Record] = (),
    title: str = "",
    curve: tuple[str, str] = ("", ""),
) -> str:
    """HTML for `_repr_html_`: a table of final numbers beside a sparkline.

    Colours are the notebook's own (currentColor), so light and dark themes both work.

    Args:
        final: {name: {"mean", "std", "values"}}.
        records: the run's records; without any there is no curve.
        title: what stands above; "" for nothing.
        curve: (split, name) of the curve; by default the first recorded metric of the validation
            split, or of the first split there is.

    Returns:
        One `<div>`, without scripts and with every text escaped.
    """
    rows = "".join(
        f'<tr><td style="text-align:left">{html.escape(_name(row))}</td>'
        f'<td style="text-align:right">{html.escape(formats.number(row["mean"]))}</td>'
        f'<td style="text-align:right;opacity:.65">{html.escape(_spread(row))}</td></tr>'
        for row in page.final_rows(final, 0)
    )
    head = f"<b>{html.escape(title)}</b>" if title else ""
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:1.5em;align-items:center">'
        f'<div>{head}<table style="font-variant-numeric:tabular-nums">{rows}</table></div>'
        f"{sparkline(records, curve)}</div>"
    )


def sparkline(records: Sequence[Record], curve: tuple[str, str] = ("", "")) -> str:
    """One curve as a small SVG with its first and last value; "" where there are no two points."""
    collected = {
        (split, name): found
        for name, splits in curves.collect(records).items()
        for split, found in splits.items()
    }
    wanted = [key for key in collected if key == curve]
    known = wanted or sorted(collected, key=lambda key: key[0] != "validation")
    for split, name in known:
        found = curves.thin(collected[split, name], 120)
        finite = np.isfinite(found.mean)
        steps, values = found.steps[finite], found.mean[finite]
        if len(steps) < 2:
            continue
        heights = np.log(values) if curves.wants_log([found]) else values
        x = (steps - steps[0]) / (steps[-1] - steps[0]) * (_WIDTH - 8) + 4
        y = (heights.max() - heights) / (np.ptp(heights) or 1.0) * (_HEIGHT - 8) + 4
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        label = html.escape(
            f"{split} {name}: {formats.number(float(values[0]))} to "
            f"{formats.number(float(values[-1]))} at step {steps[-1]}"
        )
        return (
            f'<div><svg role="img" aria-label="{label}" width="{_WIDTH}" height="{_HEIGHT}">'
            f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
            f'<circle cx="{x[-1]:.1f}" cy="{y[-1]:.1f}" r="3" fill="currentColor"/></svg>'
            f'<div style="opacity:.65;font-size:.85em">{label}</div></div>'
        )
    return ""


def _name(row: Mapping[str, Any]) -> str:
    return " ".join(part for part in (row["split"], row["metric"]) if part)


def _spread(row: Mapping[str, Any]) -> str:
    return f"± {formats.with_decimals(row['std'], row['mean'])}" if row["std"] else ""
