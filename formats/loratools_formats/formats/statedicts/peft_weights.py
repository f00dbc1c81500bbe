"""PEFT's weights of a plain LoRA without their `adapter_config.json`, as ICM-LoRA leaves them.

The scale is in the configuration that is missing, so that alpha, and whether it is over the rank or
its root, are asked for; read only. With the configuration beside them they are a PEFT folder, and
files of other names are single files of the diffusion world, where no alpha means a scale of 1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from loratools_formats.contract.registry import Format
from loratools_formats.formats.statedicts.statedict import SUFFIXES, StateDict, has_names

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter, Delta

WEIGHTS_FILE = "adapter_model.safetensors"
_PARTS = {"A": "a", "B": "b"}
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_TELLING = re.compile(_KEY.pattern.encode())


def is_bare(path: Path, names: list[bytes]) -> bool:
    """Return whether a safetensors file of these names is PEFT's weights, alone."""
    return path.name == WEIGHTS_FILE and any(_TELLING.fullmatch(name) for name in names)


def _sniff(path: Path) -> bool:
    return has_names(path, _TELLING, safetensors=path.name == WEIGHTS_FILE)


def _read(path: Path) -> Adapter:
    from loratools_formats.core.adapter import Layer, Missing, OtherDelta
    from loratools_formats.formats.peft.keys import square_orientation

    state = StateDict(path)
    own = state.by_module(_KEY, _PARTS, "names that end in .lora_A.weight or .lora_B.weight")
    modules: dict[str, Delta] = {}
    for module, parts in own.items():
        if set(parts) != {"a", "b"}:
            raise state.lacking(module, parts, "lora_A.weight and lora_B.weight")
        state.check_factors(parts)
        settings = {
            "alpha": Missing("the lora_alpha of the training script"),
            "variant": Missing("lora, or rslora if it had use_rslora", choices=("lora", "rslora")),
        }
        layer = Layer("linear", transposed_if_square=square_orientation(False, module))
        shape = (parts["b"].shape[0], parts["a"].shape[1])
        modules[module] = OtherDelta("unscaled", parts, settings, layer, shape)
    note = "there is no adapter_config.json beside it, which would tell the scale"
    return state.adapter(FORMAT.name, modules, notes=(note,))


FORMAT = Format(
    name="peft-weights",
    description="PEFT's weights without their adapter_config.json",
    suffixes=SUFFIXES,
    is_folder=False,
    sniff=_sniff,
    read=_read,
)
