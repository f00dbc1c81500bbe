"""Facts about names and layouts, as tables; those about tied embeddings are in `base.tied`.

Source: transformers 5.23, `conversion_mapping.py` (what it renames when it loads and saves), the
modelling files (order of outputs in fused projections), and torch's
`nn.MultiheadAttention`. How model types hold stacked experts is generated
(`checkpoints.expert_classes`). A model type that is not listed has no rule; nothing here is a
default.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from loratools_formats.checkpoints import expert_classes

NEUTRAL = frozenset(
    {"base_model", "model", "module", "transformer", "language_model", "text_model", "backbone"}
)
"""Leading parts of a name that wrappers add and that name no part of a model of their own."""

TOWER = "vision_model"
"""Beside it, `text_model` names the other of two towers and is not neutral."""

BODY_PREFIX = {
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "xlm-roberta-xl": "roberta",
    "data2vec-text": "data2vec_text",
    "deberta-v2": "deberta",
    "clip_vision_model": "vision_model",
    "siglip_vision_model": "vision_model",
    "vit_mae": "vit",
    "vit_msn": "vit",
}
"""The attribute under which a head keeps its body, where that is not the model type itself."""


class Renaming(NamedTuple):
    """A rename between generations of a model class, applied to the names of both sides.

    Attributes:
        pattern: regular expression, searched for.
        replacement: what takes its place.
        types: model types it holds for; None for all.
    """

    pattern: str
    replacement: str
    types: frozenset[str] | None = None


MIXTRAL = frozenset({"mixtral", "minimax", "minimax_m2", "phimoe"})
"""Types whose files have experts in `block_sparse_moe`, with projections w1, w3 and w2."""
_GRANITE = frozenset({"granitemoe", "granitemoeshared", "granitemoehybrid"})
_VIT = frozenset({"vit", "deit", "beit", "dinov2", "ijepa", "vit_mae", "vit_msn", "vivit"})

_STORED_EITHER_WAY = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})
"""Types whose class transposes what checkpoints hold, if it lies the other way round."""

_NOT_IN_TABLE = frozenset({"dots1", "jetmoe", "qwen3_5_moe", "qwen3_omni_moe"})
"""Types of straight experts whose configuration the table does not name or cannot make."""

_WITH_EXPERTS = (
    expert_classes.STRAIGHT
    | expert_classes.TRANSPOSED
    | MIXTRAL
    | _NOT_IN_TABLE
    | _STORED_EITHER_WAY
    | {"llama4", "aria"}
)

RENAMINGS = (
    Renaming(r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
    Renaming(r"\bLayerNorm\.beta$", "LayerNorm.bias"),
    Renaming(r"^(vision_tower|visual)\.vision_model\.", r"\1."),
    Renaming(r"\bblock_sparse_moe\.input_linear\.weight$", "mlp.experts.gate_up_proj", _GRANITE),
    Renaming(r"\bblock_sparse_moe\.output_linear\.weight$", "mlp.experts.down_proj", _GRANITE),
    Renaming(r"\bblock_sparse_moe\.router\.layer\.", "mlp.router.", _GRANITE),
    Renaming(r"\bblock_sparse_moe\.", "mlp.", MIXTRAL | _GRANITE),
    Renaming(r"\bmlp\.gate\.weight$", "mlp.router.weight", frozenset({"phimoe"})),
    Renaming(r"\b(experts\.\d+)\.w1\b", r"\1.gate_proj", _WITH_EXPERTS),
    Renaming(r"\b(experts\.\d+)\.w3\b", r"\1.up_proj", _WITH_EXPERTS),
    Renaming(r"\b(experts\.\d+)\.w2\b", r"\1.down_proj", _WITH_EXPERTS),
    Renaming(r"^embed_out\.", "lm_head.", frozenset({"gpt_neox"})),
    Renaming(r"^h\.", "layers.", frozenset({"gpt_neox"})),  # mlx-lm's name
    Renaming(r"^encoder\.layer\.", "layers.", _VIT),
    Renaming(r"\battention\.attention\.query\b", "attention.q_proj", _VIT),
    Renaming(r"\battention\.attention\.key\b", "attention.k_proj", _VIT),
    Renaming(r"\battention\.attention\.value\b", "attention.v_proj", _VIT),
    Renaming(r"\battention\.output\.dense\b", "attention.o_proj", _VIT),
    Renaming(r"\bintermediate\.dense\b", "mlp.fc1", _VIT),
    Renaming(r"(?<!attention\.)\boutput\.dense\b", "mlp.fc2", _VIT),
)

LINEAR_TYPES = frozenset(
    {
        "bert", "bloom", "codegen", "falcon", "gemma", "gemma2", "gemma3", "gpt_bigcode",
        "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "mixtral", "mpt", "opt", "phi", "phi3",
        "qwen2", "qwen3", "roberta", "starcoder2",
    }
)  # fmt: skip
"""Model types all of whose projections are `nn.Linear`, stored as (out, in)."""

TRANSPOSED_EXPERTS = expert_classes.MARKED | {"aria"}
"""Stacked experts whose class says `is_transposed`: (E, in, out)."""

UNMARKED_TRANSPOSED = (expert_classes.TRANSPOSED - expert_classes.MARKED) | {"llama4"}
"""Stacked experts that are (E, in, out) though their class does not say so."""

STRAIGHT_EXPERTS = (
    expert_classes.STRAIGHT | UNMARKED_TRANSPOSED | MIXTRAL | _GRANITE | _NOT_IN_TABLE
) - _STORED_EITHER_WAY
"""Stacked experts whose class does not, so that PEFT reads them as (E, out, in)."""

HALVED_EXPERTS = (
    STRAIGHT_EXPERTS | _STORED_EITHER_WAY | {"aria", "aria_text"}
) - expert_classes.ALTERNATING
"""Stacked `gate_up_proj` holds all gate outputs, then all up outputs; gpt-oss alternates them."""


Layout = Literal["thirds", "joined", "headwise", "grouped"]
"""Order of the outputs of a fused attention projection: all of q, k and v one after the other, of
equal or unequal size; or by heads, for each its query, key and value, or for each key-value head
its queries, its key and its value."""

QKV_PARTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
)

QKV: dict[str, dict[str, Layout]] = {
    "qkv_proj": {"phi3": "joined", "phi4_multimodal": "joined"},
    "query_key_value": {
        "gpt_neox": "headwise", "gpt_neox_japanese": "headwise", "bloom": "headwise",
        "persimmon": "headwise", "falcon": "grouped",
    },
    "c_attn": {
        "gpt2": "thirds", "imagegpt": "thirds", "decision_transformer": "thirds",
        "openai-gpt": "thirds", "gpt_bigcode": "grouped", "qwen": "thirds",
    },
    "Wqkv": {"mpt": "thirds", "modernbert": "thirds"},
    "W_pack": {"baichuan": "thirds"},
    "wqkv": {"internlm2": "grouped"},
    "qkv": {
        "qwen2_vl": "thirds", "qwen2_5_vl": "thirds", "qwen3_vl": "thirds",
        "qwen3_vl_moe": "thirds", "glm4v": "thirds", "blip-2": "thirds",
    },
    "in_proj_weight": {},
}  # fmt: skip
"""By the fused module's name, the layout in each model type that has it.

