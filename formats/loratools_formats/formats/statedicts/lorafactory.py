"""Trained parameters of LoRAFactory (MyTransformers): `weight_a` and `weight_b`; read only.

Its many variants save the same two names with other formulas, so that which one it is has to be
said, and so has the number that its `lora_scaler` was. Variants with further tensors are refused.
Source: `common/lora_modules/` of hhnqqq/MyTransformers 4037d4d.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from loratools_formats.contract.registry import Format
from loratools_formats.formats.statedicts.statedict import SUFFIXES, StateDict, has_names

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter, Delta

_PARTS = {"weight_a": "a", "weight_b": "b"}
_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(_PARTS)})")
_TELLING = re.compile(rb".+\.weight_[ab]")


def _sniff(path: Path) -> bool:
    return has_names(path, _TELLING, safetensors=True)


def _read(path: Path) -> Adapter:
    from loratools_formats.core.adapter import Missing, OtherDelta

    state = StateDict(path)
    own = state.by_module(_KEY, _PARTS, "names that end in .weight_a or .weight_b")
    modules: dict[str, Delta] = {}
    for module, parts in own.items():
        if set(parts) != {"a", "b"}:
            raise state.lacking(module, parts, "weight_a and weight_b")
        state.check_factors(parts)
        settings = {
            "alpha": Missing("the lora_scaler of the training script"),
            "variant": Missing(
                "lora, or rslora, if trained so; other variants have other changes",
                choices=("lora", "rslora"),
            ),
        }
        shape = (parts["b"].shape[0], parts["a"].shape[1])
        modules[module] = OtherDelta("unscaled", parts, settings, shape=shape)
    return state.adapter(FORMAT.name, modules)


FORMAT = Format(
    name="lorafactory",
    description="trained parameters of LoRAFactory (MyTransformers)",
    suffixes=SUFFIXES,
    is_folder=False,
    sniff=_sniff,
    read=_read,
)
