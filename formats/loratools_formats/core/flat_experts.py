"""Experts that DBRX keeps below each other in one matrix: (E·F, H) for each of w1, v1 and w2.

PEFT adapts the matrix: A (r, H) is common to all experts, and B (E·F, r) has the rows of each.
Other programs have a linear layer for each expert; w2 of one, (H, F), is a block of rows turned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from loratools_formats.core.change import Layer, LowRank

FLAT = re.compile(r"(?P<owner>.+\.ffn\.experts)\.mlp\.(?P<leaf>w1|v1|w2)")
"""Names of the matrices."""
SINGLE = re.compile(r"(?P<owner>.+\.ffn\.experts)\.(?P<index>\d{1,6})\.(?P<leaf>w1|v1|w2)")
"""Names of the linear layers."""


def singles_of(parameter: str, part: LowRank, experts: int) -> Iterator[tuple[str, LowRank]]:
    """Yield the linear layers that a change of a matrix is, by their names; no value changes.

    Args:
        parameter: the name of the matrix, such as `transformer.blocks.0.ffn.experts.mlp.w1`.
        part: its factors, A (r, H) and B (E·F, r).
        experts: how many it holds.
    """
    match = FLAT.fullmatch(parameter)
    assert match is not None
    rows = part.b.shape[0] // experts
    for expert in range(experts):
        a, b = part.a, part.b.rows(list(range(expert * rows, (expert + 1) * rows)))
        if match["leaf"] == "w2":
            a, b = b.transposed((1, 0)), a.transposed((1, 0))
        single = replace(part, a=a, b=b, layer=Layer("linear"))
        yield f"{match['owner']}.{expert}.{match['leaf']}", single
