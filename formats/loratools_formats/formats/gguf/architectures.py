"""Which architectures GGUF adapters can be made for, and what becomes of each of their modules.

llama.cpp keeps some weights in another layout than transformers: rows of q and k in the order
that its rotary embedding wants, fused projections split or sorted by kind, experts stacked. All of
it concerns rows of ΔW = B·A only, hence rows of B. A file made with the wrong layout loads without
complaint and does harm, so what is not in this table is refused. Names of tensors come from the
maps of the `gguf` package, which know names only, and those of all models for each architecture.
Source: the model classes of convert_hf_to_gguf.py, llama.cpp b10605; a test runs them on full
weights and compares names and values with this table, row by row. `data/rows.json` has the rows of
further classes, as `tests/consumers/make_gguf_rows.py` found them by running that converter, and
the reasons for which modules and classes have none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from typing import Any, NamedTuple

from loratools_formats.containers.gguf.ggml_types import package
from loratools_formats.core.expert_names import GATED
from loratools_formats.formats.gguf.layouts import (
    LAYOUTS,
    Rows,
    Sizes,
    halves,
    key,
    query,
    sorted_per_group,
    sorted_per_head,
    split_per_group,
    whole,
)

Layout = Callable[[int, Sizes], list[Rows]]


class Module(NamedTuple):
    """What becomes of one module.

    Attributes:
        tensors: GGUF names of the tensors it becomes, `#` for the number of its block; in the table
            without `blk.#.`, and empty where it is one, which gguf's map names.
        rows: given its number of rows, which of them each tensor takes, in order.
        stacked: whether it is a parameter that holds all experts.
        columns: given its number of inputs, their order in the tensor; None if they stay.
    """

    tensors: tuple[str, ...] = ()
    rows: Layout = whole
    stacked: bool = False
    columns: Layout | None = None

    @property
    def keeps_order(self) -> bool:
        """Whether it becomes one tensor with its rows and columns as they are."""
        return self.rows is whole and self.columns is None

    def numbered(self, layer: str) -> Module:
        """Return it with the number of a layer in the names of its tensors."""
        return self._replace(tensors=tuple(name.replace("#", layer) for name in self.tensors))


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
        given: of a row that was generated, all modules by their paths, `#` for the layer's number.
        reasons: why modules, by such paths, are not in the table.
    """

    name: str
    classes: Mapping[str, str]
    plain: tuple[str, ...] = ()
    layouts: Mapping[str, Module] = field(default_factory=dict)
    stack: str = "model.layers"
    embedding: str = "model.embed_tokens"
    outputs: tuple[str, ...] = ("lm_head",)
    conv1d: bool = field(default=False, kw_only=True)
    given: Mapping[str, Module] | None = field(default=None, kw_only=True)
    reasons: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """All modules by their paths, with `#` and `*` for the numbers of layer and expert.

        Raises:
            MissingDependencyError: the `gguf` package is not installed.
        """
        if self.given is not None:
            return self.given
        gguf = package()
        (code,) = (code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names = gguf.get_tensor_name_map(code, 1)
        found = {self.embedding: Module(("token_embd",))}
        found |= {path: Module(("output",)) for path in self.outputs}
        for path, module in (dict.fromkeys(self.plain, Module()) | dict(self.layouts)).items():
            name = names.get_name(f"{self.stack}.0.{path.replace('.*.', '.')}")
            tensors = module.tensors or (name.removeprefix("blk.0."),)
            tensors = tuple(f"blk.#.{tensor}" for tensor in tensors)
            found[f"{self.stack}.#.{path}"] = module._replace(tensors=tensors)
        return found

    @cached_property
    def _by_tensor(self) -> Mapping[str, tuple[str, int]]:
        found: dict[str, tuple[str, int]] = {}
        for path, module in self.modules.items():
            if "*" not in path:
                for index, tensor in enumerate(module.tensors):
                    found.setdefault(tensor, (path, index))
        return found

    def module(self, path: str) -> tuple[Module, int | None] | None:
        """Find what becomes of a module path.

        Returns:
            The module, with names of whole tensors; and which expert it is, if it is one of
            several. None if the table has no such module, or if modules of all numbers become
            one tensor, of which a part cannot be adapted.
        """
        template, layer, expert = numbered(path)
        module = self.modules.get(template)
        if module is None or is_joined(template, module):
            return None
        return module.numbered(layer), expert

    def has(self, tensor: str) -> bool:
        """Return whether a module becomes this GGUF tensor."""
        return self.origin(tensor) is not None

    def origin(self, tensor: str) -> tuple[str, Module, int] | None:
        """Find the module path that a GGUF tensor comes from.

        Returns:
            The path, the module, and which of its tensors it is. None if the table has none.
        """
        number = re.search(r"\bblk\.(\d{1,6})\.", tensor)
        layer = "" if number is None else str(int(number[1]))
        template = tensor if number is None else re.sub(r"\bblk\.\d+\.", "blk.#.", tensor, count=1)
        found = self._by_tensor.get(template)
        if found is None:
            return None
        path, index = found
        return path.replace("#", layer), self.modules[path].numbered(layer), index


def is_joined(template: str, module: Module) -> bool:
    """Return whether modules of all numbers become one tensor, as `altup_projections` do."""
    return "#" in template and not any("#" in tensor for tensor in module.tensors)


def numbered(path: str) -> tuple[str, str, int | None]:
    """Return a path with `#` for its layer's number and `*` for an expert's, and these numbers.

    >>> numbered("model.layers.12.mlp.experts.3.w1")
    ('model.layers.#.mlp.experts.*.w1', '12', 3)
    """
    parts, layer, expert = path.split("."), "", None
    for index in range(1, len(parts)):
        part = parts[index]
        if not (part.isdecimal() and part.isascii() and len(part) <= 6):
            continue
        if parts[index - 1] == "experts":
            parts[index], expert = "*", int(part)
        elif not layer:
            parts[index], layer = "#", str(int(part))
    return ".".join(parts), layer, expert


def _causal(*names: str) -> dict[str, str]:
    return {f"{name}ForCausalLM": "model." for name in names}


def _below(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for name in names)


_ATTENTION = _below("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA = (*_ATTENTION, *_below("mlp", *GATED))
_ROTARY = {"self_attn.q_proj": Module(rows=query), "self_attn.k_proj": Module(rows=key)}
_MOE = (*_ATTENTION, "mlp.gate", *_below("mlp.experts.*", *GATED))
_EXPERTS = {
    "mlp.experts.gate_up_proj": Module(("ffn_gate_exps", "ffn_up_exps"), halves, stacked=True),
    "mlp.experts.down_proj": Module(stacked=True),
}
_OF_DBRX = {"w1": "ffn_gate_exps", "v1": "ffn_up_exps", "w2": "ffn_down_exps"}
_DBRX = {
    f"ffn.experts.{owner}.{leaf}": Module((tensor,), stacked=owner == "mlp")
    for owner in ("*", "mlp")
    for leaf, tensor in _OF_DBRX.items()
}
"""The matrix of all experts, and one of them; w2 is stored turned."""
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
        "qwen2moe", _causal("Qwen2Moe"), (*_MOE, *_below("mlp.shared_expert", *GATED)), _EXPERTS
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
        {"attention.query_key_value": Module(rows=sorted_per_head)},
        stack="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        outputs=("lm_head", "embed_out"),
    ),
    Architecture(
        "bloom",
        _causal("Bloom"),
        ("self_attention.dense", *_WIDENED),
        {"self_attention.query_key_value": Module(rows=sorted_per_head)},
        stack="transformer.h",
        embedding="transformer.word_embeddings",
    ),
    Architecture(
        "falcon",
        _causal("Falcon"),
        ("self_attention.dense", *_WIDENED),
        {"self_attention.query_key_value": Module(rows=sorted_per_group)},
        stack="transformer.h",
        embedding="transformer.word_embeddings",
    ),
    Architecture(
        "dbrx",
        {"DbrxForCausalLM": "model."},
        (*_below("norm_attn_norm.attn", "Wqkv", "out_proj"), "ffn.router.layer"),
        _DBRX,
        stack="transformer.blocks",
        embedding="transformer.wte",
    ),
    Architecture(
        "internlm2",
        _causal("InternLM2"),
        ("attention.wo", *_below("feed_forward", "w1", "w2", "w3")),
        {"attention.wqkv": Module(("attn_q", "attn_k", "attn_v"), split_per_group)},
        embedding="model.tok_embeddings",
        outputs=("output",),
    ),
)


