"""What an adapter is, on one line and as a small table, for terminals and notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import KindDelta, LowRank, ModuleChange

_MOST_ROWS = 20


def change_line(change: LowRank | KindDelta | ModuleChange) -> str:
    """Return a module's change on one line: kind, shape, rank, scale, types."""
    kind, rank, scale, shape, dtypes = _facts(change)
    parts = [
        kind,
        f"{_size(shape[0])} × {_size(shape[1])}",
        *([] if rank is None else [f"rank {rank}"]),
        *([] if scale is None else [f"scale {scale:g}"]),
        dtypes,
    ]
    return ", ".join(parts)


def adapter_line(adapter: Adapter) -> str:
    """Return an adapter on one line: format, modules, kinds, ranks, scales, size."""
    facts = [_facts(change) for change in adapter.modules.values()]
    parts = [
        adapter.format,
        f"{len(facts)} module{'s' * (len(facts) != 1)}",
        *_listed("", (kind for kind, *_ in facts)),
        *_listed("rank ", (rank for _, rank, *_ in facts if rank is not None)),
        *_listed("scale ", (f"{scale:g}" for _, _, scale, *_ in facts if scale is not None)),
        f"{adapter.weights_nbytes:,} bytes",
        *([] if adapter.source is None else [repr(str(adapter.source))]),
    ]
    return f"Adapter({', '.join(parts)})"


def adapter_table(adapter: Adapter) -> str:
    """Return an adapter as HTML: its line, and the first modules in a table."""
    from html import escape

    rows = []
    for name, change in list(adapter.modules.items())[:_MOST_ROWS]:
        kind, rank, scale, shape, dtypes = _facts(change)
        size = f"{_size(shape[0])} × {_size(shape[1])}"
        number = "" if scale is None else f"{scale:g}"
        cells = [name, kind, size, "" if rank is None else rank, number, dtypes]
        rows.append([escape(str(cell)) for cell in cells])
    header = ["module", "kind", "out × in", "rank", "scale", "dtypes"]
    more = len(adapter.modules) - len(rows)
    return (
        f"<p>{escape(adapter_line(adapter))}</p><table>{_row(header, 'th')}"
        + "".join(_row(row, "td") for row in rows)
        + "</table>"
        + (f"<p>and {more} more</p>" if more > 0 else "")
    )


def _row(cells: Iterable[str], tag: str) -> str:
    texts = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
    return f"<tr>{texts}</tr>"


def _facts(
    change: LowRank | KindDelta | ModuleChange,
) -> tuple[str, int | None, float | None, tuple[int | None, int | None], str]:
    """Return (kind, rank, scale, (out, in), types) of a change."""
    direction: Any = getattr(change, "direction", change)
    dtypes = "+".join(sorted({tensor.dtype.code for tensor in change.tensors()}))
    kind = getattr(change, "kind", "lora")
    rank, scale = getattr(direction, "rank", None), getattr(direction, "scale", None)
    return kind, rank, scale, direction.shape, dtypes


def _size(side: int | None) -> str:
    return "?" if side is None else str(side)


def _listed(label: str, values: Iterable[Any]) -> list[str]:
    """Return the distinct values, the most frequent first, three of them at most."""
    found = [str(value) for value, _ in Counter(values).most_common()]
    if not found:
        return []
    return [label + "/".join(found[:3]) + ("/…" if len(found) > 3 else "")]
