"""In which order llama.cpp keeps the rows of a module, as functions of a base model's sizes.

A layout turns the number of rows of a module into the rows that each of its GGUF tensors takes.
Source: the model classes of convert_hf_to_gguf.py, llama.cpp b10605.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loratools_formats.disk.errors import AdapterError

Rows = list[int]
"""For each row of a GGUF tensor, the row of the model's weight that goes there."""


@dataclass(frozen=True)
class Sizes:
    """What layouts depend on.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key and value heads.
        hidden: width of the model.
        head_width: rows of one head.
        experts: number of experts, 0 if it has none.
        expert_width: width inside an expert.
        linear_keys: key heads of linear attention, 0 if it has none.
        linear_values: its value heads, a multiple of them.
        linear_key_width: rows of one of its key heads.
    """

    heads: int
    kv_heads: int
    hidden: int
    head_width: int
    experts: int = 0
    expert_width: int = 0
    linear_keys: int = 0
    linear_values: int = 0
    linear_key_width: int = 0


def _check_heads(rows: int, heads: int, width: int) -> None:
    """Refuse rows of another model, which would be put into a wrong order without complaint."""
    if rows != heads * width:
        raise AdapterError(
            "module does not fit the base model",
            got=f"{rows} rows",
            expected=f"{heads} heads of {width}",
        )


def _rotary(rows: Rows, heads: int, width: int) -> Rows:
    """Interleave the two halves of each head."""
    _check_heads(len(rows), heads, width)
    if width % 2:
        raise AdapterError("heads of odd width have no halves", got=width)
    half = width // 2
    return [
        rows[h * width + t * half + j] for h in range(heads) for j in range(half) for t in (0, 1)
    ]


def whole(rows: int, _: Sizes) -> list[Rows]:
    """One tensor with the rows as they are."""
    return [list(range(rows))]


def query(rows: int, sizes: Sizes) -> list[Rows]:
    """Query heads, the two halves of each interleaved."""
    return [_rotary(list(range(rows)), sizes.heads, sizes.head_width)]


def key(rows: int, sizes: Sizes) -> list[Rows]:
    """Key heads, the two halves of each interleaved."""
    return [_rotary(list(range(rows)), sizes.kv_heads, sizes.head_width)]


def halves(rows: int, _: Sizes) -> list[Rows]:
    """The first half of the rows goes to the first tensor, the second to the other."""
    if rows % 2:
        raise AdapterError("odd number of rows has no halves", got=rows)
    half = rows // 2
    return [list(range(half)), list(range(half, rows))]


def _grouped(rows: int, groups: int, queries: int, width: int) -> tuple[Rows, Rows, Rows]:
    """Sort rows that come as groups of `queries` query heads, a key and a value head."""
    _check_heads(rows, groups * (queries + 2), width)
    q: Rows = []
    k: Rows = []
    v: Rows = []
    for group in range(groups):
        start = group * (queries + 2) * width
        q += range(start, start + queries * width)
        k += range(start + queries * width, start + (queries + 1) * width)
        v += range(start + (queries + 1) * width, start + (queries + 2) * width)
    return q, k, v


def _per_group(rows: int, sizes: Sizes) -> tuple[Rows, Rows, Rows]:
    return _grouped(rows, sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.head_width)


def sorted_per_head(rows: int, sizes: Sizes) -> list[Rows]:
    """Query, key and value of each head: all queries, then all keys, then all values."""
    q, k, v = _grouped(rows, sizes.heads, 1, sizes.head_width)
    return [q + k + v]


def sorted_per_group(rows: int, sizes: Sizes) -> list[Rows]:
    """Groups of query heads, a key and a value head: all queries, all keys, all values."""
    return [[row for part in _per_group(rows, sizes) for row in part]]


def split_per_group(rows: int, sizes: Sizes) -> list[Rows]:
    """Such groups to three tensors, with the halves of queries and keys interleaved."""
    q, k, v = _per_group(rows, sizes)
    width = sizes.head_width
    return [_rotary(q, sizes.heads, width), _rotary(k, sizes.kv_heads, width), v]


def alternating(rows: int, _: Sizes) -> list[Rows]:
    """Every other row goes to the first tensor, the rest to the second."""
    if rows % 2:
        raise AdapterError("odd number of rows has no halves", got=rows)
    return [list(range(0, rows, 2)), list(range(1, rows, 2))]


def value_heads(rows: int, sizes: Sizes) -> list[Rows]:
    """Value heads of linear attention: the first of each key head, then the second of each."""
    return [_tiled(list(range(rows)), sizes)]


def linear_heads(rows: int, sizes: Sizes) -> list[Rows]:
    """Queries and keys of linear attention as they are, then its value heads."""
    start = 2 * sizes.linear_keys * sizes.linear_key_width
    order = list(range(rows))
    return [order[:start] + _tiled(order[start:], sizes)]


def _tiled(rows: Rows, sizes: Sizes) -> Rows:
    keys, values = sizes.linear_keys, sizes.linear_values
    if not keys or values % keys or not rows or len(rows) % values:
        raise AdapterError(
            "module does not fit the base model",
            got=f"{len(rows)} rows",
            expected=f"{values} value heads for {keys} key heads",
        )
    width, each = len(rows) // values, values // keys
    heads = [rows[i : i + width] for i in range(0, len(rows), width)]
    return [row for i in range(each) for key in range(keys) for row in heads[key * each + i]]


LAYOUTS: dict[str, Callable[[int, Sizes], list[Rows]]] = {
    function.__name__: function
    for function in (
        whole,
        query,
        key,
        halves,
        sorted_per_head,
        sorted_per_group,
        split_per_group,
        alternating,
        value_heads,
        linear_heads,
    )
}
"""Every layout by its name, as the table of rows spells it."""
