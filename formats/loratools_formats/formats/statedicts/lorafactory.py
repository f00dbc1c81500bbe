"""Trained parameters of LoRAFactory (MyTransformers): `weight_a` and `weight_b`; read only.

Its many variants save the same two names with other formulas, so that which one it is has to be
said, and so has the number that its `lora_scaler` was. Variants with further tensors are refused.
Source: `common/lora_modules/` of hhnqqq/MyTransformers 4037d4d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from loratools_formats.core.change import KindDelta
    from loratools_formats.core.tensors import TensorRef

_PARTS = {"weight_a": "a", "weight_b": "b"}


class LoraFactory(StateDictFormat):
    """LoRAFactory's trained parameters."""

    name = "lorafactory"
    description = "trained parameters of LoRAFactory (MyTransformers)"
    telling = rb".+\.weight_[ab]"
    parts = _PARTS
    expected = "names that end in .weight_a or .weight_b"

    def delta(self, state: StateDict, module: str, parts: dict[str, TensorRef]) -> KindDelta:
        """Return a pair of factors whose scale and variant are missing."""
        from loratools_formats.core.change import KindDelta, Missing

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
        return KindDelta("unscaled", parts, settings, shape=shape)


FORMAT = LoraFactory()
