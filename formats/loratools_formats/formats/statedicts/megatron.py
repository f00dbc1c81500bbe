"""State dicts of adapters in Megatron's names: Megatron-Bridge, NeMo 2 and NeMo 1; read only.

Projections that Megatron fuses share one pair of factors; they become the projections that
transformers' models of Llama's layout have, which needs the number of heads and the width of the
MLP. Alpha is in the configuration of the run, not in the weights. The file that is read holds the
gathered tensors; distributed checkpoints, folders of shards, are recognised and refused.

Experts have a pair of factors each, stacked, or share one side of it; they become the experts that
Qwen's and DeepSeek's models have, one by one. Where they share both sides the file does not tell
how many there are, which is refused.

Adapters of shared experts, routers and state-space layers, and NeMo's tied variants, are not known
here, nor is attention with an output gate, whose rows are others; a base shows that they do not
fit.
Source: `peft/` and `models/conversion/peft_bridge.py` of Megatron-Bridge 067f987df;
`adapter_modules` of NeMo 1 for the older names.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.formats.statedicts.statedict import StateDict, StateDictFormat

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import ModuleChange
    from loratools_formats.core.tensors import TensorRef
    from loratools_formats.disk.first_bytes import Kind

_QKV = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_FC1 = {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}
_OF_EXPERTS = "mlp.experts."
_EXPERTS = {"gate": "mlp.experts.{}.gate_proj", "up": "mlp.experts.{}.up_proj"}
_NEMO_1 = "adapter_layer."
# What an adapter is called within a layer, and the projections that it is for.
_ADAPTERS: dict[str, dict[str, str]] = {
    "self_attention.linear_qkv.adapter": _QKV,
    "self_attention.linear_proj.adapter": {"whole": "self_attn.o_proj"},
    "mlp.linear_fc1.adapter": _FC1,
    "mlp.linear_fc2.adapter": {"whole": "mlp.down_proj"},
    f"{_OF_EXPERTS}linear_fc1.adapter": _EXPERTS,
    f"{_OF_EXPERTS}linear_fc2.adapter": {"whole": "mlp.experts.{}.down_proj"},
    **{f"{_OF_EXPERTS}linear_fc1.adapter.adapter_{k}": {"whole": v} for k, v in _EXPERTS.items()},
    f"self_attention.{_NEMO_1}lora_kqv_adapter": _QKV,
    f"self_attention.{_NEMO_1}lora_dense_attention_adapter": {"whole": "self_attn.o_proj"},
    f"mlp.{_NEMO_1}lora_hto4h_adapter": _FC1,
    f"mlp.{_NEMO_1}lora_4htoh_adapter": {"whole": "mlp.down_proj"},
    **{f"self_attention.linear_qkv.adapter.adapter_{k}": {"whole": v} for k, v in _QKV.items()},
    **{f"mlp.linear_fc1.adapter.adapter_{k}": {"whole": v} for k, v in _FC1.items()},
    **{
        f"self_attention.{_NEMO_1}lora_unfused_kqv_adapter.{k}_adapter": {"whole": v}
        for k, v in _QKV.items()
    },
    **{
        f"mlp.{_NEMO_1}lora_unfused_hto4h_adapter.{k}_adapter": {"whole": v}
        for k, v in _FC1.items()
    },
}
_PARTS = {"linear_in.weight": "a", "linear_out.weight": "b", "weight_magnitude": "magnitude"}
_KEY = re.compile(
    r"(?:module\.|model\.)*(?:language_model\.encoder\.|decoder\.)?layers\.(?P<layer>\d{1,4})\."
    rf"(?P<adapter>{'|'.join(map(re.escape, _ADAPTERS))})\."
    rf"(?P<part>{'|'.join(map(re.escape, _PARTS))})"
)


class Megatron(StateDictFormat):
    """State dicts in Megatron's names."""

    name = "megatron"
    description = "state dict in Megatron's names (Megatron-Bridge, NeMo)"
    telling = _KEY.pattern.encode()

    def sniff(self, path: Path) -> bool:
        """Return whether a name is telling, or a folder is a checkpoint that `read` refuses."""
        return _distributed(path) is not None or super().sniff(path)

    def read(self, path: Path) -> Adapter:
        """Read a file."""
        from loratools_formats.disk.errors import UnsupportedError

        kind = _distributed(path)
        if kind is not None:
            raise UnsupportedError(kind.what, path=path, hint=kind.hint)
        return super().read(path)

    def adapter(self, state: StateDict) -> Adapter:
        """Return the adapter, whose alpha is missing."""
        return adapter_of(state, self.name)


def _distributed(path: Path) -> Kind | None:
    """Return what a checkpoint is that torch saved in shards of many ranks; None for others."""
    if not (path / ".metadata").is_file():
        return None
    from loratools_formats.contract.path_kinds import distributed

    return distributed(path)


