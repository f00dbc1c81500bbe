"""VB-LoRA of its authors: `logits_A`, `logits_B` and `vector_bank`; read only.

A's logits are (in/b, r, h), the first two axes the other way round than PEFT's. The bank is one
parameter under the name of every module; what saves it once keeps the first name. How many logits
count is in no file. Source: `NLU/vblora/vblora.py` of leo-yangli/VB-LoRA b1a4230. The weights of
the model beside them have to be left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import ModuleChange

_PARTS = {"logits_A": "logits_a", "logits_B": "logits_b", "vector_bank": "bank"}


class VbLora(StateDictFormat):
    """VB-LoRA's logits and bank."""

    name = "vblora"
    description = "logits and vector bank of VB-LoRA's authors"
    telling = rb".+\.logits_[AB]"
    parts = _PARTS
    expected = f"names that end in {', '.join(_PARTS)}"

    def adapter(self, state: StateDict) -> Adapter:
        """Return the adapter, with the bank shared by all modules."""
        from loratools_formats.core.change import KindDelta, Missing, ModuleChange

        modules: dict[str, ModuleChange] = {}
        found, shared = state.with_one_bank(self.by_module(state), self.parts)
        for module, parts in found.items():
            state.check_factors({name: parts[name] for name in ("logits_a", "logits_b")}, 3)
            bank = {**parts, **shared}["bank"]
            state.check_factors({"bank": bank})
            length = bank.shape[1]
            shape = (parts["logits_b"].shape[0] * length, parts["logits_a"].shape[0] * length)
            parts["logits_a"] = parts["logits_a"].transposed((1, 0, 2))
            settings = {"topk": Missing("topk of the training script", whole=True)}
            modules[module] = ModuleChange(
                KindDelta("vblora", parts, settings, shape=shape, shared=shared)
            )
        shared_by_key = {tensor.key: tensor for tensor in shared.values()}
        return state.adapter(self.name, modules, shared=shared_by_key)


FORMAT = VbLora()
