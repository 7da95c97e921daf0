"""HTML pages that need nothing but themselves: the templates, and how they show values."""

import functools
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lamina.platform.reporting import formats

PACKAGE = "lamina.platform.reporting"
SPLITS = ("test", "validation", "train")
"""The order of splits in tables: what counts most comes first."""

Panel = dict[str, Any]
"""A section of a report, as `panel` makes it."""


def render(template: str, **context: Any) -> str:
    """Fills a template of this package; every value is escaped unless it is Markup.

    Args:
        template: the file's name.
        **context: the template's variables.

    Returns:
        A whole HTML page with its style inside.
    """
    return _environment().get_template(template).render(style=_style(), **context)


def load(template: str) -> None:
    """Compiles a template ahead of the first page: in a thread, while a run compiles."""
    _environment().get_template(template)


def markup(text: str) -> Any:
    """Marks HTML that we made as not to be escaped."""
    import markupsafe

    return markupsafe.Markup(text)


def panel(
    title: str,
    heads: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    note: str = "",
    charts: Sequence[Mapping[str, Any]] = (),
) -> Panel:
    """Returns a section of a report.

    Args:
        title: its heading.
        heads: of the columns of its table.
        rows: of its table, as texts.
        note: a remark under the table.
        charts: each with its "name" and its "svg", as `markup`.
    """
    return {"title": title, "heads": heads, "rows": rows, "note": note, "charts": charts}


def value(data: Any) -> str:
    """A config value as a person would write it.

    Example:
        >>> value(1e-4), value((0, "a")), value(True), value("")
        ('0.0001', '(0, a)', 'true', '""')
    """
    if isinstance(data, bool):
        return "true" if data else "false"
    if data is None:
        return "none"
    if isinstance(data, str):
        return data or '""'
    if isinstance(data, list | tuple):
        return f"({', '.join(value(entry) for entry in data)})"
    if isinstance(data, Mapping):
        return f"{{{', '.join(f'{key}: {value(entry)}' for key, entry in data.items())}}}"
    return f"{data:g}" if isinstance(data, float) and float(f"{data:g}") == data else str(data)


def rank(split: str) -> int:
    """The place of a split in tables: bare scores first, splits that a program named last."""
    if not split:
        return -1
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)


def final_rows(final: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The rows of a table of final numbers.

    Args:
        final: {"split/metric": {"mean", "std", "values"}}; entries of another form are left out.
        count: how many values a row has; shorter ones are filled up with None.

    Returns:
        Rows of split, metric, mean, std and values, in the order of `SPLITS`, and of metrics
        as they first appear.
    """
    rows = []
    for name, entry in final.items():
        if not isinstance(entry, Mapping):
            continue
        split, _, metric = name.rpartition("/")
        values = [_real(value) for value in entry.get("values") or []]
        rows.append(
            {
                "split": split,
                "metric": metric,
                "mean": _real(entry.get("mean")),
                "std": _real(entry.get("std")),
                "values": (values + [None] * count)[:count],
            }
        )
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    return sorted(rows, key=lambda row: (rank(row["split"]), metrics.index(row["metric"])))


def matrix(data: Any) -> dict[str, Any] | None:
    """The table of accuracies of an incremental run, over times and tasks; None without one.

    Args:
        data: the result's "accuracy": {"steps", "ends", "mean", "std"}, the last two [time, task].
    """
    if not isinstance(data, Mapping) or not data.get("mean"):
        return None
    rows = [
        {
            "step": f"{step:,}",
            "ends": place in data["ends"],
            "cells": [
                {
                    "text": f"{mean:.3f}",
                    "std": f"{std:.3f}" if std else "",
                    "share": f"{80 * mean:.0f}",  # a darker cell would hide its number
                }
                for mean, std in zip(means, stds, strict=True)
            ],
        }
        for place, (step, means, stds) in enumerate(
            zip(data["steps"], data["mean"], data["std"], strict=True)
        )
    ]
    return {"rows": rows, "tasks": range(1, len(data["mean"][0]) + 1)}


def by_split(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Rows grouped by split, in their order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["split"], []).append(row)
    return list(groups.items())


def shape(sizes: Any) -> str:
    """An array's shape with multiplication signs; a scalar is called so."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        return str(sizes or "")
    return " × ".join(str(size) for size in sizes) or "scalar"  # noqa: RUF001


def _real(data: Any) -> float | int | None:
    return data if isinstance(data, int | float) and not isinstance(data, bool) else None


@functools.cache
def _style() -> Any:
    return markup(_text("style.css") or "")


def _text(name: str) -> str | None:
    file = importlib.resources.files(PACKAGE).joinpath(name)
    return file.read_text(encoding="utf-8") if file.is_file() else None


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=formats.number,
        signed=formats.signed,
        with_decimals=formats.with_decimals,
        duration=formats.duration,
        size=formats.size,
        value=value,
        groupby_split=by_split,
    )
    return environment
