"""What a benchmark returns, and how it is printed: Markdown tables and targets met or missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One line of a table: a name and its cells, already formatted."""

    name: str
    cells: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table with a title, a header for each column, and a remark below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Row]
    remark: str = ""


@dataclass(frozen=True)
class Target:
    """Something that was promised, and what was measured.

    Attributes:
        wanted: the promise.
        measured: the figures.
        met: whether they keep it.
        why: where it is missed, if only by the medians, by how much and for what measured reason.
    """

    wanted: str
    measured: str
    met: bool
    why: str = ""


@dataclass(frozen=True)
class Report:
    """The result of one benchmark."""

    title: str
    text: str
    targets: Sequence[Target]
    tables: Sequence[Table] = field(default_factory=list)


def seconds(value: float) -> str:
    """Format a time."""
    if value >= 600:
        return f"{value / 60:.0f} min"
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def megabytes(nbytes: float) -> str:
    """Format a size in units of 10⁶ bytes."""
    return f"{nbytes / 1e6:.3g} MB" if nbytes < 1e9 else f"{nbytes / 1e6:.0f} MB"


def ratio(value: float) -> str:
    """Format a ratio."""
    return f"{value:,.0f}×" if value >= 100 else f"{value:.3g}×"


def cores(value: float | None) -> str:
    """Format a number of cores."""
    return "–" if value is None else f"{value:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    columns = [[row[i] for row in rows] for i in range(len(header))]
    numeric = [
        any(cell[:1].isdigit() for cell in column)
        and all(cell[:1].isdigit() or cell == "–" for cell in column)
        for column in columns
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        f"{'-' * (width + 1)}:" if right else "-" * (width + 2)
        for width, right in zip(widths, numeric, strict=True)
    ]
    return [line(header), f"|{'|'.join(rule)}|", *(line(row) for row in rows)]


def markdown(report: Report) -> str:
    """Return a report as Markdown."""
    lines = [f"## {report.title}", "", report.text, ""]
    targets = [
        [target.wanted, target.measured, "met" if target.met else "**missed**", target.why or "–"]
        for target in report.targets
    ]
    if targets:
        lines += _table(["target", "measured", "", "where missed, by how much and why"], targets)
    for table in report.tables:
        lines += ["", f"### {table.title}", ""]
        lines += _table(table.header, [[row.name, *row.cells] for row in table.rows])
        if table.remark:
            lines += ["", table.remark]
    return "\n".join(lines) + "\n"
