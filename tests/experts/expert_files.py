"""One change of experts, in every layout that a program writes, by the definitions of the layouts.

Each function takes `Change` and returns (tensors, configuration), so that the true ΔW of every
layout is known. Sources: PEFT's `ParamWrapper`; unsloth_zoo 2026.9.6; Megatron-Bridge's
`_pack_target_parameter_adapter_weights` and `stack_3d_moe`; SGLang's and vLLM's loaders; Tinker's
cookbook; mlx-lm's `LoRASwitchLinear`.
"""

import json
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import save_file

OWNER = "model.layers.0.mlp.experts"
PREFIX = f"base_model.model.{OWNER}"
FULL = [f"{OWNER}.down_proj", f"{OWNER}.gate_up_proj"]
AUTO = {
    "base_model_class": "Qwen3MoeForCausalLM",
    "parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "unsloth_fixed": True,
}


@dataclass
class Change:
    """Factors (E, r, in) and (E, out, r) of each projection; gate and up share A if `same_a`."""

    experts: int = 3
    rank: int = 2
    width: int = 8
    inner: int = 6
    same_a: bool = True
    shared_outer: bool = False
    alpha: float = 4.0
    rslora: bool = False
    seed: int = 0
    dtype: str = "float32"
    a: dict = field(init=False)
    b: dict = field(init=False)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)

        def draw(*shape):
            return rng.normal(size=shape).astype(self.dtype)

        e, r, h, i = self.experts, self.rank, self.width, self.inner
        outer = 1 if self.shared_outer else e
        self.a = {"gate": draw(outer, r, h), "down": draw(e, r, i)}
        self.a["up"] = self.a["gate"] if self.same_a or self.shared_outer else draw(e, r, h)
        self.b = {"gate": draw(e, i, r), "up": draw(e, i, r), "down": draw(outer, h, r)}

    @property
    def scale(self):
        return self.alpha / (np.sqrt(self.rank) if self.rslora else self.rank)

    def whole(self, name):
        """Return a projection's factors, once for each expert."""
        return tuple(
            np.broadcast_to(x, (self.experts, *x.shape[1:])) for x in (self.a[name], self.b[name])
        )

    def deltas(self):
        """Return ΔW (out, in) in float64 by (projection, expert)."""
        found = {}
        for name in ("gate", "up", "down"):
            a, b = (x.astype(np.float64) for x in self.whole(name))
            found |= {(name, e): self.scale * b[e] @ a[e] for e in range(self.experts)}
        return found

    @property
    def config(self):
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank,
            "lora_alpha": self.alpha, "bias": "none", "use_rslora": self.rslora,
            "base_model_name_or_path": "made/up", "target_modules": [],
        }  # fmt: skip


def joined(change):
    """Return (A, B) of gate_up and of down, stacks with gate's outputs first."""
    assert change.same_a or change.shared_outer
    (a, gate), (_, up), down = (change.whole(n) for n in ("gate", "up", "down"))
    return {"gate_up_proj": (a, np.concatenate([gate, up], 1)), "down_proj": down}


def flat(a, b, *, swapped, grouped):
    if swapped:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    columns = b.transpose(1, 0, 2) if grouped else b.transpose(1, 2, 0)
    return a.reshape(-1, a.shape[2]), columns.reshape(b.shape[1], -1)


def pair(path, a, b):
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def stacked(change, *, swapped=False, grouped=False, **more):
    both = joined(change)
    tensors = {
        **pair(f"{PREFIX}.base_layer", *flat(*both["gate_up_proj"], swapped=swapped,
                                             grouped=grouped)),
        **pair(PREFIX, *flat(*both["down_proj"], swapped=swapped, grouped=grouped)),
    }  # fmt: skip
    targets = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    return tensors, {**change.config, **targets, **more}


def marker(order, experts):
    own = {leaf: {"lora_B_layout": order, "num_experts": experts} for leaf in joined_leaves}
    return {"lora_A_layout": "grouped_by_expert", "lora_B_layout": order, "parameters": own}


joined_leaves = ("gate_up_proj", "down_proj")


