"""Experts that DBRX keeps below each other in one matrix: (E·F, H) for each of w1, v1 and w2.

mlx-lm has a linear layer for each. w2 of one, (H, F), is a block of rows the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.base.placement.changes import Placement
from loratools.base.placement.names import Names
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.flat_experts import SINGLE
from loratools_formats.core.orientation import OTHER_BASE, exchanged
from loratools_formats.disk.errors import AdapterError, UnsupportedError


def experts_in(config: Mapping[str, object], rows: int, parameter: str) -> int:
    """Return how many experts a matrix of so many rows holds.

    Raises:
        UnsupportedError: the base's configuration does not tell.
    """
    section = config.get("ffn_config")
    experts = section.get("moe_num_experts") if isinstance(section, Mapping) else None
    if not isinstance(experts, int) or experts < 1 or rows % experts:
        raise UnsupportedError(
            "how many experts this matrix holds is not in the base's configuration",
            tensor=parameter,
            got=f"{rows} rows, {experts} experts",
            expected="moe_num_experts in ffn_config",
        )
    return experts


def flat_placements(names: Names, module: str, delta: ModuleChange) -> list[Placement]:
    """Return which rows of a matrix the change of a single expert goes to; empty if to none.

    Raises:
        AdapterError: the base has fewer experts, or of another shape.
        UnsupportedError: the number of experts is not known, or the change is a DoRA of w2.
    """
    match = SINGLE.fullmatch(names.spelling(module))
    key = None if match is None else names.find(f"{match['owner']}.mlp.{match['leaf']}")
    if match is None or key is None or len(names.shape(key)) != 2:
        return []
    total, width = names.shape(key)
    experts = experts_in(names.base.config, total, key)
    index, part = int(match["index"]), delta.require_factors()
    if match["leaf"] == "w2":
        if delta.is_dora:
            raise UnsupportedError(
                "a DoRA of w2 has a magnitude for each row of a matrix that is stored transposed",
                tensor=module,
            )
        part = exchanged(part)
    rows = total // experts
    if index >= experts or part.shape != (rows, width):
        raise AdapterError(
            "the delta does not fit the base weight",
            tensor=module,
            got=f"expert {index} of {part.shape[0]} rows and {part.shape[1]} columns",
            expected=f"{experts} experts of {rows} rows and {width} columns",
            hint=OTHER_BASE,
        )
    outputs = ((index * rows, (index + 1) * rows),)
    return [Placement(key, module, delta.with_direction(part), False, outputs=outputs)]
