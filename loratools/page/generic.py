"""The page of any result, from its JSON object: numbers, tables, and errors by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools.algebra.outliers import family_of, layer_of
from loratools.page.parts import Cell, Chart, Findings, Heatmap, Line, Numbers, Part, Section, Table

_SHADED = ("relative_error", "lost_to_rounding")
"""Measures of a module that a heatmap shows, if it has one of them."""


def result_sections(result: Mapping[str, Any]) -> list[Section]:
    """Return the parts of a page, from the JSON object that a command prints.

    Findings whose messages are its notes are listed by their codes.
    """
    plain = {name: value for name, value in result.items() if not isinstance(value, list | dict)}
    numbers = [
        (worded(n), _number(v)) for n, v in plain.items() if n not in ("schema", "operation")
    ]
    parts = [Section("Overview", [Numbers(numbers)])]
    noted = {"notes", "findings"} if "notes" in result else set()
    if result.get("notes"):
        items = [(each["code"], "", each["message"]) for each in result["findings"]]
        parts.append(Section("Notes", [Findings(items)]))
    for name, value in result.items():
        if isinstance(value, list) and value and name not in noted:
            parts.append(Section(worded(name).capitalize(), _of_list(name, value)))
    return parts


def worded(name: str) -> str:
    """Return a field's name as a title.

    >>> worded("relative_error")
    'relative error'
    """
    return name.replace("_", " ")


def _number(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else _short(value)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _of_list(name: str, items: Sequence[Any]) -> list[Part]:
    if not all(isinstance(item, Mapping) for item in items):
        rows: list[Sequence[Cell]] = [[_cell(item)] for item in items]
        return [Table(worded(name), [worded(name)], rows)]
    header = list(dict.fromkeys(key for item in items for key in item))
    rows = [[_cell(item.get(key)) for key in header] for item in items]
    titles = [worded(key) for key in header]
    table = Table(worded(name).capitalize(), titles, rows, filtered=len(rows) > 8)
    return [*_pictures(items, header), table]


def _cell(value: object) -> Cell:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join("–" if item is None else _short(item) for item in value)
    return value if isinstance(value, str | int | float) or value is None else str(value)


def _pictures(items: Sequence[Mapping[str, Any]], header: Sequence[str]) -> list[Part]:
    if {"rank", "relative_error"} <= set(header) and "name" not in header:
        return [error_curve([(item["rank"], item["relative_error"]) for item in items])]
    measure = next((one for one in _SHADED if one in header), None)
    if measure is None or "name" not in header:
        return []
    values = {item["name"]: item[measure] for item in items if item[measure] is not None}
    by_layer: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        by_layer.setdefault((family_of(name), layer_of(name)), []).append(value)
    largest = {key: max(found) for key, found in by_layer.items()}
    return [by_layers(f"{worded(measure).capitalize()} by kind of module and layer", largest)]


def error_curve(points: Sequence[tuple[int, float]]) -> Chart:
    """Return the picture of the table rank → size → error."""
    curve = Line("all modules", [(float(rank), error) for rank, error in points])
    caption = "Relative error of each rank"
    return Chart(caption, "rank", "relative error", [curve], has_table=True)


def by_layers(caption: str, values: Mapping[tuple[str, str], float]) -> Heatmap:
    """Return values by (family, layer) as a picture: families below each other, layers across."""
    kinds = list(dict.fromkeys(kind for kind, _ in values))
    layers = list(dict.fromkeys(layer for _, layer in values))
    layers.sort(key=lambda layer: (not layer, int(layer or 0)))
    cells = [[values.get((kind, layer)) for layer in layers] for kind in kinds]
    return Heatmap(caption, kinds, layers, cells, max(values.values(), default=0.0), "layer")
