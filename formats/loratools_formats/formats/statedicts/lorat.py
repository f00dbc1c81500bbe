"""Checkpoints of LoRAT, the tracker: factors under `.lora.A` and `.lora.B`; read only.

A layer that fuses projections has them under `.qkv.q.lora.A` and so on. Alpha and rsLoRA are two
numbers at the root, left out if α is 1 without rsLoRA; since the code that merges such a file then
takes another scale than the one it was trained with, they are asked for. The rest of the file, the
head and the embeddings that were trained, replaces the tensors of those names.

Source: `models/methods/LoRAT/` of LitingLin/LoRAT 5260744.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter, Replacement
    from loratools_formats.core.change import ModuleChange
    from loratools_formats.core.tensors import TensorRef

_KEY = re.compile(r"(?P<module>.+?)\.lora\.(?P<side>[AB])")
_PART = re.compile(r"(?P<module>.+\.(?P<parts>qkv|kv))\.(?P<part>[qkv])")
_ROOT = {"lora_alpha": "alpha", "use_rslora": "rslora"}


class LoRat(StateDictFormat):
    """LoRAT's factors, and the trained tensors beside them."""

    name = "lorat"
    description = "checkpoint of LoRAT"
    telling = rb".+\.lora\.[AB]"

    def adapter(self, state: StateDict) -> Adapter:
        """Return the adapter: a change for each layer, fused or not, and replacements."""
        from loratools_formats.core.adapter import Replacement

        own: dict[str, dict[str, TensorRef]] = {}
        fused: dict[str, str] = {}
        rest: dict[str, TensorRef] = {}
        shared: dict[str, TensorRef] = {}
        owners = set()
        for name, tensor in state.tensors.items():
            key = _KEY.fullmatch(name)
            if key is None:
                (shared if name in _ROOT else rest)[name] = tensor
                continue
            owners.add(key["module"])
            part = _PART.fullmatch(key["module"])
            module, end = key["module"], ""
            if part is not None and part["part"] in part["parts"]:
                module, end = part["module"], f".{part['part']}"
            fused[module] = part["parts"] if part is not None and end else ""
            own.setdefault(module, {})[f"{key['side'].lower()}{end}"] = tensor
        for name in rest:
            if ".lora." in name or name.rpartition(".")[0].removesuffix(".linear") in owners:
                raise state.unknown(name, "lora.A and lora.B alone in a module that has them")
        if shared and set(shared) != set(_ROOT):
            raise state.unknown(next(iter(shared)), " and ".join(_ROOT))
        for number in shared.values():
            state.check_number(number)
        modules: dict[str, ModuleChange] = {}
        for module, found in own.items():
            sides = {name.removeprefix("a").removeprefix("b") for name in found}
            if any(f"{side}{end}" not in found for side in "ab" for end in sides):
                raise state.lacking(module, found, "lora.A and lora.B of each part")
            state.check_factors(found)
            modules[module] = _delta(found, fused[module], shared)
        replacements: dict[str, Replacement] = {
            name: Replacement("other", name, tensor) for name, tensor in rest.items()
        }
        return state.adapter(self.name, modules, shared=shared, replacements=replacements)


def _delta(own: dict[str, TensorRef], parts: str, shared: dict[str, TensorRef]) -> ModuleChange:
    from loratools_formats.core.change import KindDelta, Missing, ModuleChange

    settings: dict[str, Any] = {"parts": parts}
    if not shared:
        settings["alpha"] = Missing("1, if LoRAT trained it, or the rank, to scale nothing")
    numbers = {part: shared[name] for name, part in _ROOT.items() if name in shared}
    first = next(name for name in own if name.startswith("a"))
    height = own[f"b{first[1:]}"].shape[0] * max(len(parts), 1)
    shape = (height, own[first].shape[1])
    return ModuleChange(KindDelta("lorat", own, settings, shape=shape, shared=numbers))


FORMAT = LoRat()
