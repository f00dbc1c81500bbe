"""RandLoRA's state dicts of its authors' experiments with GPT-2 and in vision; read only.

Every module has its trained diagonals, `randlora_lambda` and `randlora_gamma` (`w_loramat_B` and
`w_loramat_A` in vision), and the bases that it shares with the others, `basis_a` and `basis_b`.
Alpha, and which projections of a fused layer are adapted, are not in the file. In vision whole
models are pickled as objects, which is refused as any program in a file is: the tensors of that
name have to be taken out of one. Adapters of the authors' fork of PEFT are PEFT folders.

Source: `NLG/loralib` and `vision_language/src/rand_lora.py` of PaulAlbert31/RandLoRA 4ac565e.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import KindDelta
    from loratools_formats.core.tensors import TensorRef

_AXES = {"lambda": 2, "gamma": 2, "a": 3, "b": 3}
_FUSED = ("c_attn",)
_PARTS = {
    "randlora_lambda": "lambda", "randlora_gamma": "gamma", "w_loramat_B": "lambda",
    "w_loramat_A": "gamma", "in_proj_w_loramat_B": "lambda", "in_proj_w_loramat_A": "gamma",
    "basis_a": "a", "basis_b": "b",
}  # fmt: skip


class RandLora(StateDictFormat):
    """RandLoRA's diagonals and bases."""

    name = "randlora"
    description = "state dict of RandLoRA's authors (GPT-2, vision)"
    telling = rb".+\.(?:randlora_lambda|(?:in_proj_)?w_loramat_B)"
    parts = _PARTS
    expected = ", ".join(_PARTS)

    def adapter(self, state: StateDict) -> Adapter:
        """Return the adapter, if all modules have the same bases."""
        adapter = super().adapter(state)
        for basis in ("a", "b"):
            state.check_same([parts[basis] for parts in self.by_module(state).values()])
        return adapter

    def delta(self, state: StateDict, module: str, parts: dict[str, TensorRef]) -> KindDelta:
        """Return the change of a linear or fused layer, or of one in vision."""
        from loratools_formats.core.change import KindDelta, Layer, Missing

        if set(parts) != set(_AXES):
            raise state.lacking(module, parts, "trained diagonals, basis_a and basis_b")
        for part, axes in _AXES.items():
            state.check_factors({part: parts[part]}, axes)
        vision = "loramat" in parts["lambda"].key
        settings: dict[str, Any] = {
            "alpha": Missing("the lora_alpha of the training script"),
            "vision": vision,
        }
        if vision:
            return KindDelta("randlora_authors", parts, settings)
        fused = parts["lambda"].shape[1] > parts["b"].shape[2] or module.endswith(_FUSED)
        if fused:
            settings["groups"] = Missing(
                "a digit for each projection of the fused layer, 1 if it is adapted, such as 101",
                pattern="[01]*1[01]*",
            )
        layer = Layer("linear", transposed_if_square=None if fused else True)
        return KindDelta("randlora_authors", parts, settings, layer)


FORMAT = RandLora()