def unsloth(change, order, **more):
    return stacked(
        change,
        grouped=order == "grouped_by_expert",
        auto_mapping=AUTO,
        lora_B_layout=order,
        unsloth_fused_expert_lora=marker(order, change.experts),
        **more,
    )


def each(change, names=(("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))):
    tensors = {}
    for name, leaf in names:
        a, b = change.whole(name)
        for e in range(change.experts):
            tensors |= pair(f"{PREFIX}.{e}.{leaf}", a[e], b[e])
    return tensors, {**change.config, "target_modules": [leaf for _, leaf in names]}


def each_joined(change):
    tensors = {}
    for leaf, (a, b) in joined(change).items():
        for e in range(change.experts):
            tensors |= pair(f"{PREFIX}.{e}.{leaf}", a[e], b[e])
    return tensors, {**change.config, "target_modules": list(joined_leaves)}


def three_d(change):
    tensors = {}
    for leaf, (a, b) in joined(change).items():
        tensors |= pair(f"{PREFIX}.{leaf}", a, b)
    return tensors, {**change.config, "target_modules": list(joined_leaves)}


def three_d_apart(change):
    tensors = {}
    for name in ("gate", "up", "down"):
        tensors |= pair(f"{PREFIX}.{name}_proj", change.a[name], change.b[name])
    return tensors, {**change.config, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


def flat_3d(change):
    both = joined(change)
    tensors = {}
    for path, leaf in ((f"{PREFIX}.base_layer", "gate_up_proj"), (PREFIX, "down_proj")):
        a, b = both[leaf]
        tensors |= pair(path, a, b.transpose(1, 2, 0))
    return tensors, {**change.config, "target_modules": ["experts"]}


def tinker(change):
    tensors = {}
    for name, leaf in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        tensors |= pair(f"{PREFIX}.{leaf}", change.a[name], change.b[name])
    config = {"peft_type": "LORA", "r": change.rank, "lora_alpha": change.alpha}
    return tensors, {**config, "target_modules": "all-linear", "use_rslora": change.rslora}


def mixed(change):
    """Return Megatron-Bridge's shared-outer export: the shared factor stacked, the other not."""
    tensors = {}
    for name, shared in (("gate", "A"), ("up", "A"), ("down", "B")):
        whole = change.a[name] if shared == "A" else change.b[name]
        tensors[f"{PREFIX}.{name}_proj.lora_{shared}.weight"] = whole
        other, values = ("B", change.b[name]) if shared == "A" else ("A", change.a[name])
        for e in range(change.experts):
            tensors[f"{PREFIX}.{e}.{name}_proj.lora_{other}.weight"] = values[e]
    return tensors, {**change.config, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


LAYOUTS = {
    "PEFT 0.21": lambda c: stacked(c, peft_version="0.21.2"),
    "PEFT 0.18": lambda c: stacked(c, swapped=True, peft_version="0.18.1"),
    "PEFT 0.19.0": lambda c: stacked(c, swapped=True, peft_version="0.19.0"),
    "PEFT 0.21, saved again": lambda c: stacked(c, peft_version="0.18.1"),
    "Automodel": lambda c: stacked(c, swapped=True),
    "Megatron-Bridge": lambda c: stacked(c, swapped=True, grouped=True, auto_mapping=None,
                                         inference_mode=True, target_parameters=FULL),
    "Unsloth, unmarked": lambda c: stacked(c, grouped=True, auto_mapping=AUTO),
    "Unsloth, unmarked, PEFT 0.18": lambda c: stacked(c, swapped=True, grouped=True,
                                                      auto_mapping=AUTO, peft_version="0.18.1"),
    "Unsloth, grouped": lambda c: unsloth(c, "grouped_by_expert", peft_version="0.21.2"),
    "Unsloth, rank by rank": lambda c: unsloth(c, "rank_major", peft_version="0.21.2"),
    "one by one": each,
    "one by one, w1 w3 w2": lambda c: each(c, (("gate", "w1"), ("up", "w3"), ("down", "w2"))),
    "one by one, gate_up": each_joined,
    "3-D": three_d,
    "3-D, apart": three_d_apart,
    "3-D pairs": flat_3d,
    "Tinker": tinker,
}  # fmt: skip
"""Layouts of any change whose gate and up share A."""
APART = ("one by one", "one by one, w1 w3 w2", "3-D, apart", "Tinker")
"""Those that hold different A of gate and up."""
SHARED = {"Tinker": tinker, "3-D, apart": three_d_apart, "mixed": mixed}
"""Those that hold a factor of all experts once."""


def save(folder, made):
    """Write tensors and configuration as a PEFT folder; returns the folder."""
    tensors, config = made
    folder.mkdir(parents=True)
    stored = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def base(folder, change, *, stacks, model_type="qwen3_moe", more=None, **config):
    """Write a base of one layer, experts one by one or stacked; returns the folder."""
    rng = np.random.default_rng(99)
    h, i, e = change.width, change.inner, change.experts

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weights = {"gate": draw(e, i, h), "up": draw(e, i, h), "down": draw(e, h, i)}
    if stacks:
        tensors = {
            f"{OWNER}.gate_up_proj": np.concatenate([weights["gate"], weights["up"]], 1),
            f"{OWNER}.down_proj": weights["down"],
        }
    else:
        tensors = {
            f"{OWNER}.{x}.{name}_proj.weight": w[x] for name, w in weights.items() for x in range(e)
        }
    tensors |= {"model.embed_tokens.weight": draw(16, h), "lm_head.weight": draw(16, h)}
    tensors |= {"model.norm.weight": draw(h), "model.layers.0.mlp.gate.weight": draw(e, h)}
    tensors |= {f"model.layers.0.self_attn.{x}_proj.weight": draw(h, h) for x in "qkvo"}
    tensors |= more or {}
    values = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": model_type, "hidden_size": h,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": h // 2, "vocab_size": 16, "intermediate_size": 4 * h,
        "moe_intermediate_size": i, "num_experts": e,
        "num_experts_per_tok": 1, "tie_word_embeddings": False, "max_position_embeddings": 64,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, **config,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def read_deltas(adapter):
    """Return ΔW (out, in) in float64 by (projection, expert), from an adapter's modules alone."""
    found = {}
    for path, change in adapter.modules.items():
        part = change.require_factors()
        if ".experts" not in path:
            continue
        a, b = part.a.load(np.float64), part.b.load(np.float64)
        if part.layer.kind != "experts":
            *_, index, leaf = path.split(".")
            names = {"w1": "gate", "w3": "up", "w2": "down"}
            name = names.get(leaf, leaf.removesuffix("_proj"))
            of = {(name, int(index)): part.scale * b @ a}
        else:
            delta = part.scale * b @ a
            if part.layer.swapped:
                delta = delta.transpose(0, 2, 1)
            (parameter,) = part.layer.parameters
            name = parameter.rpartition(".")[2].removesuffix("_proj")
            of = {(name, e): one for e, one in enumerate(delta)}
        for (name, e), delta in of.items():
            if name == "gate_up":
                half = len(delta) // 2
                found |= {("gate", e): delta[:half], ("up", e): delta[half:]}
            else:
                found[name, e] = delta
    return found


def fused_deltas(base_folder, fused_folder):
    """Return what fusing changed, ΔW (out, in) by (projection, expert)."""
    from safetensors.numpy import load_file

    old = load_file(base_folder / "model.safetensors")
    new = load_file(fused_folder / "model.safetensors")
    found = {}
    for key, values in old.items():
        if ".experts." not in key:
            continue
        delta = new[key].astype(np.float64) - values.astype(np.float64)
        *_, where, leaf = key.removesuffix(".weight").split(".")
        if where.isdigit():
            found[leaf.removesuffix("_proj"), int(where)] = delta
            continue
        for e, one in enumerate(delta):
            if leaf == "gate_up_proj":
                half = len(one) // 2
                found |= {("gate", e): one[:half], ("up", e): one[half:]}
            else:
                found[leaf.removesuffix("_proj"), e] = one
    return found


def largest_error(found, wanted):
    """Return the largest absolute difference, relative to the largest value."""
    assert found.keys() == wanted.keys()
    size = max(np.abs(each).max() for each in wanted.values())
    return max(np.abs(found[key] - wanted[key]).max() for key in wanted) / size
