"""State dicts of the original LoRA code, `loralib`, and of what is built on it; read only.

Names end in `.lora_A` and `.lora_B`, without `.weight` and without a prefix. AdaLoRA adds
`.lora_E`, IncreLoRA numbers the pieces of all three, SoRA has a `gate` beside factors that lie
under `.lora`. There is no configuration: α is nowhere, nor which projections of a fused layer are
adapted, so both are left for the user to give. The factors of a convolution look like those of a
linear layer k times as large, so that its kernel is asked for, too, unless the base tells it, or
the name is that of a layer of language models. Biases that were trained are values, and replace
the base's.

Sources: microsoft/LoRA c4593f0, QingruZhang/AdaLoRA d10f5eb, FeiyuZhang98/IncreLoRA 51a2d73 and
TsinghuaC3I/SoRA c275ac2. Pickles are opened in a bounded child process, as PEFT's are.
"""

from __future__ import annotations

import re
from functools import partial
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from collections.abc import Collection

    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import KindDelta, Layer
    from loratools_formats.core.tensors import TensorRef

_KEY = re.compile(
    r"(?P<module>.+?)(?:\.lora)?\.(?:lora_(?P<side>[ABE])(?:\.(?P<piece>\d{1,4}))?|(?P<gate>gate))"
)
# Layers that models of language call so: of several projections, and of one.
_FUSED = ("Wqkv", "c_attn", "in_proj", "qkv", "qkv_proj", "query_key_value")
_LINEAR = (
    "c_fc", "c_proj", "dense", "down_proj", "fc1", "fc2", "fc_in", "fc_out", "gate_proj", "k",
    "k_proj", "key", "key_proj", "lm_head", "o", "o_proj", "out_proj", "q", "q_proj", "query",
    "query_proj", "up_proj", "v", "v_proj", "value", "value_proj", "wi", "wo",
)  # fmt: skip
_BIAS_OF_CONVOLUTION = re.compile(r"(?P<module>.+)\.conv\.bias")


class Loralib(StateDictFormat):
    """Factors of loralib, AdaLoRA, IncreLoRA and SoRA."""

    name = "loralib"
    description = "state dict of the original LoRA code (loralib, AdaLoRA, IncreLoRA, SoRA)"
    telling = rb".+\.lora_A(?:\.\d{1,4})?"

    def sniff(self, path: Path) -> bool:
        """Return whether a name is telling; in safetensors such names are others'."""
        return path.suffix != ".safetensors" and super().sniff(path)

    def adapter(self, state: StateDict) -> Adapter:
        """Return the adapter: a change for each module, and the biases that were trained."""
        from loratools_formats.core.adapter import Replacement
        from loratools_formats.core.change import ModuleChange

        parts: dict[str, dict[str, TensorRef]] = {}
        biases: dict[str, TensorRef] = {}
        for key, tensor in state.tensors.items():
            match = _KEY.fullmatch(key)
            if match is not None:
                side = "gate" if match["gate"] else match["side"].lower()
                name = side if match["piece"] is None else f"{side}.{match['piece']}"
                parts.setdefault(match["module"], {})[name] = tensor
            elif key.endswith(".bias"):
                biases[key] = tensor
            else:
                raise state.unknown(
                    key, "names that end in .lora_A, .lora_B, .lora_E, .gate or .bias"
                )
        modules = {
            name: ModuleChange(_delta(name, found, state.path)) for name, found in parts.items()
        }
        replacements = {
            key: Replacement("bias", _bias_in_model(key, parts), tensor)
            for key, tensor in biases.items()
        }
        return state.adapter(self.name, modules, replacements=replacements)


def _bias_in_model(key: str, modules: Collection[str]) -> str:
    """Return what the base model calls a bias; loralib wraps an adapted convolution in another."""
    match = _BIAS_OF_CONVOLUTION.fullmatch(key)
    return f"{match['module']}.bias" if match and match["module"] in modules else key


def _delta(name: str, parts: dict[str, TensorRef], path: Path) -> KindDelta:
    from loratools_formats.checkpoints.facts import is_embedding
    from loratools_formats.core.change import KindDelta, Layer, Missing
    from loratools_formats.core.kind_shapes import check_shapes
    from loratools_formats.disk.errors import AdapterError

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
    layer = Layer("embedding" if is_embedding(name) else "linear")
    if layer.kind == "linear":
        layer = Layer("linear", transposed_if_square=None)
    if "e" in pieces:
        if not numbered:
            settings["ranknum"] = float(parts["a"].shape[0])
            parts = {f"{part}.0": tensor for part, tensor in parts.items()}
        else:
            settings["ranknum"] = Missing("the number of active ranks of a module")
        return KindDelta("increlora", parts, settings, layer)
    if "gate" in parts:
        check_shapes("gated", parts)
        shape = (parts["b"].shape[0], parts["a"].shape[1])
        return KindDelta("gated", parts, settings, layer, shape)
    return _of_loralib(name, parts, settings, layer, path)


def _of_loralib(
    name: str, parts: dict[str, TensorRef], settings: dict[str, Any], layer: Layer, path: Path
) -> KindDelta:
    from loratools_formats.core.change import KindDelta, Missing
    from loratools_formats.disk.errors import AdapterError

    a, b, leaf = parts["a"].shape, parts["b"].shape, name.rpartition(".")[2]
    if len(a) != 2 or len(b) != 2:
        raise AdapterError(
            "factor is not a matrix", path=path, tensor=name, got=f"{list(a)} and {list(b)}"
        )
    if a[0] % b[1] == 0 and (b[1] < a[0] or leaf in _FUSED):
        settings["groups"] = Missing(
            "a digit for each projection of the fused layer, 1 if it is adapted, such as 101",
            pattern="[01]*1[01]*",
            of_weight=partial(_groups_of, rows=b[0], columns=a[1], enabled=a[0] // b[1]),
        )
        return KindDelta("loralib", parts, settings, layer, (None, a[1]))
    if gcd(a[0], a[1], b[0]) == 1 or layer.kind == "embedding" or leaf in _LINEAR:
        return KindDelta("loralib", parts, settings, layer, (b[0], a[1]))
    settings["kernel"] = Missing(
        "k for a convolution of k by k and one group, 1 for other layers: shapes do not tell them "
        "apart",
        whole=True,
        of_weight=partial(_kernel_of, rows=b[0], columns=a[1]),
    )
    return KindDelta("loralib", parts, settings, layer)


def _groups_of(shape: tuple[int, ...], rows: int, columns: int, enabled: int) -> str | None:
    """Return that all projections of a fused layer are adapted, if its weight's shape says so."""
    return "1" * enabled if sorted(shape) == sorted((rows, columns)) else None


def _kernel_of(shape: tuple[int, ...], rows: int, columns: int) -> str | None:
    """Return the width of a square kernel from the shape of the weight."""
    out, kernel = shape[0], shape[2:]
    if all(side == 1 for side in kernel):
        return "1"
    width = kernel[0]
    fits = (rows, columns) == (out * width, shape[1] * width)
    return str(width) if kernel == (width, width) and fits else None


FORMAT = Loralib()