def adapter_of(state: StateDict, format_name: str, alpha: float | None = None) -> Adapter:
    """Return the adapter in a state dict of Megatron's names.

    Args:
        state: the tensors.
        format_name: of the format that they were found in.
        alpha: of every adapter; None if it is not known.

    Raises:
        AdapterError: an unknown name, or factors that do not belong together.
    """
    from loratools_formats.disk.errors import AdapterError

    parts: dict[tuple[int, str], dict[str, TensorRef]] = {}
    for name, tensor in state.tensors.items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise state.unknown(
                name,
                "decoder.layers.N.self_attention.linear_qkv.adapter.linear_in.weight and the like",
            )
        own = parts.setdefault((int(key["layer"]), key["adapter"]), {})
        if _PARTS[key["part"]] in own:
            raise state.unknown(name, "one tensor of that name")
        own[_PARTS[key["part"]]] = tensor
    modules: dict[str, ModuleChange] = {}
    shared: dict[str, TensorRef] = {}
    for (layer, adapter), own in parts.items():
        found = _deltas(state, layer, adapter, own)
        twice = sorted(set(found) & set(modules))
        if twice:
            raise AdapterError(
                "two adapters are for one projection", path=state.path, tensor=twice[0]
            )
        modules |= found
        if len(found) > 1:
            shared |= {tensor.key: tensor for tensor in own.values()}
    if alpha is not None:
        modules = {
            name: change.with_direction(replace(other, settings={**other.settings, "alpha": alpha}))
            for name, change in modules.items()
            if (other := change.kind_delta) is not None
        }
    return state.adapter(format_name, modules, shared=shared)


def _deltas(
    state: StateDict, layer: int, adapter: str, own: dict[str, TensorRef]
) -> dict[str, ModuleChange]:
    """Return the changes that one adapter makes, by the projection's path in the model."""
    module = f"layers.{layer}.{adapter}"
    if not {"a", "b"} <= set(own):
        raise state.lacking(module, own, "linear_in.weight and linear_out.weight")
    of_experts: dict[int | None, dict[str, TensorRef]] = {None: own}
    if adapter.startswith(_OF_EXPERTS):
        of_experts = _of_experts(state, module, own)
    else:
        state.check_factors({part: own[part] for part in "ab"})
    projections = _ADAPTERS[adapter]
    is_shared = len(of_experts) * len(projections) > 1
    return {
        f"model.layers.{layer}.{target.format(expert)}": _delta(
            projection, factors, is_shared=is_shared, is_expert=expert is not None
        )
        for expert, factors in of_experts.items()
        for projection, target in projections.items()
    }


def _of_experts(
    state: StateDict, module: str, own: dict[str, TensorRef]
) -> dict[int | None, dict[str, TensorRef]]:
    """Return the factors of every expert, each a matrix of the stored stacks."""
    stacked = {side: ref for side, ref in own.items() if len(ref.shape) == 3}
    counts = {ref.shape[0] for ref in stacked.values()}
    if set(own) != {"a", "b"} or len(counts) != 1:
        raise state.lacking(
            module, own, "linear_in.weight and linear_out.weight, one or both stacked by experts"
        )
    for side, ref in own.items():
        state.check_factors({side: ref}, 3 if side in stacked else 2)
    return {
        expert: {side: ref.matrix(expert) if side in stacked else ref for side, ref in own.items()}
        for expert in range(counts.pop())
    }


def _delta(
    projection: str, own: dict[str, TensorRef], *, is_shared: bool, is_expert: bool
) -> ModuleChange:
    from loratools_formats.core.change import KindDelta, Missing, ModuleChange

    settings: dict[str, Any] = {
        "alpha": Missing("alpha of the run's configuration; the rank for NeMo before it had one"),
        "projection": projection,
    }
    if projection in _QKV:
        settings |= {
            name: Missing(
                f"{name} of the model's config.json",
                whole=True,
                in_base=(name, "num_attention_heads"),
            )
            for name in ("num_attention_heads", "num_key_value_heads")
        }
    if projection in _FC1:
        name = "moe_intermediate_size" if is_expert else "intermediate_size"
        settings[name] = Missing(
            f"{name} of the model's config.json",
            whole=True,
            in_base=(name, "intermediate_size"),
        )
    if is_shared:
        out = own["b"].shape[0] if projection == "whole" else None
        other = KindDelta("megatron", {}, settings, shape=(out, own["a"].shape[1]), shared=own)
    else:
        shape = (own["b"].shape[0], own["a"].shape[1])
        other = KindDelta("megatron", {part: own[part] for part in "ab"}, settings, shape=shape)
    return ModuleChange(other, own.get("magnitude"))


FORMAT = Megatron()