@cache
def _generated() -> Mapping[str, Any]:
    file = resources.files("loratools_formats.formats.gguf") / "data" / "rows.json"
    values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def _entry(text: str) -> Module:
    """Return the module that an entry of a generated row describes.

    >>> _entry("blk.#.ffn_gate_exps,blk.#.ffn_up_exps halves stacked").stacked
    True
    """
    names, *words = text.split(" ")
    module = Module(tuple(names.split(",")))
    for word in words:
        if word == "stacked":
            module = module._replace(stacked=True)
        elif word.startswith("columns:"):
            module = module._replace(columns=LAYOUTS[word.removeprefix("columns:")])
        else:
            module = module._replace(rows=LAYOUTS[word])
    return module


def _read_rows() -> list[Architecture]:
    """Return the generated rows of classes that the table above does not have."""
    by_hand = {name for entry in _TABLE for name in entry.classes}
    found = []
    for row in _generated()["rows"]:
        classes = {name: prefix for name, prefix in row["classes"].items() if name not in by_hand}
        if not classes:
            continue
        given = {path: _entry(text) for path, text in row["modules"].items()}
        of = {module.tensors[0]: path for path, module in reversed(given.items())}
        found.append(
            Architecture(
                row["architecture"],
                classes,
                embedding=of.get("token_embd", ""),
                outputs=tuple(p for p, m in given.items() if m.tensors == ("output",)),
                given=given,
                reasons=row["refused"],
            )
        )
    return found


ALL = (*_TABLE, *_read_rows())
ARCHITECTURES: dict[str, Architecture] = {entry.name: entry for entry in reversed(ALL)}
BY_CLASS: dict[str, Architecture] = {name: entry for entry in ALL for name in entry.classes}
REFUSED: Mapping[str, str] = {
    name: reason for name, reason in _generated()["refused"].items() if name not in BY_CLASS
}
"""Why classes that llama.cpp's converter has are not in the table."""
