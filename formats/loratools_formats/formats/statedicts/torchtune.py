"""Adapters as torchtune saves them in its own names: `adapter_model.pt`; read only.

The names are torchtune's, and for models whose rotary embedding turns neighbouring rows (Llama,
Mistral, Gemma) the rows of q and k lie in that order, so that the number of heads is needed to
bring them into transformers' order. Qwen and Phi have transformers' order already; nothing in the
file tells which. Alpha is in the `adapter_config.json` beside it, if there is one. torchtune also
writes a PEFT folder, in which the magnitudes of a DoRA keep torchtune's order, and q and k of Qwen
are brought into another; the file read here has neither fault.

Source: `models/convert_weights.py`, `modules/peft/` and `training/checkpointing/` of torchtune
0.6.1. Models of several parts (`decoder.…`, `encoder.…`) are not known here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import Missing, ModuleChange
    from loratools_formats.core.tensors import TensorRef
    from loratools_formats.disk.files import RegularFile

_MAX_CONFIG_BYTES = 1 << 20
_IN_LAYER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_MODULE = rf"layers\.\d{{1,4}}\.(?:{'|'.join(map(re.escape, _IN_LAYER))})|output"
_PARTS = {"lora_a.weight": "a", "lora_b.weight": "b", "magnitude": "magnitude"}
_KEY = re.compile(rf"(?P<module>{_MODULE})\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_CONFIG_KEYS = {"base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules"}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
# By `model_type`: what torchtune's builders of these models use for the rotary embedding.
_ROPE = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2"), "interleaved"),
    **dict.fromkeys(("qwen2", "phi3"), "halves"),
}


class Torchtune(StateDictFormat):
    """torchtune's factors in its own names."""

    name = "torchtune"
    description = "state dict of torchtune's own names (adapter_model.pt)"
    telling = rf"(?:{_MODULE})\.lora_a\.weight".encode()

    def adapter(self, state: StateDict) -> Adapter:
        """Return the adapter, with alpha from the configuration beside it if there is one."""
        parts: dict[str, dict[str, TensorRef]] = {}
        for name, tensor in state.tensors.items():
            key = _KEY.fullmatch(name)
            if key is None:
                raise state.unknown(
                    name, "layers.N.attn.q_proj.lora_a.weight and the like, of one decoder"
                )
            parts.setdefault(key["module"], {})[_PARTS[key["part"]]] = tensor
        ranks = set()
        for module, own in parts.items():
            if not {"a", "b"} <= set(own):
                raise state.lacking(module, own, "lora_a.weight and lora_b.weight")
            state.check_factors({part: own[part] for part in "ab"})
            ranks.add(own["a"].shape[0])
        alpha, beside = _alpha(state.path.parent, ranks)
        modules: dict[str, ModuleChange] = {
            _path_in_model(module): _delta(module, own, alpha) for module, own in parts.items()
        }
        return state.adapter(self.name, modules, beside=beside)


def _path_in_model(module: str) -> str:
    if module == "output":
        return "lm_head"
    layers, number, rest = module.split(".", 2)
    return f"model.{layers}.{number}.{_IN_LAYER[rest]}"


def _delta(module: str, own: dict[str, TensorRef], alpha: float | Missing) -> ModuleChange:
    from loratools_formats.core.change import KindDelta, Missing, ModuleChange

    settings: dict[str, Any] = {"alpha": alpha}
    heads = _HEADS.get(module.rpartition(".")[2])
    if heads is not None:
        settings["rope"] = Missing(
            "interleaved for Llama, Mistral and Gemma, halves for Qwen and Phi",
            choices=("interleaved", "halves"),
            in_base=("model_type",),
            meaning=_ROPE,
        )
        settings[heads] = Missing(
            f"{heads} of the model's config.json",
            whole=True,
            in_base=(heads, "num_attention_heads"),
        )
    shape = (own["b"].shape[0], own["a"].shape[1])
    direction = KindDelta("torchtune", {part: own[part] for part in "ab"}, settings, shape=shape)
    return ModuleChange(direction, own.get("magnitude"))


def _alpha(folder: Path, ranks: set[int]) -> tuple[float | Missing, tuple[RegularFile, ...]]:
    """Return alpha from the configuration beside the file, and what was read for it.

    Raises:
        AdapterError: the configuration is malformed, or of other ranks.
    """
    from loratools_formats.core.change import Missing
    from loratools_formats.disk.errors import AdapterError
    from loratools_formats.disk.files import RegularFile, inside
    from loratools_formats.disk.strict_json import read_object

    if not (folder / ADAPTER_CONFIG).is_file():
        return Missing("lora_alpha of the recipe's configuration"), ()
    file = RegularFile(inside(folder, ADAPTER_CONFIG))
    values = read_object(file, _MAX_CONFIG_BYTES)
    alpha: Any = values.get("lora_alpha")
    rank = values.get("r")
    others = sorted(set(values) - _CONFIG_KEYS)
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or ranks != {rank} or others:
        raise AdapterError(
            "config beside the weights is not theirs",
            path=file.path,
            got=", ".join([f"lora_alpha {alpha}", f"r {rank}", *others]),
            expected=f"lora_alpha and r = {', '.join(map(str, sorted(ranks)))}",
            hint="Move it away, and give alpha with `set=alpha=VALUE`",
        )
    return float(alpha), (file,)


FORMAT = Torchtune()
