"""LoLDU's state dicts: trained vectors alone, or parametrisations with all they hold; read only.

A file of vectors leaves alpha and the method of initialisation to be given. A whole state dict says
all, beside the base; the weights of other modules have to be left out of it.
Source: `minloldu/` of SKDDJ/LoLDU 4fe87a0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from loratools_formats.core.change import KindDelta
    from loratools_formats.core.tensors import TensorRef

_PARTS = {
    f"parametrizations.weight.{end}": part
    for end, part in (
        ("original", "residual"),
        ("0.vector_z", "z"),
        ("0.lora_A", "upper"),
        ("0.lora_B", "lower"),
        ("0.P", "permutation"),
        ("0.scaling_factor", "scale"),
        ("0.layer_weights", "copy"),
        ("0.lora_dropout_mask", "mask"),
    )
}
_WHOLE = frozenset(_PARTS.values()) - {"copy", "mask"}
_INITS = ("lu", "s_uniform", "s_normal", "ones", "zeros", "constant")


class LoLdu(StateDictFormat):
    """LoLDU's vectors, or its parametrisations."""

    name = "loldu"
    description = "state dict of LoLDU"
    telling = rb".+\.parametrizations\.weight\.0\.vector_z"
    parts = _PARTS
    expected = "names with .parametrizations.weight. in them"

    def delta(self, state: StateDict, module: str, parts: dict[str, TensorRef]) -> KindDelta:
        """Return the change of vectors alone, or of a whole parametrisation."""
        from loratools_formats.core.change import KindDelta, Missing

        state.check_factors({part: parts[part] for part in parts if part == "z"}, 1)
        if set(parts) == {"z"}:
            settings = {
                "alpha": Missing("the lora_alpha of the training script"),
                "init_method": Missing(
                    f"{', '.join(_INITS)}; after uniform or normal the random start is lost",
                    choices=_INITS,
                ),
            }
            return KindDelta("loldu", parts, settings)
        if not set(parts) >= _WHOLE:
            raise state.lacking(module, parts, "vector_z alone, or all of the parametrisation")
        state.check_factors({"residual": parts["residual"]})
        state.check_number(parts["scale"])
        out, in_ = parts["residual"].shape
        return KindDelta("loldu_full", parts, shape=(out, in_))


FORMAT = LoLdu()
