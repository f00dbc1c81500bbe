"""A report as one HTML page: head, style, parts and the script that sorts and filters tables.

Every text is escaped here. The page loads nothing: its policy forbids every request.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files

from loratools.page.parts import (
    Cell,
    Chart,
    Findings,
    Heatmap,
    Numbers,
    Part,
    Section,
    Table,
    Tree,
)
from loratools.page.svg import chart_svg, escaped, tree_svg

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_FINDINGS = 5
"""Findings of one kind that are shown at once; the others unfold."""


def page(title: str, sections: Sequence[Section]) -> str:
    """Return an HTML document that needs no network and no other file."""
    folder = files("loratools.page")
    style = (folder / "style.css").read_text(encoding="utf-8")
    script = (folder / "script.js").read_text(encoding="utf-8")
    body = "".join(
        f"<section><h2>{escaped(one.title)}</h2>{''.join(map(_part, one.parts))}</section>"
        for one in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escaped(title)}</title><style>{style}</style></head>"
        f"<body><main><h1>{escaped(title)}</h1>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def framed(document: str) -> str:
    """Return a page as a notebook shows it: in a frame, so that neither touches the other."""
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(document, quote=True)}" '
        'title="report" style="width:100%;height:36rem;border:0"></iframe>'
    )


def _part(part: Part) -> str:
    if isinstance(part, Numbers):
        return _numbers(part)
    if isinstance(part, Findings):
        return _findings(part)
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Heatmap):
        return _heatmap(part)
    return _chart(part) if isinstance(part, Chart) else _tree(part)


def _numbers(part: Numbers) -> str:
    rows = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>"
        for name, value in part.items
    )
    return f'<dl class="numbers">{rows}</dl>'


def _findings(part: Findings) -> str:
    if not part.items:
        return "<p>Nothing stands out.</p>"
    kinds: dict[str, list[str]] = {}
    for kind, name, text in part.items:
        place = f"<code>{escaped(name)}</code>: " if name else ""
        kinds.setdefault(kind, []).append(f"<li>{place}{escaped(text)}</li>")
    return "".join(_kind(kind, rows) for kind, rows in kinds.items())


def _kind(kind: str, rows: Sequence[str]) -> str:
    first, others = "".join(rows[:_FINDINGS]), "".join(rows[_FINDINGS:])
    more = f"{len(rows) - _FINDINGS} more of “{escaped(kind)}”"
    rest = f"<details><summary>{more}</summary><ul>{others}</ul></details>" if others else ""
    return f"<h3>{escaped(kind)}: {len(rows)}</h3><ul>{first}</ul>{rest}"


def _table(part: Table) -> str:
    titles = "".join(_title(text, part.rows, place) for place, text in enumerate(part.header))
    body = "".join(
        f"<tr>{''.join(_cell(cell, place) for place, cell in enumerate(row))}</tr>"
        for row in part.rows
    )
    field = (
        '<p><label>Show rows with <input type="search" class="filter"></label> '
        '<span class="count" role="status"></span></p>'
        if part.filtered
        else ""
    )
    inner = f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="table">{field}{_scrolled(part.caption, inner)}</div>'


def _title(text: str, rows: Sequence[Sequence[Cell]], place: int) -> str:
    """Return the heading of a column, aligned as its values."""
    worded = any(isinstance(row[place], str) for row in rows)
    kind = "" if worded or not place else ' class="number"'
    return (
        f'<th scope="col" aria-sort="none"{kind}>'
        f'<button type="button">{escaped(text)}</button></th>'
    )


def _scrolled(caption: str, inner: str, kind: str = "") -> str:
    """Return a table that scrolls sideways where the screen is narrow, by keys too."""
    named = escaped(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{named}">'
        f'<table class="{kind}"><caption>{named}</caption>{inner}</table></div>'
    )


def _cell(value: Cell, place: int) -> str:
    if value is None:
        return '<td class="number">–</td>'
    if isinstance(value, str):
        if place == 0:
            return f'<th scope="row">{_breakable(value)}</th>'
        return f"<td>{escaped(value)}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="number" data-value="{value!r}">{text}</td>'


def _heatmap(part: Heatmap) -> str:
    names = "".join(f'<th scope="col">{escaped(name or "–")}</th>' for name in part.columns)
    body = ""
    for name, line in zip(part.rows, part.values, strict=True):
        cells = "".join(_shaded(value, part) for value in line)
        body += f'<tr><th scope="row">{_breakable(name)}</th>{cells}</tr>'
    head = f"<thead><tr><td>{escaped(part.across)}</td>{names}</tr></thead>"
    return _scrolled(part.caption, f"{head}<tbody>{body}</tbody>", "heat")


def _shaded(value: float | None, part: Heatmap) -> str:
    if value is None:
        return '<td class="number">–</td>'
    share = min(abs(value) / part.largest, 1.0) if part.largest > 0.0 else 0.0
    side = " minus" if value < 0.0 else ""
    text = f"{value:.3g}" if part.places is None else f"{value:.{part.places}f}"
    if text.startswith("-"):  # zeros have no sign
        text = f"−{text[1:]}" if float(text) else text[1:]
    return f'<td class="number{side}" style="--share:{share:.3f}">{text}</td>'


def _breakable(name: str) -> str:
    """Return an escaped name that a narrow screen breaks after its dots."""
    return escaped(name).replace(".", ".<wbr>")


def _chart(part: Chart) -> str:
    drawn = chart_svg(part)
    if not drawn:
        return ""
    rows: list[Sequence[Cell]] = [
        [line.name, " ".join(f"{y:.3g}" for _, y in line.points)] for line in part.lines
    ]
    numbers = Table(f"{part.caption}: numbers", ["name", f"{part.y} in order of {part.x}"], rows)
    more = "" if part.has_table else _folded(numbers)
    return f"<figure>{drawn}<figcaption>{escaped(part.caption)}</figcaption></figure>{more}"


def _tree(part: Tree) -> str:
    names = dict(enumerate(part.names))
    rows: list[Sequence[Cell]] = []
    for step, (first, second, distance, size) in enumerate(part.merges, 1):
        names[len(part.names) + step - 1] = f"group {step}"
        rows.append([f"group {step}", names[int(first)], names[int(second)], distance, int(size)])
    header = ["merge", "of", "and", "distance", "members"]
    numbers = _folded(Table(f"{part.caption}: numbers", header, rows))
    caption = escaped(part.caption)
    drawn = f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
    drawn += f"{tree_svg(part)}</div>"
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>{numbers}"


def _folded(part: Table) -> str:
    return f"<details><summary>As a table</summary>{_table(part)}</details>"
