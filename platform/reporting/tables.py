"""Tables for the console: drawn by rich on a terminal, aligned plain text everywhere else."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from lamina.platform.reporting import formats, page
from lamina.platform.reporting.console import is_terminal
from lamina.platform.reporting.folder import RunRow

COLOURS = {
    "done": "green",
    "running": "cyan",
    "interrupted": "yellow",
    "killed": "yellow",
    "failed": "red",
    "diverged": "red",
    "unreadable": "red",
}


class Table(NamedTuple):
    """A table as text.

    Attributes:
        columns: the heads; one that begins with ">" is aligned to the right.
        rows: as many cells each as there are columns.
        footer: a last row of totals, or nothing.
        title: what stands above; "" for nothing.
        wrap: the columns whose cells a narrow terminal may break into lines.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    footer: Sequence[str] = ()
    title: str = ""
    wrap: Sequence[str] = ()


def parameter_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The parameters of a model, with totals.

    Args:
        rows: as in `parameters.json`: {"path", "shape", "dtype", "axes", "sharding", "bytes"}.
    """
    counts = [math.prod(row.get("shape") or ()) for row in rows]
    cells = [
        (
            str(row.get("path", "")),
            page.shape(row.get("shape")),
            str(row.get("dtype", "")),
            ", ".join(str(axis) for axis in row.get("axes") or ()),
            str(row.get("sharding") or ""),
            f"{count:,}",
            formats.size(row.get("bytes") or 0),
        )
        for row, count in zip(rows, counts, strict=True)
    ]
    total = formats.size(sum(row.get("bytes") or 0 for row in rows))
    return Table(
        ("path", "shape", "type", "logical axes", "sharding", ">parameters", ">size"),
        cells,
        (f"{len(cells)} arrays", "", "", "", "", f"{sum(counts):,}", total),
        wrap=("path", "shape", "logical axes", "sharding"),
    )


def activation_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The activations that a model places, by the names of their dimensions.

    Args:
        rows: of `compiled.activation_rows`: {"axes", "shape", "dtype", "before", "sharding",
            "bytes"}.
    """
    cells = [
        (
            ", ".join(str(axis) or "-" for axis in row.get("axes") or ()),
            page.shape(row.get("shape")),
            str(row.get("dtype", "")),
            str(row.get("before", "")),
            str(row.get("sharding", "")),
            formats.size(row.get("bytes") or 0),
        )
        for row in rows
    ]
    columns = ("axes", "shape", "type", "comes as", "sharding", ">size")
    return Table(columns, cells, wrap=("axes", "comes as", "sharding"))


def runs_table(runs: Sequence[RunRow], metrics: int = 2) -> Table:
    """Runs with their state and numbers, for `lamina list`.

    Args:
        runs: from `folder.list_runs`.
        metrics: how many final numbers to show: those of the test split first, then validation.
    """
    cells = []
    for run in runs:
        rows = page.final_rows(run.final, 0)[:metrics]
        numbers = [f"{_name(row)} {mean_and_std(row)}" for row in rows]
        cells.append(
            (
                run.path,
                run.state,
                run.program,
                f"{run.step}/{run.steps}" if run.steps else str(run.step),
                run.start[:16].replace("T", " "),
                formats.duration(run.seconds),
                "  ".join(numbers) or run.message,
            )
        )
    columns = ("run", "status", "program", ">step", "start (UTC)", ">time", "numbers")
    return Table(columns, cells, wrap=("run", "numbers"))


def result_table(final: Mapping[str, Any], seeds: Sequence[int] = ()) -> Table:
    """The final numbers of a run.

    Args:
        final: {name: {"mean", "std", "values"}}.
        seeds: the seeds in the order of the values; each is a column where there are 2 to 8.
    """
    several = len(seeds) > 1
    shown = list(seeds) if 1 < len(seeds) <= 8 else []
    cells = []
    for row in page.final_rows(final, len(shown)):
        mean = row["mean"]
        values = [formats.with_decimals(value, mean) for value in row["values"]]
        spread = [formats.with_decimals(row["std"], mean)] if several else []
        cells.append((_name(row), formats.number(mean), *spread, *values))
    columns = ("metric", ">mean", *([">std"] if several else []), *(f">seed {s}" for s in shown))
    return Table(columns, cells)


def mean_and_std(row: Mapping[str, Any]) -> str:
    """A mean with its spread, where it has one."""
    mean = formats.number(row["mean"])
    return f"{mean} ±{formats.with_decimals(row['std'], row['mean'])}" if row["std"] else mean


def text(table: Table) -> str:
    """A table as plain lines that end without blanks, of any width."""
    heads = [column.removeprefix(">") for column in table.columns]
    lines = [heads, *table.rows, *([table.footer] if table.footer else [])]
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]

    def aligned(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(cells, widths, table.columns, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    body = [aligned(heads), rule, *map(aligned, table.rows)]
    if table.footer:
        body += [rule, aligned(table.footer)]
    return "\n".join([table.title, *body] if table.title else body) + "\n"


def show(table: Table, stream: TextIO | None = None) -> None:
    """Prints a table: with rich on a terminal, else as plain text.

    Args:
        table: the table.
        stream: where to; None is `sys.stdout`.
    """
    target: TextIO = sys.stdout if stream is None else stream
    if is_terminal(target):
        from rich.console import Console

        Console(file=target).print(_drawn(table))
    else:
        target.write(text(table))


def _drawn(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=Text(table.title) if table.title else None,
        box=box.SIMPLE_HEAD,
        show_footer=bool(table.footer),
        title_justify="left",
        pad_edge=False,
    )
    footer = table.footer or [""] * len(table.columns)
    for column, last in zip(table.columns, footer, strict=True):
        right = column.startswith(">")
        drawn.add_column(
            Text(column.removeprefix(">")),
            footer=Text(last),
            justify="right" if right else "left",
            no_wrap=column not in table.wrap,
            overflow="fold",
        )
    for row in table.rows:
        drawn.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
    return drawn


def _name(row: Mapping[str, Any]) -> str:
    return "/".join(part for part in (row["split"], row["metric"]) if part)
