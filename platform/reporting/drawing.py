"""Drawings as SVG to stand in an HTML page: its fonts, its colours, light and dark."""

import html
import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 8
"""Colours that style.css has for lines: --s0 to --s7."""

# Colours that stand for CSS variables in what matplotlib draws, so that one SVG serves both themes.
LINES = tuple(f"#0a0b{slot:02d}" for slot in range(COLOURS))
INK, MUTED, GRID, PAPER = "#0a0bf0", "#0a0bf1", "#0a0bf2", "#0a0bf3"
_VARIABLES = {
    **{colour: f"var(--s{slot})" for slot, colour in enumerate(LINES)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--card)",
}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a name is a "$"
    "font.size": 8.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "path.simplify": True,
}
_WIDTH, _HEIGHT = 360.0, 200.0  # in points, which are the units inside the SVG


def load() -> None:
    """Imports what draws, which takes most of a second: in a thread, while a run compiles."""
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401


def figure(draw: Callable[["Axes"], None], description: str) -> str:
    """Returns what `draw` draws as an `<svg>` element for a page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # The salt makes the identifiers the same in every rendering, and different in every chart.
    usual = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
    style: dict[Any, Any] = {**usual, **_STYLE, "svg.hashsalt": f"lamina {description}"}
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        # The page's font draws the text: what matplotlib's own lacks is no matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((38 / _WIDTH, 22 / _HEIGHT, 252 / _WIDTH, 168 / _HEIGHT))
        draw(axes)
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return _for_page(buffer.getvalue(), description)


def _for_page(svg: str, description: str) -> str:
    """Matplotlib's document as an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib numbers its groups, the same in each chart; nothing refers to them
    svg = re.sub(r'<g id="[A-Za-z]+[A-Za-z_.0-9]*"(/?)>', r"<g\1>", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)  # the page's own
    svg = re.sub(r'\b(d|x|y|transform)="[^"]*"', _shorten, svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r">\s+<", "><", svg).replace("<g/>", "")
    head = f'<svg class="chart" role="img" aria-label="{html.escape(description)}" '
    box = f'viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + box + svg[svg.index(">") + 1 :].strip()


def _shorten(attribute: re.Match[str]) -> str:
    """An attribute of an element with its numbers to a hundredth of a point, on one line."""
    text = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}", attribute[0])
    return re.sub(r"\s+", " ", text)
