"""Which architectures GGUF adapters can be made for, and what becomes of each of their modules.

llama.cpp keeps some weights in another layout than transformers: rows of q and k in the order
that its rotary embedding wants, fused projections split or sorted by kind, experts stacked. All of
it concerns rows of ΔW = B·A only, hence rows of B. A file made with the wrong layout loads without
complaint and does harm, so what is not in this table is refused. Names of tensors come from the
maps of the `gguf` package, which know names only, and those of all models for each architecture.
Source: the model classes of convert_hf_to_gguf.py, llama.cpp b10605; a test runs them on full
weights and compares names and values with this table, row by row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from loratools_formats.containers.gguf.ggml_types import package
from loratools_formats.disk.errors import AdapterError

Rows = list[int]
"""For each row of a GGUF tensor, the row of the model's weight that goes there."""


@dataclass(frozen=True)
class Sizes:
    """What layouts depend on.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key and value heads.
        hidden: width of the model.
        head_width: rows of one head.
        experts: number of experts, 0 if it has none.
        expert_width: width inside an expert.
    """

    heads: int
    kv_heads: int
    hidden: int
    head_width: int
    experts: int = 0
    expert_width: int = 0


def _check_heads(rows: int, heads: int, width: int) -> None:
    """Refuse rows of another model, which would be put into a wrong order without complaint."""
    if rows != heads * width:
        raise AdapterError(
            "module does not fit the base model",
            got=f"{rows} rows",
            expected=f"{heads} heads of {width}",
        )


def _rotary(rows: Rows, heads: int, width: int) -> Rows:
    """Interleave the two halves of each head."""
    _check_heads(len(rows), heads, width)
    if width % 2:
        raise AdapterError("heads of odd width have no halves", got=width)
    half = width // 2
    return [
        rows[h * width + t * half + j] for h in range(heads) for j in range(half) for t in (0, 1)
    ]


def _whole(rows: int, _: Sizes) -> list[Rows]:
    return [list(range(rows))]


def _query(rows: int, sizes: Sizes) -> list[Rows]:
    return [_rotary(list(range(rows)), sizes.heads, sizes.head_width)]


def _key(rows: int, sizes: Sizes) -> list[Rows]:
    return [_rotary(list(range(rows)), sizes.kv_heads, sizes.head_width)]


def _halves(rows: int, _: Sizes) -> list[Rows]:
    if rows % 2:
        raise AdapterError("odd number of rows has no halves", got=rows)
    half = rows // 2
    return [list(range(half)), list(range(half, rows))]


def _grouped(rows: int, groups: int, queries: int, width: int) -> tuple[Rows, Rows, Rows]:
    """Sort rows that come as groups of `queries` query heads, a key and a value head."""
    _check_heads(rows, groups * (queries + 2), width)
    q: Rows = []
    k: Rows = []
    v: Rows = []
    for group in range(groups):
        start = group * (queries + 2) * width
        q += range(start, start + queries * width)
        k += range(start + queries * width, start + (queries + 1) * width)
        v += range(start + (queries + 1) * width, start + (queries + 2) * width)
    return q, k, v


def _per_group(rows: int, sizes: Sizes) -> tuple[Rows, Rows, Rows]:
    return _grouped(rows, sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.head_width)


def _sorted_per_head(rows: int, sizes: Sizes) -> list[Rows]:
    q, k, v = _grouped(rows, sizes.heads, 1, sizes.head_width)
    return [q + k + v]


def _sorted_per_group(rows: int, sizes: Sizes) -> list[Rows]:
    return [[row for part in _per_group(rows, sizes) for row in part]]


def _split_per_group(rows: int, sizes: Sizes) -> list[Rows]:
    q, k, v = _per_group(rows, sizes)
    width = sizes.head_width
    return [_rotary(q, sizes.heads, width), _rotary(k, sizes.kv_heads, width), v]


