"""The parts of a report, as data that is drawn elsewhere: numbers, findings, tables, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | float | int | None
Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Numbers:
    """The overview: names and values."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Findings:
    """What stands out: kind, place and sentence each."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """Rows that can be sorted.

    Attributes:
        caption: what it shows.
        header: titles of columns.
        rows: text and numbers; None is shown as a dash.
        filtered: whether a field above it filters its rows by text.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    filtered: bool = False


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: of the curve.
        points: (x, y).
        group: curves of one group have one colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    group: str = ""


@dataclass(frozen=True)
class Chart:
    """Curves in one picture.

    Attributes:
        caption: what it shows.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        lines: the curves.
        log_y: whether the vertical axis is logarithmic; it leaves out what is not positive.
        has_table: whether a table beside it has the numbers; else the page adds one.
    """

    caption: str
    x: str
    y: str
    lines: Sequence[Line]
    log_y: bool = False
    has_table: bool = False


@dataclass(frozen=True)
class Heatmap:
    """A table whose cells are shaded by their share of the largest value, negative ones too.

    Attributes:
        caption: what it shows.
        rows: names of rows.
        columns: names of columns.
        values: one for each row and column; None where there is none.
        largest: the value of the darkest shade.
        across: title of the columns.
        places: decimal places of the numbers; None for three significant digits.
    """

    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Matrix
    largest: float
    across: str = ""
    places: int | None = None


@dataclass(frozen=True)
class Tree:
    """A tree of merges, its leaves from top to bottom.

    Attributes:
        caption: what it shows.
        names: of the leaves.
        order: the leaves as they are drawn.
        merges: rows (cluster, cluster, distance, size); row i makes cluster len(names) + i.
    """

    caption: str
    names: Sequence[str]
    order: Sequence[int]
    merges: Sequence[Sequence[float]]

    def places(self) -> list[tuple[float, float, float, float, float]]:
        """Return each merge as (x₁, y₁, x₂, y₂, x), y in rows and x in shares of the largest x."""
        most = max((merge[2] for merge in self.merges), default=1.0) or 1.0
        at = {leaf: (0.0, float(row)) for row, leaf in enumerate(self.order)}
        found = []
        for step, (first, second, distance, _) in enumerate(self.merges):
            (x1, y1), (x2, y2) = at.pop(int(first)), at.pop(int(second))
            x = max(distance, 0.0) / most
            at[len(self.names) + step] = (x, (y1 + y2) / 2.0)
            found.append((x1, y1, x2, y2, x))
        return found


Figure = Chart | Heatmap | Tree
Part = Numbers | Findings | Table | Figure


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    title: str
    parts: Sequence[Part]


def figures(sections: Sequence[Section]) -> list[Figure]:
    """Return the pictures of a report."""
    pictures = Chart | Heatmap | Tree
    return [part for one in sections for part in one.parts if isinstance(part, pictures)]


def groups(lines: Sequence[Line]) -> list[str]:
    """Return the groups of curves in the order in which they first appear."""
    return list(dict.fromkeys(line.group for line in lines))
