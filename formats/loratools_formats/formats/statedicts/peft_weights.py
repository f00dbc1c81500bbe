"""PEFT's weights of a plain LoRA without their `adapter_config.json`, as ICM-LoRA leaves them.

The scale is in the configuration that is missing, so that alpha, and whether it is over the rank or
its root, are asked for; read only. With the configuration beside them they are PEFT's, whatever the
file is called, and with a scale in the file they are a single file of the diffusion world.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools_formats.core.peft_facts import OF_LANGUAGE_MODEL, PREFIX
from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from pathlib import Path

    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import KindDelta
    from loratools_formats.core.tensors import TensorRef

_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b"}


class PeftWeights(StateDictFormat):
    """PEFT's weights, alone."""

    name = "peft-weights"
    description = "PEFT's weights without their adapter_config.json"
    telling = rb"(?:base_model\.model\.|%s).+\.lora_[AB]\.weight" % OF_LANGUAGE_MODEL.encode()
    parts = _PARTS
    expected = "names that end in .lora_A.weight or .lora_B.weight"

    def sniff(self, path: Path) -> bool:
        """Return whether a name is telling, and no single file's format claims it for its scale."""
        from loratools_formats.contract.registry import registered_formats

        others = [entry.format for entry in registered_formats()]
        single = [other for other in others if other is not None and other.naming is not None]
        return super().sniff(path) and not any(other.sniff(path) for other in single)

    def prefix_of(self, state: StateDict) -> str:
        """Return PEFT's prefix, unless it is gone from all names alike."""
        return PREFIX if any(name.startswith(PREFIX) for name in state.tensors) else ""

    def adapter(self, state: StateDict) -> Adapter:
        """Return the adapter, with a finding about the missing configuration."""
        from dataclasses import replace

        from loratools_formats.core.findings import Finding

        adapter = super().adapter(state)
        text = "there is no adapter_config.json beside it, which would state the scale"
        missing = Finding("config-missing", "warning", "adapter_config.json", text)
        return replace(adapter, findings=(*adapter.findings, missing))

    def delta(self, state: StateDict, module: str, parts: dict[str, TensorRef]) -> KindDelta:
        """Return a pair of factors whose scale and variant are missing."""
        from loratools_formats.core.change import KindDelta, Layer, Missing
        from loratools_formats.core.peft_facts import square_orientation

        if set(parts) != {"a", "b"}:
            raise state.lacking(module, parts, "lora_A.weight and lora_B.weight")
        state.check_factors(parts)
        settings = {
            "alpha": Missing("the lora_alpha of the training script"),
            "variant": Missing("lora, or rslora if it had use_rslora", choices=("lora", "rslora")),
        }
        layer = Layer("linear", transposed_if_square=square_orientation(False, module))
        shape = (parts["b"].shape[0], parts["a"].shape[1])
        return KindDelta("unscaled", parts, settings, layer, shape)


FORMAT = PeftWeights()
