"""Charts of a report: curves, points, radars and coefficients."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lamina.platform.reporting import formats
from lamina.platform.reporting.curves import Curve, thin, wants_log
from lamina.platform.reporting.drawing import COLOURS, GRID, INK, LINES, MUTED, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL = 14  # characters of a direct label; the page has the whole name


class Line(NamedTuple):
    """A curve to draw: its label, the number of its colour, and the curve."""

    label: str
    slot: int
    curve: Curve


def chart(lines: list[Line], description: str) -> str:
    """Draws curves with direct labels, bands of one standard deviation, and a fitting axis.

    Args:
        lines: the curves; those without a finite value are left out.
        description: what a screen reader says.

    Returns:
        An `<svg>` element, the same for the same input; "" where nothing is finite.
    """
    lines = [line._replace(curve=thin(line.curve)) for line in lines]
    lines = [line for line in lines if np.isfinite(line.curve.mean).any()]
    return figure(lambda axes: _draw(axes, lines), description) if lines else ""


class Scatter(NamedTuple):
    """Points to draw: a name and the number of its colour, places, and values (NaN: no value)."""

    label: str
    slot: int
    x: np.ndarray
    y: np.ndarray


def scatter(groups: list[Scatter], x_label: str, description: str) -> str:
    """Draws values over a number, such as a hyper-parameter; axes are logarithmic where it helps.

    Args:
        groups: the points; a point without a value is a cross at the lower edge.
        x_label: the number's name.
        description: what a screen reader says.

    Returns:
        An `<svg>` element; "" where nothing is finite.
    """
    if not any(np.isfinite(group.y).any() for group in groups):
        return ""
    return figure(lambda axes: _draw_points(axes, groups, x_label), description)


def _draw_points(axes: "Axes", groups: list[Scatter], x_label: str) -> None:
    from matplotlib.ticker import FuncFormatter

    x = np.concatenate([group.x for group in groups])
    if x.min() > 0 and x.max() > 20 * x.min():
        axes.set_xscale("log")
    y = np.concatenate([group.y for group in groups])
    y = y[np.isfinite(y)]
    if y.min() > 0 and y.max() > 20 * y.min():
        axes.set_yscale("log")
    for group in groups:
        known, colour = np.isfinite(group.y), LINES[group.slot % COLOURS]
        axes.plot(
            group.x[known], group.y[known], "o", color=colour, markersize=4, label=group.label
        )
        lost = group.x[~known]
        low = np.full(len(lost), y.min())
        axes.plot(lost, low, "x", color=colour, markersize=5, clip_on=False)
    axes.grid(axis="y")
    axes.set_xlabel(x_label, labelpad=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if len(groups) > 1:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1.02),
            frameon=False,
            fontsize=7.5,
            handletextpad=0.1,
            borderpad=0,
            labelcolor="linecolor",
        )


class Polygon(NamedTuple):
    """A line of a radar chart: its label, the number of its colour, and a value for each corner."""

    label: str
    slot: int
    values: Sequence[float | None]


def radar(polygons: Sequence[Polygon], corners: Sequence[str], description: str) -> str:
    """Draws values in [0, 1] on spokes from a common centre.

    Args:
        polygons: the models, say; a value that is None is drawn at the centre.
        corners: the names of the spokes.
        description: what a screen reader says.

    Returns:
        An `<svg>` element; "" for fewer than three corners.
    """
    if len(corners) < 3:
        return ""
    return figure(lambda axes: _draw_radar(axes, polygons, corners), f"{description} by corner")


def _draw_radar(axes: "Axes", polygons: Sequence[Polygon], corners: Sequence[str]) -> None:
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(corners)) / len(corners)
    x, y = np.cos(angles), np.sin(angles)
    closed = [*range(len(corners)), 0]
    for ring in (0.25, 0.5, 0.75, 1.0):
        axes.plot(ring * x[closed], ring * y[closed], color=GRID, linewidth=0.6)
        axes.text(0.02, ring * y[0] - 0.02, f"{ring:g}", color=MUTED, fontsize=6.5, va="top")
    for place, name in enumerate(corners):
        axes.plot([0, x[place]], [0, y[place]], color=GRID, linewidth=0.6)
        side = "center" if abs(x[place]) < 0.2 else "left" if x[place] > 0 else "right"
        text = name if len(name) <= LABEL else name[: LABEL - 1] + "…"
        place_at = (1.07 * x[place], 1.1 * y[place])
        axes.text(*place_at, text, color=MUTED, fontsize=7, ha=side, va="center")
    for polygon in polygons:
        values = np.array([value or 0.0 for value in polygon.values])[closed]
        colour = LINES[polygon.slot % COLOURS]
        axes.plot(values * x[closed], values * y[closed], color=colour, linewidth=1.1)
    for place, polygon in enumerate(polygons):
        text = polygon.label if len(polygon.label) <= LABEL else polygon.label[:13] + "…"
        colour = LINES[polygon.slot % COLOURS]
        axes.text(1.0, 1 - 0.075 * place, text, color=colour, transform=axes.transAxes, va="top")
    axes.set_aspect("equal")
    axes.set_xlim(-1.5, 1.5)
    axes.set_ylim(-1.15, 1.2)
    axes.set_axis_off()


def coefficients(values: Mapping[str, Any], models: Sequence[str], description: str) -> str:
    """Draws how much of each model a learned merge takes, tensor by tensor.

    Args:
        values: tensor to a number for each model, or to one for each model and layer; one entry
            alone is of the whole models.
        models: their names.
        description: what a screen reader says.

    Returns:
        An `<svg>` element.
    """
    columns = [np.asarray(each, float).reshape(len(models), -1) for each in values.values()]
    table = np.concatenate(columns, axis=1)
    return figure(lambda axes: _draw_coefficients(axes, table, models), description)


def _draw_coefficients(axes: "Axes", table: np.ndarray, models: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = table.shape
    low, high = min(0.0, np.nanmin(table)), max(np.nanmax(table), 1e-9)
    for row in range(rows):
        for column in range(columns):
            share = (table[row, column] - low) / (high - low)
            patch = Rectangle(
                (column, rows - 1 - row), 1, 0.92, color=LINES[0], alpha=float(share), linewidth=0
            )
            axes.add_patch(patch)
        mean = table[row].mean()
        axes.text(columns * 1.02, rows - 0.5 - row, f"{mean:.2f}", color=MUTED, va="center")
        name = models[row] if len(models[row]) <= 20 else models[row][:19] + "…"
        axes.text(0, rows - 0.5 - row, f" {name}", color=INK, va="center", fontsize=7)
    axes.set_xlim(0, columns)
    axes.set_ylim(0, rows)
    axes.set_yticks([])
    axes.set_xticks([])
    wide = "one for each model" if columns == 1 else f"{columns} tensors, by name"
    axes.set_xlabel(f"{wide}; from {low:.2g} (pale) to {high:.2g}; means at the right", labelpad=3)


def _draw(axes: "Axes", lines: list[Line]) -> None:
    logarithmic = wants_log([line.curve for line in lines])
    if logarithmic:
        axes.set_yscale("log")
    for line in lines:
        curve, colour = line.curve, LINES[line.slot % COLOURS]
        if curve.seeds > 1:
            low, high = curve.mean - curve.std, curve.mean + curve.std
            if logarithmic:  # a band that reaches below zero would take the axis with it
                low = np.maximum(low, np.nanmin(curve.mean) / 2)
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.16, linewidth=0)
        few = len(curve.steps) <= 12
        axes.plot(
            curve.steps,
            curve.mean,
            color=colour,
            linewidth=1.5,
            marker="o" if few else None,
            markersize=3.2,
            clip_on=False,
        )
        finite = np.flatnonzero(np.isfinite(curve.mean))
        if not few:
            last = finite[-1]
            axes.plot(
                curve.steps[last],
                curve.mean[last],
                "o",
                color=colour,
                markersize=3.6,
                clip_on=False,
            )
    _ticks(axes, lines, logarithmic)
    _labels(axes, lines)


def _ticks(axes: "Axes", lines: list[Line], logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    end = max(int(line.curve.steps[-1]) for line in lines)
    begin = min(int(line.curve.steps[0]) for line in lines)
    axes.set_xlim(0 if begin < 0.5 * end or begin == end else begin, end if end else 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.compact(value)))
    axes.tick_params(axis="x", length=3, pad=3)
    axes.tick_params(axis="y", pad=2)
    axes.grid(axis="y")
    if logarithmic:
        low, high = axes.get_ylim()
        decades = np.log10(high / low)
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,), numticks=8)
        )
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.annotate(
        "step",
        (1.02, 0),
        xycoords="axes fraction",
        textcoords="offset points",
        xytext=(9, -12.5),
        color=MUTED,
    )


def _labels(axes: "Axes", lines: list[Line]) -> None:
    """Names each line at its end, with its last value where there is room for it."""
    two = len(lines) <= 4
    ends = []
    for line in lines:
        finite = line.curve.mean[np.isfinite(line.curve.mean)]
        end = axes.transData.transform((0, finite[-1]))[1]
        ends.append(axes.transAxes.inverted().transform((0, end))[1])
    gap = (22 if two else 11) / 168
    for line, place in zip(lines, spread(ends, gap, low=0.05), strict=True):
        colour = LINES[line.slot % COLOURS]
        text = line.label if len(line.label) <= LABEL else line.label[: LABEL - 1] + "…"
        if not two:
            axes.text(1.03, place, text, color=colour, transform=axes.transAxes, va="center")
            continue
        value = formats.number(line.curve.last, missing="not finite")
        style = {"transform": axes.transAxes, "clip_on": False}
        axes.text(1.03, place + 0.005, text, color=colour, va="bottom", **style)
        axes.text(1.03, place - 0.005, value, color=MUTED, va="top", fontsize=8, **style)


def spread(places: list[float], gap: float, low: float = 0.0) -> list[float]:
    """Moves places between `low` and 1 apart by `gap` at least, in order and as little as possible.

    Example:
        >>> [round(place, 2) for place in spread([0.5, 0.52, 0.9], 0.1)]
        [0.46, 0.56, 0.9]
    """
    order = sorted(range(len(places)), key=lambda index: places[index])

    def inside(centre: float, count: int) -> float:
        reach = min(gap * (count - 1) / 2, (1 - low) / 2)
        return min(max(centre, low + reach), 1 - reach)

    groups: list[tuple[float, int]] = []  # of neighbours that touch: centre, count
    for index in order:
        groups.append((inside(places[index], 1), 1))
        while len(groups) > 1:
            (lower, below), (upper, above) = groups[-2:]
            if upper - lower >= gap * (below + above) / 2 - 1e-9:
                break
            count = below + above
            groups[-2:] = [(inside((lower * below + upper * above) / count, count), count)]
    settled = [
        centre + gap * (place - (count - 1) / 2)
        for centre, count in groups
        for place in range(count)
    ]
    result = [0.0] * len(places)
    for index, place in zip(order, settled, strict=True):
        result[index] = place
    return result
