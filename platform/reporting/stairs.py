"""Functions that rise by steps, such as performance profiles, as SVG for a page."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lamina.platform.reporting.charts import LABEL, spread
from lamina.platform.reporting.drawing import COLOURS, LINES, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Stairs(NamedTuple):
    """A function that rises by steps: a name, the number of its colour, places, and values there.

    Between two places it has the value of the first.
    """

    label: str
    slot: int
    x: np.ndarray
    y: np.ndarray


def staircase(lines: list[Stairs], x_label: str, description: str) -> str:
    """Draws functions that rise by steps from 0 to 1, such as performance profiles.

    Args:
        lines: the functions, on the same places from the first to the last.
        x_label: what x is.
        description: what a screen reader says.

    Returns:
        An `<svg>` element; "" without lines.
    """
    return figure(lambda axes: _draw_stairs(axes, lines, x_label), description) if lines else ""


def _draw_stairs(axes: "Axes", lines: list[Stairs], x_label: str) -> None:
    width = 0.012  # equal functions stand beside each other instead of covering each other
    for place, line in enumerate(lines):
        shift = width * (place - (len(lines) - 1) / 2)
        colour = LINES[line.slot % COLOURS]
        axes.step(line.x, line.y + shift, where="post", color=colour, linewidth=1.5, clip_on=False)
    axes.set_xlim(lines[0].x[0], lines[0].x[-1])
    axes.set_ylim(-0.06, 1.06)
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=3, pad=3)
    axes.set_xlabel(x_label, labelpad=2)
    ends = [float(line.y[-1]) * 0.9 + 0.05 for line in lines]
    for line, place in zip(lines, spread(ends, 11 / 168, low=0.02), strict=True):
        colour = LINES[line.slot % COLOURS]
        text = line.label if len(line.label) <= LABEL else line.label[: LABEL - 1] + "…"
        axes.text(1.03, place, text, color=colour, transform=axes.transAxes, va="center")
