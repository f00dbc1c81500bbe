"""Which modules of a file must have one rank and scale, so that its loader takes it.

PEFT names the settings of expert parameters by parameter; where a file does not say which of two
adapted parameters of one module is which, both need the same. What PEFT stacks when it loads, such
as experts that are adapted one by one, needs one rank, too. MLX's configuration states one rank and
one scale for all modules. Other formats have no such groups.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools_formats.core.change import Layer
from loratools_formats.core.peft_facts import stacked_on_loading


def groups_of_one_rank(layers: Mapping[str, Layer], format_name: str) -> list[list[str]]:
    """Return the groups of modules that must have one rank and scale.

    Args:
        layers: by module path.
        format_name: of the file to write.
    """
    if format_name == "mlx":
        return [list(layers)] if len(layers) > 1 else []
    stacked = stacked_on_loading(layers) if format_name == "peft" else []
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, layer in layers.items():
        if len(layer.parameters) > 1:
            groups.setdefault(layer.parameters, []).append(name)
    return [names for names in (stacked, *groups.values()) if len(names) > 1]
