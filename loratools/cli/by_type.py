"""Reports of many modules: a line for each type of module, and the worst modules in full.

A model of 32 layers has 224 modules, and their table does not fit on a screen. A report of a few
modules lists each, and so does every report under `--verbose`. The numbers are those of the result;
only their least, median and largest are computed here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loratools.algebra.outliers import family_of
from loratools.cli.output import number, print_table, say

FEW = 16
"""A report of no more modules than this has a row for each."""
_WORST = 5


@dataclass(frozen=True)
class Measure:
    """A number of each module, of which the summary tells least, median and largest.

    Attributes:
        values: one for each module; None where a module has none.
        text: how one of them is printed.
    """

    values: Sequence[float | None]
    text: Callable[[float], str] = number


@dataclass(frozen=True)
class ModuleTable:
    """The full table, and what its summary is made of.

    Attributes:
        header: titles; the first is that of the names.
        align: `<` or `>` for each column.
        rows: cells; the first of each is the module's name.
        measures: what the summary tells, by title.
        worst: for each module, the number by which the worst are chosen, the largest; empty if no
            module is worse than another.
    """

    header: Sequence[str]
    align: str
    rows: Sequence[Sequence[str]]
    measures: Mapping[str, Measure] = field(default_factory=dict)
    worst: Sequence[float] = ()


def print_modules(table: ModuleTable, *, verbose: bool) -> None:
    """Print all rows if they are few or asked for, and otherwise the summary."""
    if verbose or len(table.rows) <= FEW:
        print_table(table.header, table.align, table.rows)
        return
    members: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(table.rows):
        members[type_of(row[0])].append(index)
    rows = [
        [
            name,
            str(len(indices)),
            *(_range([m.values[i] for i in indices], m.text) for m in table.measures.values()),
        ]
        for name, indices in members.items()
    ]
    header = ["type", f"{table.header[0]}s", *table.measures]
    print_table(header, "<" + ">" * (len(header) - 1), rows)
    say()
    if table.worst:
        worst = sorted(range(len(table.rows)), key=lambda i: -table.worst[i])[:_WORST]
        say(f"The worst {len(worst)} of {len(table.rows)}; --verbose lists each:")
        print_table(table.header, table.align, [table.rows[i] for i in worst])
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