class Module(NamedTuple):
    """What becomes of one module.

    Attributes:
        tensors: GGUF names of the tensors it becomes, without the block they are in; empty in the
            table where it is one, which gguf's map names.
        rows: given its number of rows, which of them each tensor takes, in order.
        stacked: whether it is a parameter that holds all experts.
    """

    tensors: tuple[str, ...] = ()
    rows: Callable[[int, Sizes], list[Rows]] = _whole
    stacked: bool = False

    @property
    def keeps_order(self) -> bool:
        """Whether it becomes one tensor with its rows as they are."""
        return self.rows is _whole


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        name: value of `general.architecture`.
        classes: transformers classes that become it, and how each begins paths that begin with
            `model.` below.
        plain: modules of a block that become one tensor as they are; `*` is the number of an
            expert. Where several become one tensor, the first is what reading back makes of it.
        layouts: modules of a block that do not.
        stack: path of the list of blocks.
        embedding: path of the input embedding.
        outputs: paths that the output layer has had, today's first; empty if llama.cpp always takes
            the embedding for it.
        conv1d: whether the model's linear layers are transformers' Conv1D, stored (in, out).
    """

    name: str
    classes: Mapping[str, str]
    plain: tuple[str, ...]
    layouts: dict[str, Module] = field(default_factory=dict)
    stack: str = "model.layers"
    embedding: str = "model.embed_tokens"
    outputs: tuple[str, ...] = ("lm_head",)
    conv1d: bool = field(default=False, kw_only=True)

    @cached_property
    def blocks(self) -> Mapping[str, Module]:
        """Modules of a block, named by gguf's map where they become one tensor.

        Raises:
            MissingDependencyError: the `gguf` package is not installed.
        """
        gguf = package()
        (code,) = (code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names = gguf.get_tensor_name_map(code, 1)
        found = {}
        for path, module in (dict.fromkeys(self.plain, Module()) | self.layouts).items():
            name = names.get_name(f"{self.stack}.0.{path.replace('.*.', '.')}")
            found[path] = (
                module
                if module.tensors
                else module._replace(tensors=(name.removeprefix("blk.0."),))
            )
        return found

    def module(self, path: str) -> tuple[Module, str, int | None] | None:
        """Find what becomes of a module path.

        Returns:
            The module; what comes before its tensor names; and which expert it is, if it is one of
            several. None if the table has no such module.
        """
        if path == self.embedding:
            return Module(("token_embd",)), "", None
        if path in self.outputs:
            return Module(("output",)), "", None
        found = re.fullmatch(rf"{re.escape(self.stack)}\.(\d{{1,6}})\.(.+)", path)
        if found is None:
            return None
        block, rest = f"blk.{int(found[1])}.", found[2]
        expert = re.search(r"\.(\d{1,6})\.", rest)
        if expert is not None:
            rest = f"{rest[: expert.start()]}.*.{rest[expert.end() :]}"
        module = self.blocks.get(rest)
        return None if module is None else (module, block, expert and int(expert[1]))

    def origin(self, tensor: str) -> tuple[str, Module, int] | None:
        """Find the module path that a GGUF tensor comes from.

        Returns:
            The path, the module, and which of its tensors it is. None if the table has none.
        """
        if tensor == "token_embd":
            return self.embedding, Module((tensor,)), 0
        if tensor == "output" and self.outputs:
            return self.outputs[0], Module((tensor,)), 0
        found = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)", tensor)
        if found is None:
            return None
        for rest, module in self.blocks.items():
            if found[2] in module.tensors and "*" not in rest:
                path = f"{self.stack}.{int(found[1])}.{rest}"
                return path, module, module.tensors.index(found[2])
        return None


def _causal(*names: str) -> dict[str, str]:
    return {f"{name}ForCausalLM": "model." for name in names}


def _below(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for name in names)


_ATTENTION = _below("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_LLAMA = (*_ATTENTION, *_below("mlp", *_GATED))
_ROTARY = {"self_attn.q_proj": Module(rows=_query), "self_attn.k_proj": Module(rows=_key)}
_MOE = (*_ATTENTION, "mlp.gate", *_below("mlp.experts.*", *_GATED))
_EXPERTS = {
    "mlp.experts.gate_up_proj": Module(("ffn_gate_exps", "ffn_up_exps"), _halves, stacked=True),
    "mlp.experts.down_proj": Module(stacked=True),
}
_OLD_MIXTRAL = _below("block_sparse_moe", "gate", "experts.*.w1", "experts.*.w2", "experts.*.w3")
_WIDENED = _below("mlp", "dense_h_to_4h", "dense_4h_to_h")

_TABLE = (
    Architecture(
        "llama",
        _causal("Llama", "Mistral", "Mixtral"),
        (*_LLAMA, "mlp.gate", *_OLD_MIXTRAL),
        _ROTARY | _EXPERTS,
    ),
    Architecture("smollm3", _causal("SmolLM3"), _LLAMA, _ROTARY),
    Architecture("granite", _causal("Granite"), _LLAMA, _ROTARY),
    Architecture("olmo", _causal("Olmo"), _LLAMA, _ROTARY),
    Architecture("olmo2", _causal("Olmo2"), _LLAMA),
    Architecture("qwen2", _causal("Qwen2"), _LLAMA),
    Architecture(
        "qwen2moe", _causal("Qwen2Moe"), (*_MOE, *_below("mlp.shared_expert", *_GATED)), _EXPERTS
    ),
    Architecture("qwen3", _causal("Qwen3"), _LLAMA),
    Architecture("qwen3moe", _causal("Qwen3Moe"), _MOE, _EXPERTS),
    Architecture("gemma", _causal("Gemma"), _LLAMA, outputs=()),
    Architecture("gemma2", _causal("Gemma2"), _LLAMA, outputs=()),
    Architecture(
        "gemma3",
        {"Gemma3ForCausalLM": "model.", "Gemma3ForConditionalGeneration": "model.language_model."},
        _LLAMA,
    ),
    Architecture("command-r", _causal("Cohere"), _LLAMA, outputs=()),
    Architecture("stablelm", _causal("StableLm"), _LLAMA),
    Architecture(
        "starcoder2",
        _causal("Starcoder2"),
        (*_ATTENTION, *_below("mlp", "c_fc", "c_proj")),
    ),
    Architecture(
        "phi2",
        _causal("Phi"),
        (*_ATTENTION[:3], "self_attn.dense", *_below("mlp", "fc1", "fc2")),
    ),
    Architecture(
        "phi3",
        _causal("Phi3"),
        (*_below("self_attn", "qkv_proj", "o_proj"), *_below("mlp", "gate_up_proj", "down_proj")),
    ),
    Architecture(
        "gpt2",
        {"GPT2LMHeadModel": "model."},
        (*_below("attn", "c_attn", "c_proj"), *_below("mlp", "c_fc", "c_proj")),
        stack="transformer.h",
        embedding="transformer.wte",
        conv1d=True,
    ),
    Architecture(
        "gptneox",
        _causal("GPTNeoX"),
        ("attention.dense", *_WIDENED),
        {"attention.query_key_value": Module(rows=_sorted_per_head)},
        stack="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        outputs=("lm_head", "embed_out"),
    ),
    Architecture(
        "bloom",
        _causal("Bloom"),
        ("self_attention.dense", *_WIDENED),
        {"self_attention.query_key_value": Module(rows=_sorted_per_head)},
        stack="transformer.h",
        embedding="transformer.word_embeddings",
    ),
    Architecture(
        "falcon",
        _causal("Falcon"),
        ("self_attention.dense", *_WIDENED),
        {"self_attention.query_key_value": Module(rows=_sorted_per_group)},
        stack="transformer.h",
        embedding="transformer.word_embeddings",
    ),
    Architecture(
        "internlm2",
        _causal("InternLM2"),
        ("attention.wo", *_below("feed_forward", "w1", "w2", "w3")),
        {"attention.wqkv": Module(("attn_q", "attn_k", "attn_v"), _split_per_group)},
        embedding="model.tok_embeddings",
        outputs=("output",),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {entry.name: entry for entry in _TABLE}
BY_CLASS: dict[str, Architecture] = {name: entry for entry in _TABLE for name in entry.classes}
