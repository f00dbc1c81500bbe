"""Curves and trees as pictures inside a page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from loratools.page.parts import Chart, Line, Tree, groups
from loratools_formats.disk.errors import printable

COLOURS = 8
"""Groups of curves that have a colour of their own; the style names them."""

DECADES = 4.0
"""What a logarithmic axis shows below the largest value."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 624, 30, 262


def escaped(text: object) -> str:
    r"""Return text that HTML shows as it is, with control characters spelled out.

    >>> escaped("<script>\x1b")
    '&lt;script&gt;\\x1b'
    """
    return html.escape(printable(text, 1000), quote=True)


def chart_svg(part: Chart) -> str:
    """Return curves as SVG; empty if there is no point to draw."""
    kept = [
        Line(
            line.name,
            [
                (x, math.log10(y) if part.log_y else y)
                for x, y in line.points
                if y > 0.0 or not part.log_y
            ],
            line.group,
        )
        for line in part.lines
    ]
    points = [point for line in kept for point in line.points]
    if not points:
        return ""
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    low = max(low, high - DECADES) if part.log_y else min(low, 0.0)

    def across(x: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (x - left) / ((right - left) or 1.0)

    def down(y: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (max(y, low) - low) / ((high - low) or 1.0)

    colours = {group: place % COLOURS for place, group in enumerate(groups(kept))}
    curves = "".join(
        f'<polyline class="c{colours[line.group]}" points="'
        f'{" ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line.points)}">'
        f"<title>{escaped(line.name)}</title></polyline>"
        for line in kept
        if line.points
    )
    marks = "".join(
        f'<path class="grid" d="M{_LEFT} {down(y):.1f}H{_RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">'
        f"{10**y if part.log_y else y:.3g}</text>"
        for y in (_decades(low, high) if part.log_y else ticks(low, high))
    )
    marks += "".join(
        f'<text x="{across(x):.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{x:g}</text>'
        for x in ticks(left, right, whole=True)
    )
    return (
        f'<svg viewBox="0 0 640 312" role="img" aria-label="{escaped(part.caption)}">{marks}'
        f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>{curves}'
        f'<text x="{(_LEFT + _RIGHT) // 2}" y="306" text-anchor="middle">{escaped(part.x)}</text>'
        f'<text x="{_LEFT + 6}" y="18">{escaped(part.y)}</text></svg>{_legend(colours)}'
    )


def _legend(colours: dict[str, int]) -> str:
    if len(colours) < 2:
        return ""
    items = "".join(
        f'<li><span class="c{place}"></span>{escaped(name)}</li>' for name, place in colours.items()
    )
    return f'<ul class="legend">{items}</ul>'


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return up to seven round numbers in an interval.

    >>> ticks(0.0, 1.0), ticks(1, 16, whole=True)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [5, 10, 15])
    """
    if high <= low:
        return [low]
    rough = (high - low) / 6.0
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * n for n in (1, 2, 5, 10) if size * n >= rough)
    step = max(step, 1) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    found = [round(n * step, 12) for n in range(first, last + 1)]
    return [int(value) for value in found] if whole else found


def _decades(low: float, high: float) -> Sequence[float]:
    """Return the powers of ten in an interval, or its ends if it holds fewer than two."""
    found = [float(n) for n in range(math.ceil(low), math.floor(high) + 1)]
    return found if len(found) > 1 else sorted({low, high})


def tree_svg(part: Tree) -> str:
    """Return a tree as SVG, names at the left."""
    height = 24 * len(part.names) + 20
    names = [part.names[leaf][-34:] for leaf in part.order]
    left = 16.0 + 6.6 * max(map(len, names))
    lines = ""
    for x1, y1, x2, y2, x in part.places():
        a, b, c = (left + (624.0 - left) * value for value in (x1, x2, x))
        top, bottom = 22.0 + 24 * y1, 22.0 + 24 * y2
        lines += f'<path class="tree" d="M{a:.1f} {top}H{c:.1f}V{bottom}H{b:.1f}"/>'
    labels = "".join(
        f'<text x="{left - 8.0:.1f}" y="{26 + 24 * row}" text-anchor="end">{escaped(name)}</text>'
        for row, name in enumerate(names)
    )
    return (
        f'<svg class="names" viewBox="0 0 640 {height}" role="img" '
        f'aria-label="{escaped(part.caption)}">'
        f"{lines}{labels}</svg>"
    )
