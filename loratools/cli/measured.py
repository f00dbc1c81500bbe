"""How measurements are printed: sparklines, comma-separated values, shortened lists."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.cli.output import say
from loratools_formats.disk.errors import printable

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 16
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_DECADES = 3.0  # below the largest value of all


def sparkline(values: Sequence[float], largest: float) -> str:
    """Return descending values as bars on a logarithmic scale of three decades below `largest`.

    >>> sparkline([1.0, 0.1, 0.01, 0.0], 1.0)
    '█▆▃▁'
    """
    count = min(_WIDTH, len(values))
    shown = [values[round(i * (len(values) - 1) / max(count - 1, 1))] for i in range(count)]
    return "".join(_bar(value, largest) for value in shown)


def _bar(value: float, largest: float) -> str:
    if value <= 0.0 or largest <= 0.0:
        return _BARS[0]
    share = 1.0 + math.log10(value / largest) / _DECADES
    return _BARS[min(max(round(share * (len(_BARS) - 1)), 0), len(_BARS) - 1)]


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print dictionaries as comma-separated values, nested ones with their names joined."""
    flat = [_flat("", row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    print_csv_table(names, [[row.get(name) for name in names] for row in flat])


def print_csv_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows as comma-separated values.

    Text that a spreadsheet would take for a formula gets an apostrophe in front, in the header too.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(name) for name in header])
    writer.writerows([[_cell(value) for value in row] for row in rows])
    say(buffer.getvalue(), nl=False)


def _flat(prefix: str, row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= _flat(f"{prefix}{name}_", value)
        else:
            found[f"{prefix}{name}"] = value
    return found


def _cell(value: Any) -> str:
    r"""Return one value as text.

    >>> _cell("=SUM(A1)"), _cell(-0.5), _cell((2, 3)), _cell(None), _cell("a\nb")
    ("'=SUM(A1)", '-0.5', '2 3', '', 'a\\nb')
    """
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " ".join(_cell(item) for item in value)
    if not isinstance(value, str):
        return str(value)
    text = printable(value, 1000)
    return f"'{text}" if text.startswith(_FORMULA) else text


def optional(value: float | None, form: str = ".3g") -> str:
    """Return a number, or a dash where there is none."""
    return "–" if value is None else f"{value:{form}}"
