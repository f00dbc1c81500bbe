"""Settings that PEFT does not bear beside adapted parameters, such as stacks of experts.

Nor does it bear biases of factors beside embeddings. PEFT stops when it makes the layer. Dropout
matters to training alone, so that it is written as 0, which leaves every ΔW as it is. On
transformers 5 this holds for single experts too, since PEFT stacks them when it loads them.

Source: `ParamWrapper` of peft 0.21.2.
"""

from __future__ import annotations

from typing import Any

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_on_load import parameters_of
from loratools_formats.disk.errors import UnsupportedError
from loratools_formats.formats.peft.experts.packed import PACKED


def without_dropout(values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Return a configuration without dropout, if an adapter changes parameters."""
    if values.get("lora_dropout") and parameters_of(adapter):
        return {**values, "lora_dropout": 0.0}
    return values


def refuse_biases(adapter: Adapter) -> None:
    """Refuse to write biases of factors beside parameters or embeddings.

    Raises:
        UnsupportedError: there are both.
    """
    biased = [n for n, c in adapter.modules.items() if c.factors and c.factors.bias is not None]
    if not biased or adapter.write_as in PACKED:
        return
    for name, change in adapter.modules.items():
        is_embedding = change.layer.kind == "embedding"
        if is_embedding or change.layer.parameters:
            what = "an embedding" if is_embedding else "parameters"
            raise UnsupportedError(
                f"PEFT takes no biases of factors (lora_bias) beside {what} that it adapts",
                path=adapter.source,
                tensor=biased[0],
                got=f"{name} beside it",
                hint="Fuse them into the base instead: loratools fuse BASE ADAPTER -o FUSED",
            )


def about_dropout(adapter: Adapter) -> list[Finding]:
    """Return a finding if a dropout that the configuration has is not written."""
    dropout = adapter.config.get("lora_dropout") if adapter.format == "peft" else None
    found = parameters_of(adapter) if dropout else []
    if not found:
        return []
    text = (
        f"lora_dropout of {dropout} is written as 0: it matters to training alone, and PEFT does "
        "not load adapters of experts with one"
    )
    return [Finding("dropout-left-out", "note", found[0], text)]
