"""Uni-LoRA of its authors' RoBERTa code: a bank of numbers and where each goes; read only.

Indices and norms are stored with both axes the other way round than in PEFT. The bank is one
parameter under the name of every module; what saves it once keeps the first name. The weights of
the model beside them have to be left out.

Source: `NLU/unilora/unilora.py` of KaiyangLi1992/Uni-LoRA 3387a6e.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import ModuleChange

_PARTS = {
    "project_params_A": "indices_a",
    "project_params_B": "indices_b",
    "norm_factor_A": "scales_a",
    "norm_factor_B": "scales_b",
    "vector_bank": "bank",
}


class UniLora(StateDictFormat):
    """Uni-LoRA's indices, norms and bank."""

    name = "unilora"
    description = "indices and bank of Uni-LoRA's authors"
    telling = rb".+\.project_params_[AB]"
    parts = _PARTS
    expected = f"names that end in {', '.join(_PARTS)}"

    def adapter(self, state: StateDict) -> Adapter:
        """Return the adapter, with the bank shared by all modules."""
        from loratools_formats.core.change import KindDelta, ModuleChange

        modules: dict[str, ModuleChange] = {}
        found, shared = state.with_one_bank(self.by_module(state), self.parts)
        for module, parts in found.items():
            transposed = {name: ref for name, ref in parts.items() if name != "bank"}
            state.check_axes(transposed, 2)
            parts |= {name: ref.transposed((1, 0)) for name, ref in transposed.items()}
            shape = (parts["indices_b"].shape[0], parts["indices_a"].shape[1])
            modules[module] = ModuleChange(KindDelta("unilora", parts, shape=shape, shared=shared))
        bank = {tensor.key: tensor for tensor in shared.values()}
        return state.adapter(self.name, modules, shared=bank)


FORMAT = UniLora()
