"""Reports of many modules: a line for each type of module, and the worst modules in full.

A model of 32 layers has 224 modules, and their table does not fit on a screen. A report of a few
modules lists each, and so does every report under `--verbose`. The numbers are those of the result;
only their least, median and largest are computed here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.algebra.outliers import family_of
from loratools.cli.output import number, print_table, say

FEW = 16
"""A report of no more modules than this has a row for each."""
_WORST = 5


@dataclass(frozen=True)
class Column:
    """What a report tells of each module.

    Attributes:
        title: of the column.
        values: one for each module; None where a module has none.
        text: how one of them is printed.
        none: what stands where there is none.
        side: where cells are aligned: `<` or `>`.
        listed: whether the rows of modules have it.
        summed: whether the summary tells its least, median and largest.
    """

    title: str
    values: Sequence[Any]
    text: Callable[[Any], str] = number
    none: str = "–"
    side: str = ">"
    listed: bool = True
    summed: bool = False

    def cells(self) -> list[str]:
        """Return what is printed for each module."""
        return [self.none if value is None else self.text(value) for value in self.values]


def print_modules(
    first: str,
    names: Sequence[str],
    columns: Sequence[Column],
    worst: Sequence[float] = (),
    *,
    verbose: bool,
) -> None:
    """Print a row for each module if they are few or asked for, and otherwise the summary.

    Args:
        first: title of the names.
        names: of the modules.
        columns: what is told of them.
        worst: for each module, the number by which the worst are chosen, the largest; empty if
            modules have no such number.
        verbose: print all rows.
    """
    listed, summed = ([c for c in columns if getattr(c, to)] for to in ("listed", "summed"))
    header, align = [first, *(c.title for c in listed)], "<" + "".join(c.side for c in listed)
    rows = [list(row) for row in zip(names, *(c.cells() for c in listed), strict=True)]
    if verbose or len(rows) <= FEW:
        print_table(header, align, rows)
        return
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        members[type_of(name)].append(index)
    types = [
        [
            name,
            str(len(indices)),
            *(_range([c.values[i] for i in indices], c.text) for c in summed),
        ]
        for name, indices in members.items()
    ]
    titles = ["type", f"{first}s", *(c.title for c in summed)]
    print_table(titles, "<" + ">" * (len(titles) - 1), types)
    say()
    if worst and min(worst) < max(worst):
        chosen = sorted(range(len(rows)), key=lambda i: -worst[i])[:_WORST]
        say(f"The worst {len(chosen)} of {len(rows)}; --verbose lists each:")
        print_table(header, align, [rows[i] for i in chosen])
    else:
        say("--verbose lists each")
    say()


def type_of(name: str) -> str:
    """Return a module's type: its own name, or its whole path where a number is its name.

    >>> type_of("model.layers.12.self_attn.q_proj"), type_of("model.layers.3.mlp.experts.7")
    ('q_proj', 'model.layers.*.mlp.experts.*')
    >>> type_of("model.layers.12.mlp.up_proj.weight"), type_of("lora_unet_blocks_3_attn_qkv")
    ('up_proj', 'lora_unet_blocks_*_attn_qkv')
    """
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return family_of(name) if leaf.isdigit() else family_of(leaf)


def _range(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    ordered = sorted(known)
    low, middle, high = (text(ordered[place]) for place in (0, len(ordered) // 2, -1))
    return low if low == high else f"{low}–{middle}–{high}"