`in_proj_weight` is the parameter of `nn.MultiheadAttention`: thirds, in every model."""

MULTI_QUERY_TYPES = frozenset({"falcon", "gpt_bigcode"})
"""Types whose flag `multi_query` says that all heads share one key and one value."""

GLU_PARTS = (("gate_proj", "up_proj"), ("w1", "w3"))
GLU = {
    "gate_up_proj": frozenset(
        {"phi3", "phi4_multimodal", "glm", "glm4", "glm4v", "glm_image", "glm_ocr", "zamba2"}
    ),
}
"""By the fused module's name, the model types in which it is all gate outputs, then all up ones."""

JOINED_BY_NAME = {
    "qkv_proj": QKV_PARTS[0],
    "gate_up_proj": GLU_PARTS[0],
}
"""Fused modules of adapters for bases which keep the parts separate: order of their outputs."""

MIXED: dict[str, dict[str, tuple[str, ...]]] = {
    "linear_attn": {"in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v")},
    "mixer": {"in_proj": ("gate_proj", "x_proj")},
}
"""Projections of linear attention (Qwen3.5) and Mamba (Nemotron) that Tinker adapts in parts: by
their module's name and their own, the parts in the order of outputs."""

TASK_HEADS = frozenset(
    {
        "classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "lm_head",
        "v_head", "regression_head", "logits_proj", "summary", "sequence_summary",
    }
)  # fmt: skip
"""Modules that a task adds to a body, which a checkpoint of the body alone does not have."""
