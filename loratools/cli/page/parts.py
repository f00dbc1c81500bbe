"""The parts of a page: numbers, tables, findings, pictures. Every text is escaped here."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from loratools_formats.disk.errors import printable

Cell = str | float | int | None


def escaped(text: object) -> str:
    r"""Return text that HTML shows as it is, with control characters spelled out.

    >>> escaped("<script>\x1b")
    '&lt;script&gt;\\x1b'
    """
    return html.escape(printable(text, 1000), quote=True)


def numbers(items: Sequence[tuple[str, str]]) -> str:
    """Return the overview: names and values."""
    rows = "".join(f"<div><dt>{escaped(n)}</dt><dd>{escaped(v)}</dd></div>" for n, v in items)
    return f'<dl class="numbers">{rows}</dl>'


def findings(items: Sequence[tuple[str, str, str]]) -> str:
    """Return what stands out: kind, place and sentence each."""
    if not items:
        return "<p>Nothing stands out.</p>"
    rows = "".join(
        f"<li><strong>{escaped(kind)}</strong> <code>{escaped(name)}</code>: {escaped(text)}</li>"
        for kind, name, text in items
    )
    return f"<ul>{rows}</ul>"


def section(title: str, *parts: str) -> str:
    """Return parts under a heading."""
    return f"<section><h2>{escaped(title)}</h2>{''.join(parts)}</section>"


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], *, filtered: bool = False
) -> str:
    """Return a table whose columns sort when their titles are pressed.

    Args:
        caption: what it shows.
        header: titles.
        rows: text and numbers; None is shown as a dash.
        filtered: whether a field above it filters its rows by text.
    """
    titles = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escaped(t)}</button></th>'
        for t in header
    )
    body = "".join(f"<tr>{''.join(_cell(c, i) for i, c in enumerate(row))}</tr>" for row in rows)
    field = (
        '<p><label>Show rows with <input type="search" class="filter"></label> '
        '<span class="count" role="status"></span></p>'
        if filtered
        else ""
    )
    return (
        f'<div class="table">{field}<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escaped(caption)}"><table><caption>{escaped(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _cell(value: Cell, place: int) -> str:
    if value is None:
        return '<td class="number">–</td>'
    if isinstance(value, str):
        if place == 0:
            return f'<th scope="row">{escaped(value)}</th>'
        return f"<td>{escaped(value)}</td>"
    return f'<td class="number" data-value="{value!r}">{value:.4g}</td>'


def heatmap(
    caption: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    largest: float,
) -> str:
    """Return a table whose cells are shaded by their share of the largest value."""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in columns)
    body = ""
    for name, line in zip(rows, values, strict=True):
        cells = "".join(_shaded(value, largest) for value in line)
        body += f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(caption)}">'
        f'<table class="heat"><caption>{escaped(caption)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _shaded(value: float | None, largest: float) -> str:
    if value is None:
        return '<td class="number">–</td>'
    share = min(max(value / largest, 0.0), 1.0) if largest > 0.0 else 0.0
    return f'<td class="number" style="--share:{share:.3f}">{value:.3g}</td>'


@dataclass(frozen=True)
class Line:
    """One curve: its name and points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(caption: str, x: str, y: str, lines: Sequence[Line], *, log_y: bool = False) -> str:
    """Return curves in one picture; what cannot be drawn on a logarithmic axis is left out.

    The numbers are in a table elsewhere on the page, which the caption should name.
    """
    kept = [
        Line(
            line.name,
            [(a, math.log10(b) if log_y else b) for a, b in line.points if b > 0 or not log_y],
        )
        for line in lines
    ]
    points = [point for line in kept for point in line.points]
    if not points:
        return ""
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    low = max(low, high - 4.0) if log_y else min(low, 0.0)

    def place(point: tuple[float, float]) -> str:
        across = 60 + 560 * (point[0] - left) / ((right - left) or 1.0)
        down = 270 - 250 * (max(point[1], low) - low) / ((high - low) or 1.0)
        return f"{across:.1f},{down:.1f}"

    curves = "".join(
        f'<polyline points="{" ".join(place(p) for p in line.points)}">'
        f"<title>{escaped(line.name)}</title></polyline>"
        for line in kept
    )
    ends = [f"{10**v:.3g}" if log_y else f"{v:.3g}" for v in (low, high)]
    return (
        f'<figure><svg viewBox="0 0 640 310" role="img" aria-label="{escaped(caption)}">'
        f'<path class="axis" d="M60 20V270H620"/>{curves}'
        f'<text x="54" y="274" text-anchor="end">{ends[0]}</text>'
        f'<text x="54" y="26" text-anchor="end">{ends[1]}</text>'
        f'<text x="60" y="290">{left:g}</text>'
        f'<text x="620" y="290" text-anchor="end">{right:g}</text>'
        f'<text x="340" y="304" text-anchor="middle">{escaped(x)}</text>'
        f'<text x="66" y="16">{escaped(y)}</text></svg>'
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


def dendrogram(
    caption: str, names: Sequence[str], order: Sequence[int], merges: Sequence[Sequence[float]]
) -> str:
    """Return a tree of merges (cluster, cluster, distance, size), its leaves from top to bottom."""
    height = 24 * len(names) + 20
    most = max((merge[2] for merge in merges), default=1.0) or 1.0
    places = {leaf: (0.0, 22.0 + 24 * row) for row, leaf in enumerate(order)}
    lines = ""
    for step, (first, second, distance, _) in enumerate(merges):
        (x1, y1), (x2, y2) = places.pop(int(first)), places.pop(int(second))
        x = max(distance, 0.0) / most
        places[len(names) + step] = (x, (y1 + y2) / 2.0)
        a, b, c = (240 + 380 * value for value in (x1, x2, x))
        lines += f'<path class="tree" d="M{a:.1f} {y1}H{c:.1f}V{y2}H{b:.1f}"/>'
    labels = "".join(
        f'<text x="232" y="{26 + 24 * row}" text-anchor="end">{escaped(names[leaf][-34:])}</text>'
        for row, leaf in enumerate(order)
    )
    return (
        f'<figure><svg viewBox="0 0 640 {height}" role="img" aria-label="{escaped(caption)}">'
        f"{lines}{labels}</svg><figcaption>{escaped(caption)}</figcaption></figure>"
    )
