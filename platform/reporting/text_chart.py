"""A curve as a few lines of text, for the terminal."""

from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"


def draw(values: Sequence[float], height: int = 6, unit: str = "") -> list[str]:
    r"""Returns the lines of a bar chart from 0 to the largest value, one column for each value.

    Args:
        values: finite numbers, 0 or more.
        height: lines of the bars.
        unit: what the values are, written beside the top.

    >>> print("\n".join(draw([0.0, 1.0, 2.0, 1.0], height=2)))
    2 ┤  █
    0 ┤ ███
    """
    top = max(values, default=0.0) or 1.0
    label = f"{top:.3g}{unit}"
    lines = []
    for row in reversed(range(height)):
        bar = ""
        for value in values:
            filled = value / top * height - row
            bar += BLOCKS[round(min(max(filled, 0.0), 1.0) * (len(BLOCKS) - 1))]
        name = label if row == height - 1 else "0" if row == 0 else ""
        lines.append(f"{name:>{len(label)}} ┤{bar}".rstrip())
    return lines
