"""The adapters that PEFT saves for these tests: one case for each kind and option.

Each is a base of `peft_models` with the arguments of `LoraConfig`. Ranks differ between modules
where a case is not about something else, so that a scale taken from the wrong one shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """An adapter to be made.

    Attributes:
        model: name of the base.
        config: arguments of `LoraConfig`; r = 4 and lora_alpha = 12 by default.
        dtype: torch type of the file's tensors.
        prepare: called with the base before PEFT wraps it, here and when it is loaded.
        save_options: of `save_pretrained`.
        ties: base tensors that are one and the same.
    """

    model: str
    config: Mapping[str, Any]
    dtype: str = "float32"
    prepare: Callable[[Any], None] | None = None
    save_options: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[str, ...] = ()


def _grown(model: Any) -> None:
    model.resize_token_embeddings(51, mean_resizing=False)


def old_experts(model: Any) -> None:
    """Make today's PEFT use the layout that versions before 0.19 used for all experts."""
    model.experts.is_transposed = True


_LINEAR = {"target_modules": ["up", "square", "down"]}
_CONV = {"target_modules": ["wide", "point", "line", "tick", "solid"]}
_GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"]}
_EMBEDDING = {"target_modules": ["embed", "embed_square", "head"]}
_EXPERTS = {
    "target_modules": ["router"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
_ODD = {
    "target_modules": r"lora_proj|weight\.(default|lora_A)|layers\.\d+|layersX1X",
    # The first match decides, in this order; keys are regular expressions anchored at the end.
    "rank_pattern": {"layers.1": 3, "layers.1.": 5, "lora_proj": 6, r"layers\.[23]": 2},
    "alpha_pattern": {
        r"layers\.(1|4)": 2.5,
        "layers.4": 99,
        r"^weight\.default": 7,
        "lora_A": 31,
        "yers.5": 77,
    },
}
_TIES = ("model.embed_tokens.weight", "lm_head.weight")

CASES = {
    "linear": Case("linear", _LINEAR),
    "linear-float-alpha": Case("linear", _LINEAR | {"lora_alpha": 7.3}),
    "rslora": Case(
        "linear",
        _LINEAR | {
            "use_rslora": True, "lora_alpha": 7.5, "rank_pattern": {"up": 6, "sq.*": 3},
            "alpha_pattern": {"square": 2.25},
        },
    ),
    "alpha-negative": Case(
        "linear",
        _LINEAR | {"lora_alpha": -7.5, "alpha_pattern": {"square": 2.25, "down": -4}},
    ),
    "alpha-negative-dora": Case("linear", _LINEAR | {"lora_alpha": -6, "use_dora": True}),
    "alpha-negative-lora-bias": Case(
        "linear",
        {
            "target_modules": ["up", "square"], "lora_bias": True, "use_rslora": True,
            "lora_alpha": -3, "rank_pattern": {"up": 3},
        },
    ),
    "alpha-negative-experts": Case("experts", _EXPERTS | {"lora_alpha": -12}),
    "alpha-negative-conv": Case("conv", _CONV | {"lora_alpha": -2}),
    "patterns": Case("named_oddly", _ODD),
    "lora-bias": Case("linear", {"target_modules": ["up", "square"], "lora_bias": True}),
    "lora-bias-rslora": Case(
        "linear",
        {
            "target_modules": ["up", "square"], "lora_bias": True, "use_rslora": True,
            "rank_pattern": {"up": 3},
        },
    ),
    "lora-bias-conv": Case("conv", _CONV | {"lora_bias": True}),
    "bias-all": Case("linear", {"target_modules": ["up", "down"], "bias": "all"}),
    "bias-lora-only": Case("linear", {"target_modules": ["up", "down"], "bias": "lora_only"}),
    "bias-all-odd-names": Case("named_oddly", {"target_modules": ["lora_proj"], "bias": "all"}),
    "modules-to-save": Case(
        "linear", {"target_modules": ["up", "down"], "modules_to_save": ["norm", "head"]}
    ),
    "modules-to-save-odd-names": Case(
        "named_oddly",
        {"target_modules": ["layersX1X"], "modules_to_save": ["lora_proj"]},
    ),
    "conv1d-layout": Case("gpt2", _GPT2),
    "conv1d-layout-patterns": Case(
        "gpt2",
        _GPT2 | {"rank_pattern": {"attn.c_proj": 3, "c_fc": 6}, "alpha_pattern": {"h.1.*": 5}},
    ),
    "mixed-layouts": Case("mixed", {"target_modules": ["c_fc", "head", "embed"]}),
    "conv": Case("conv", _CONV),
    "conv-patterns": Case("conv", _CONV | {"rank_pattern": {"wide": 5, "tick": 2}}),
    "embedding": Case("embedding", _EMBEDDING),
    "embedding-saved": Case("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding-tied": Case("llama_tied", {"target_modules": ["embed_tokens"]}),
    "embedding-ensure-tying": Case(
        "llama_tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "head-ensure-tying": Case(
        "llama_tied",
        {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    ),
    "save-ensure-tying": Case(
        "llama_tied",
        {
            "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "vocabulary-grown": Case(
        "llama", {"target_modules": ["q_proj"]}, prepare=_grown,
        save_options={"save_embedding_layers": True},
    ),
    "vocabulary-grown-token-rows": Case(
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [50, 3, 48]},
        prepare=_grown,
        save_options={"save_embedding_layers": True},
    ),
    "vocabulary-grown-token-rows-tied": Case(
        "llama_tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [50, 3, 48]},
        prepare=_grown,
        save_options={"save_embedding_layers": True},
    ),
    "vocabulary-grown-modules-to-save": Case(
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        prepare=_grown,
        save_options={"save_embedding_layers": True},
    ),
    "token-rows": Case(
        "llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 40, 5]}
    ),
    "token-rows-of-two": Case(
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [1, 5, 3], "lm_head": [2, 0]},
        },
    ),
    "token-rows-tied": Case(
        "llama_tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
        ties=_TIES,
    ),
    "classifier": Case("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "experts-one": Case(
        "experts", {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    ),
    "experts-two": Case("experts", _EXPERTS),
    "experts-two-ranks": Case(
        "experts",
        _EXPERTS | {
            "r": 5, "rank_pattern": {"router": 2, "experts.gate_up_proj": 4},
            "alpha_pattern": {"gate_up_proj": 1.5}, "use_rslora": True,
        },
    ),
    "experts-transposed": Case("experts_transposed", _EXPERTS),
    "experts-stack-of-one": Case("experts_single", _EXPERTS),
    "experts-mixtral": Case(
        "mixtral",
        {
            "target_modules": ["q_proj", "gate"], "rank_pattern": {"q_proj": 2},
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    # PEFT gives the joined gate_up_proj twice the rank here, and bare names of parameters.
    "experts-all-linear": Case("mixtral", {"target_modules": "all-linear"}),
    "experts-gpt-oss": Case(
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "parameter-2d": Case(
        "linear",
        {
            "target_modules": ["up"], "target_parameters": ["down.weight", "square.weight"],
            "alpha_pattern": {"down.weight": 30},
        },
    ),
    "dora": Case("linear", _LINEAR | {"use_dora": True, "rank_pattern": {"up": 3}}),
    "dora-rslora": Case("linear", _LINEAR | {"use_dora": True, "use_rslora": True}),
    "dora-conv1d-layout": Case("gpt2", _GPT2 | {"use_dora": True}),
    "dora-mixed-layouts": Case("mixed", {"target_modules": ["c_fc", "head"], "use_dora": True}),
    "dora-conv": Case("conv", _CONV | {"use_dora": True}),
    "dora-embedding": Case("embedding", _EMBEDDING | {"use_dora": True}),
    "initial-gaussian": Case("linear", _LINEAR | {"init_lora_weights": "gaussian"}),
    "initial-orthogonal": Case("linear", _LINEAR | {"init_lora_weights": "orthogonal"}),
    "initial-eva": Case("linear", _LINEAR | {"init_lora_weights": "eva", "eva_config": {}}),
    "velora": Case("linear", _LINEAR | {"velora_config": {}}),
    "monteclora": Case("linear", _LINEAR | {"monteclora_config": {}}),
} | {
    f"{kind}-{dtype}": Case(model, config, dtype)
    for dtype in ("bfloat16", "float16", "float64")
    for kind, model, config in (
        ("linear", "linear", _LINEAR | {"rank_pattern": {"up": 3}}),
        ("conv", "conv", _CONV),
        ("embedding", "embedding", _EMBEDDING),
        ("experts", "experts", _EXPERTS),
        ("dora", "linear", _LINEAR | {"use_dora": True}),
        ("lora-bias", "linear", {"target_modules": ["up", "square"], "lora_bias": True}),
    )
}  # fmt: skip

SHARED = frozenset({"embedding-tied", "embedding-ensure-tying", "head-ensure-tying"})
"""Cases where a layer's change goes to a tensor that another layer uses too.

PEFT's forward adds each layer's change to the layer; its merge adds all of them to the tensor.
"""
