"""Pictures of where the parts of arrays lie, for notebooks."""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lamina.platform.reporting import page

_WIDTH, _HEIGHT = 168, 84
_LABELLED = 64
"""Parts of an array up to which each names its devices."""


class Picture(NamedTuple):
    """A picture that a notebook shows.

    Attributes:
        html: one `<div>` without scripts, in the notebook's own colours.
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html


def draw_sharding(tree: Any, most: int = 12) -> Picture:
    """Draws how the arrays of a tree are split, and which devices hold which part.

    Each array is a rectangle of its two dimensions that matter most: those that are split, else
    the last ones. Parts carry the numbers of the devices that hold them, and those of the same
    devices have the same colour. Arrays with equal shapes and shardings are drawn once.

    Args:
        tree: of arrays, or `jax.ShapeDtypeStruct`s with shardings; leaves without a sharding are
            left out.
        most: how many pictures; the largest arrays come first.

    Example:
        >>> import jax
        >>> picture = draw_sharding({"kernel": jax.numpy.ones((4, 2))})
        >>> "kernel" in picture.html
        True
    """
    import jax  # reports are made without it

    groups: dict[Any, tuple[Any, list[str]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if getattr(leaf, "sharding", None) is not None and 0 not in leaf.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            groups.setdefault((leaf.shape, leaf.sharding), (leaf, []))[1].append(name)
    ordered = sorted(groups.values(), key=lambda group: -math.prod(group[0].shape))
    cards = [_card(leaf, names) for leaf, names in ordered[:most]]
    left = len(ordered) - len(cards)
    note = f'<div style="opacity:.65">{left} more kinds of arrays</div>' if left > 0 else ""
    body = '<div style="display:flex;flex-wrap:wrap;gap:1.2em 1.6em;align-items:flex-end">'
    return Picture(f"<div>{body}{''.join(cards)}</div>{note}</div>")


def _card(leaf: Any, names: Sequence[str]) -> str:
    shape = page.shape(leaf.shape)
    title = html.escape(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    return (
        f'<figure style="margin:0">{_rectangle(leaf, title)}'
        f'<figcaption style="font-size:.85em;max-width:22em;overflow-wrap:anywhere">{title}<br>'
        f'<span style="opacity:.65">{html.escape(f"{shape} {leaf.dtype}")}</span></figcaption>'
        "</figure>"
    )


def _rectangle(leaf: Any, title: str) -> str:
    """Returns the parts of an array as an SVG."""
    holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        part = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        holders.setdefault(part, []).append(device.id)
    split = [i for i in range(len(leaf.shape)) if len({part[i] for part in holders}) > 1]
    others = [i for i in reversed(range(len(leaf.shape))) if i not in split]
    chosen = sorted([*split, *others][:2])
    rows, columns = [-1, -1, *chosen][-2:]  # a vector lies along its row

    def span(part: Sequence[tuple[int, int]], dimension: int, length: float) -> tuple[float, float]:
        if dimension < 0:
            return 0.0, length
        start, stop = part[dimension]
        return start * length / leaf.shape[dimension], stop * length / leaf.shape[dimension]

    cells, seen = [], set()
    for part, devices in holders.items():
        (left, right), (top, bottom) = span(part, columns, _WIDTH), span(part, rows, _HEIGHT)
        if (left, top) in seen:  # a third dimension is split too: its parts lie behind this one
            continue
        seen.add((left, top))
        hue = 360 * min(devices) / len(leaf.sharding.device_set)
        label = ", ".join(map(str, sorted(devices)))
        shown = label if len(label) * 6 < right - left else f"{min(devices)}…"
        text = (
            f'<text x="{(left + right) / 2:.1f}" y="{(top + bottom) / 2 + 4:.1f}" font-size="11" '
            f'text-anchor="middle" fill="currentColor">{shown}</text>'
        )
        cells.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{bottom - top:.1f}" fill="hsl({hue:.0f} 60% 55% / .35)" '
            f'stroke="currentColor" stroke-opacity=".5"><title>devices {label}</title></rect>'
            + (text if len(holders) <= _LABELLED else "")
        )
    return (
        f'<svg role="img" aria-label="{title}" width="{_WIDTH + 2}" height="{_HEIGHT + 2}" '
        f'viewBox="-1 -1 {_WIDTH + 2} {_HEIGHT + 2}">{"".join(cells)}</svg>'
    )
