"""State dicts of the original LoRA code, `loralib`, and of what is built on it; read only.

Names end in `.lora_A` and `.lora_B`, without `.weight` and without a prefix. AdaLoRA adds
`.lora_E`, IncreLoRA numbers the pieces of all three, SoRA has a `gate` beside factors that lie
under `.lora`. There is no configuration: α is nowhere, nor which projections of a fused layer are
adapted, so both are left for the user to give. Biases that were trained are values, and replace the
base's.

Sources: microsoft/LoRA c4593f0, QingruZhang/AdaLoRA d10f5eb, FeiyuZhang98/IncreLoRA 51a2d73 and
TsinghuaC3I/SoRA c275ac2. Pickles are opened in a bounded child process, as PEFT's are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.registry import Format
from loratools_formats.statedict import SUFFIXES, StateDict, has_names

if TYPE_CHECKING:
    from loratools_formats.adapter import Adapter, Delta, OtherDelta
    from loratools_formats.tensors import TensorRef

_KEY = re.compile(
    r"(?P<module>.+?)(?:\.lora)?\.(?:lora_(?P<side>[ABE])(?:\.(?P<piece>\d{1,4}))?|(?P<gate>gate))"
)
_FIRST_FACTOR = re.compile(rb".+\.lora_A(?:\.\d{1,4})?")
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings")


def _sniff(path: Path) -> bool:
    return has_names(path, _FIRST_FACTOR)


def _read(path: Path) -> Adapter:
    from loratools_formats.adapter import Replacement

    state = StateDict(path)
    parts: dict[str, dict[str, TensorRef]] = {}
    replacements = {}
    for key, tensor in state.tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            side = "gate" if match["gate"] else match["side"].lower()
            name = side if match["piece"] is None else f"{side}.{match['piece']}"
            parts.setdefault(match["module"], {})[name] = tensor
        elif key.endswith(".bias"):
            replacements[key] = Replacement("bias", key, tensor)
        else:
            raise state.unknown(key, "names that end in .lora_A, .lora_B, .lora_E, .gate or .bias")
    modules: dict[str, Delta] = {name: _delta(name, found, path) for name, found in parts.items()}
    return state.adapter(FORMAT.name, modules, replacements=replacements)


def _delta(name: str, parts: dict[str, TensorRef], path: Path) -> OtherDelta:
    from loratools_formats.adapter import Layer, Missing, OtherDelta
    from loratools_formats.errors import AdapterError

    alpha = Missing("the lora_alpha of the training script")
    settings: dict[str, Any] = {"alpha": alpha}
    pieces = {part.partition(".")[0] for part in parts}
    numbered = any("." in part for part in parts)
    wanted = {"a", "b"} | (pieces & {"gate"} if not numbered else {"e"})
    if "e" in pieces:
        wanted |= {"e"}
    if pieces != wanted or (numbered and not all("." in part for part in parts)):
        raise AdapterError(
            "module lacks a factor", path=path, tensor=name, got=", ".join(sorted(parts))
        )
    for tensor in parts.values():
        if not tensor.dtype.floating or not 1 <= len(tensor.shape) <= 2 or not tensor.numel:
            raise AdapterError(
                "factor is not a matrix", path=path, tensor=tensor.key, got=list(tensor.shape)
            )
    layer = Layer("embedding" if name.rpartition(".")[2] in _EMBEDDINGS else "linear")
    if layer.kind == "linear":
        layer = Layer("linear", transposed_if_square=None)
    if "e" in pieces:
        if not numbered:
            settings["ranknum"] = float(parts["a"].shape[0])
            parts = {f"{part}.0": tensor for part, tensor in parts.items()}
        else:
            settings["ranknum"] = Missing("the number of active ranks of a module")
        return OtherDelta("increlora", parts, settings, layer)
    a, b = parts["a"].shape, parts["b"].shape
    if "gate" in parts:
        return OtherDelta("gated", parts, {"alpha": alpha}, layer, (b[0], a[1]))
    if len(a) == len(b) == 2 and b[1] < a[0] and a[0] % b[1] == 0:
        settings["groups"] = Missing(
            "a digit for each projection of the fused layer, 1 if it is adapted, such as 101",
            pattern="[01]*1[01]*",
        )
        return OtherDelta("loralib", parts, settings, layer, (None, a[1]))
    return OtherDelta("loralib", parts, settings, layer, (b[0], a[1]))


FORMAT = Format(
    name="loralib",
    description="state dict of the original LoRA code (loralib, AdaLoRA, IncreLoRA, SoRA)",
    suffixes=SUFFIXES,
    is_folder=False,
    sniff=_sniff,
    read=_read,
)
