"""Names on the way between PEFT and MLX, and from old names of modules to those of the base.

PEFT names modules as the class of transformers does. mlx-lm keeps the language model of a model of
several parts under `language_model`, and a stack of experts for each projection in a module of its
own. Source: `models/` of mlx-lm 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loratools.base.dequantised import dequantised
from loratools.base.placement.flat_experts import experts_in
from loratools.base.placement.names import Names
from loratools.base.tied import find_tie
from loratools.operations.convert import mlx_models
from loratools.operations.in_class_names import in_class_names
from loratools_formats.checkpoints import expert_classes
from loratools_formats.checkpoints.checkpoint import Checkpoint, read_checkpoint
from loratools_formats.checkpoints.facts import model_types
from loratools_formats.containers.gguf.container import is_gguf
from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.flat_experts import FLAT, SINGLE, singles_of
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import MissingFileError, UnsupportedError

NAMED = frozenset({"peft", "mlx"})
"""Formats whose modules have names of a class."""

_BLOCKS = {
    "mlp.switch_mlp": (
        "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_5_moe",
        "qwen3_5_moe_text", "qwen3_next", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe",
        "glm4_moe_lite", "solar_open", "ernie4_5_moe", "exaone_moe", "deepseek_v32",
        "glm_moe_dsa", "mellum", "laguna", "mimo_v2_flash", "mistral4", "kimi_linear",
        "longcat_flash",
    ),
    "block_sparse_moe.switch_mlp": (
        "mixtral", "granitemoe", "granitemoehybrid", "phimoe", "minimax", "minimax_m2",
    ),
    "feed_forward.switch_mlp": ("lfm2_moe", "jamba"),
    "feed_forward.experts": ("llama4", "llama4_text"),
    "mlp.experts": ("gpt_oss", "afmoe", "dots1"),
    "mixer.switch_mlp": ("nemotron_h",),
}  # fmt: skip
_SWITCH = {model: block for block, models in _BLOCKS.items() for model in models}
_STACK = re.compile(
    r"(?P<layer>.+\.\d+)\.(?:[a-z_]+\.)?experts\.(?P<leaf>gate_up_proj|up_proj|down_proj)"
)
_ROUTER = re.compile(r"(?P<layer>.+\.\d+)\.(?:mlp|block_sparse_moe)\.(?:router|gate)(?:\.layer)?")
_ROUTERS = {
    "granitemoe": "block_sparse_moe.router.layer",
    "granitemoehybrid": "block_sparse_moe.router.layer",
    **dict.fromkeys(("mixtral", "phimoe", "minimax", "minimax_m2"), "block_sparse_moe.gate"),
}
"""By model type, what mlx-lm calls the router, where that differs from the class's name."""
_OF_NEMOTRON = {"up_proj": "fc1", "down_proj": "fc2"}
_EXPERTS = re.compile(r"(?:^|\.)(?:switch_mlp|experts)(?:\.|$)")
_SINGLE_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
_BODIES = {
    "gpt2": (("transformer.", "model."),),
    "gptj": (("transformer.", "model."),),
    "gpt_neox": (("gpt_neox.layers.", "model.h."), ("embed_out", "model.embed_out")),
}
"""By model type, how names begin in transformers and in mlx-lm, where they differ."""
_NOT_IN_MLX = {
    **dict.fromkeys(
        (
            "deepseek_v2", "deepseek_v3", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite",
            "laguna", "mimo_v2_flash", "muse_spark", "nemotron_h", "solar_open", "step3p5",
        ),
        re.compile(r".+\.(?:mlp|mixer|moe)\.gate"),
    ),
    "nanochat": re.compile(r".+"),
    "bailing_hybrid": re.compile(r".+"),
    "minimax": re.compile(r".+\.self_attn\.(?:qkv_proj|out_proj|output_gate)"),
    "deepseek_v32": re.compile(r".+\.(?:kv_b_proj|mlp\.gate)"),
    "glm_moe_dsa": re.compile(r".+\.(?:kv_b_proj|mlp\.gate)"),
}  # fmt: skip
"""By model type, the modules that mlx-lm 0.32 divides otherwise, or makes no LoRA layers for."""
_NOT_ALONE_IN_MLX = {
    "llama4_text": re.compile(r".+\.feed_forward\.(?:experts|router|shared_expert)\b.*"),
}
"""By the model type of a whole checkpoint, modules that mlx-lm has in models of several parts."""
_OTHER_BODY = re.compile(r"(?:transformer\.h|gpt_neox\.layers|model\.h)\.|(?:model\.)?embed_out$")
_FUSE_INSTEAD = "Fuse the adapter into its base instead: loratools fuse BASE ADAPTER -o FUSED"
_SEVERAL_PARTS = re.compile(r"^(?:model\.)?(?:language_model|vision_tower|visual|vision_model)\.")


def uses_names(source: str, target: str) -> bool:
    """Return whether names of a class are to be found in a conversion between two formats."""
    return {source, target} <= NAMED


def checkpoint_of(adapter: Adapter, base: Path | None) -> Checkpoint | None:
    """Return a base's checkpoint; None if it is none, for formats that do with a configuration.

    Raises:
        MissingFileError: it has no weights, and an adapter of PEFT or MLX needs their names.
    """
    if base is None or is_gguf(base):
        return None
    try:
        return read_checkpoint(base)
    except MissingFileError:
        if adapter.format in NAMED:
            raise
        return None


def in_target_names(
    adapter: Adapter, target: str, base: Path | None, *, as_stored: bool = False
) -> Adapter:
    """Return an adapter under the names that the target's loader knows for a base.

    Args:
        adapter: of PEFT or MLX, or from GGUF in the model's names.
        target: `peft` or `mlx`.
        base: the base model.
        as_stored: name and divide modules as the base's files do, not as its class.

    Raises:
        UnsupportedError: the names differ between the two, and there is no base to tell them.
    """
    checkpoint = checkpoint_of(adapter, base)
    if checkpoint is not None:
        if target == "mlx":
            _refuse_tied_head(adapter, checkpoint)
        if adapter.format == "mlx":
            adapter = _with_bodies(adapter, checkpoint, to_mlx=False)
        adapter = in_class_names([adapter], checkpoint, as_stored=as_stored)[0]
    elif adapter.format != target:
        _refuse_names(adapter, target)
    return _for_mlx(adapter, checkpoint) if target == "mlx" and checkpoint is not None else adapter


def with_flat_experts(adapter: Adapter, base: Path | None) -> Adapter:
    """Return an adapter read from GGUF with DBRX's experts in the matrices that PEFT adapts.

    Raises:
        UnsupportedError: there is no folder of the base, which tells how many experts there are.
    """
    single = next((name for name in adapter.modules if SINGLE.fullmatch(name)), None)
    if single is None:
        return adapter
    if base is None or is_gguf(base):
        raise UnsupportedError(
            "PEFT adapts DBRX's experts in one matrix, and the model's folder tells its size",
            path=adapter.source,
            tensor=single,
            hint="Give the folder: "
            + command_on(adapter, "convert", "--to peft --base FOLDER", output="converted"),
        )
    return in_class_names([adapter], read_checkpoint(base))[0]


def named_otherwise(adapter: Adapter) -> tuple[str, str] | None:
    """Return a module that PEFT and mlx-lm name differently, and what it is; None without one."""
    for module, change in adapter.modules.items():
        if change.layer.kind == "experts" or _EXPERTS.search(module) is not None:
            return module, "experts"
        if _OTHER_BODY.match(module) is not None:
            return module, "the body"
        if _SEVERAL_PARTS.match(module):
            return module, "the parts of a model"
    return None


def _refuse_names(adapter: Adapter, target: str) -> None:
    found = named_otherwise(adapter)
    if found is not None:
        module, what = found
        raise UnsupportedError(
            f"PEFT and mlx-lm name {what} differently",
            path=adapter.source,
            tensor=module,
            hint="Give the base, which tells the names: "
            + command_on(adapter, "convert", f"--to {target} --base BASE", output="converted"),
        )


def _with_bodies(adapter: Adapter, base: Checkpoint, *, to_mlx: bool) -> Adapter:
    """Return an adapter whose names begin as mlx-lm's do, or as PEFT's, where they differ."""
    pairs = [pair for kind in model_types(base.config) for pair in _BODIES.get(kind, ())]

    def called(name: str) -> str:
        for pair in pairs:
            old, new = pair if to_mlx else pair[::-1]
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    modules = {called(name): change for name, change in adapter.modules.items()}
    return replace(adapter, modules=modules) if pairs else adapter


def _refuse_other_layers(adapter: Adapter, base: Checkpoint) -> None:
    patterns = {k: _NOT_IN_MLX[k] for k in sorted(model_types(base.config) & _NOT_IN_MLX.keys())}
    whole = base.config.get("model_type")
    patterns |= {k: pattern for k, pattern in _NOT_ALONE_IN_MLX.items() if k == whole}
    for kind, pattern in patterns.items():
        for module in adapter.modules:
            if pattern.fullmatch(module):
                raise UnsupportedError(
                    f"mlx-lm has no such layer in its models of type {kind}",
                    path=adapter.source,
                    tensor=module,
                    hint=_FUSE_INSTEAD,
                )


def _unknown_to_mlx(base: Checkpoint) -> str | None:
    """Return the type of a base if mlx-lm has no model of it; None if it has, or none is told."""
    kind = base.config.get("model_type")
    return kind if isinstance(kind, str) and kind not in mlx_models.TYPES else None


def _for_mlx(adapter: Adapter, base: Checkpoint) -> Adapter:
    _refuse_other_layers(adapter, base)
    unknown = _unknown_to_mlx(base)
    if unknown is not None:
        text = f"mlx-lm {mlx_models.RELEASE} has no model of type {unknown}, and cannot load this"
        told = Finding("no-model-in-mlx", "warning", None, text, _FUSE_INSTEAD)
        adapter = replace(adapter, findings=(*adapter.findings, told))
    adapter = _with_bodies(adapter, base, to_mlx=True)
    modules: dict[str, ModuleChange] = {}
    several = isinstance(base.config.get("text_config"), Mapping)
    is_nemotron = "nemotron_h" in model_types(base.config)
    for module, given in adapter.modules.items():
        name, change = _of_nemotron(module, given) if is_nemotron else (module, given)
        for path, made in _apart(name, change, base, adapter):
            called = _prefixed(path) if several else path
            modules[called] = _in_stack_of(called, made) if called != path else made
    return replace(adapter, modules={name: modules[name] for name in sorted(modules)})


def _refuse_tied_head(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse a change of an output layer that is the embedding: mlx-lm has no layer for it.

    Raises:
        UnsupportedError: there is one.
    """
    head = next((name for name in adapter.modules if f".{name}".endswith(".lm_head")), None)
    if head is not None and find_tie(Names(dequantised(base).checkpoint)) is not None:
        raise UnsupportedError(
            "the output layer of this model is its embedding, and mlx-lm has no layer for it",
            path=adapter.source,
            tensor=head,
            hint=_FUSE_INSTEAD,
        )


def _in_stack_of(path: str, change: ModuleChange) -> ModuleChange:
    """Return a change whose stack of experts, if it is one, has the name of its module."""
    if change.layer.kind != "experts":
        return change
    return _named(change, path, change.require_factors().b)


def _of_nemotron(name: str, change: ModuleChange) -> tuple[str, ModuleChange]:
    """Return a module under the name that mlx-lm's Nemotron has, and its files."""
    parameters = tuple(re.sub(r"^model\.", "backbone.", p) for p in change.layer.parameters)
    layer = replace(change.layer, parameters=parameters)
    called = re.sub(r"^model\.", "backbone.", name)
    return called, change.with_direction(replace(change.direction, layer=layer))


def _prefixed(name: str) -> str:
    """Return the name of a module of the language model of several parts.

    >>> _prefixed("model.language_model.layers.0.mlp.up_proj")
    'language_model.model.layers.0.mlp.up_proj'
    """
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return f"language_model.{name}" if name.startswith(("lm_head", "model.layers.")) else name


def _apart(
    name: str, change: ModuleChange, base: Checkpoint, adapter: Adapter
) -> Iterator[tuple[str, ModuleChange]]:
    """Yield the modules of mlx-lm that one of transformers became."""
    if change.layer.kind != "experts":
        if re.search(r"(?:^|\.)(?:vision_tower|visual|vision_model|audio_tower)\.", name):
            raise UnsupportedError(
                "mlx-lm has the language model only", path=adapter.source, tensor=name
            )
        flat = [FLAT.fullmatch(parameter) for parameter in change.layer.parameters]
        if len(flat) == 1 and flat[0] is not None and "dbrx" in model_types(base.config):
            part = change.require_factors()
            experts = experts_in(base.config, part.b.shape[0], flat[0][0])
            for single, factors in singles_of(flat[0][0], part, experts):
                yield single, change.with_direction(factors)
            return
        if _SINGLE_EXPERT.search(name) and "dbrx" not in model_types(base.config):
            raise _without_stack(name, base, adapter)
        if any(not parameter.endswith(".weight") for parameter in change.layer.parameters):
            raise UnsupportedError(
                "mlx-lm has no such parameter: it keeps these experts as linear layers",
                path=adapter.source,
                tensor=change.layer.parameters[0],
                hint=_FUSE_INSTEAD,
            )
        yield _router(name, base), change
        return
    parameter = change.layer.parameters[0]
    match = _STACK.fullmatch(parameter)
    types = sorted(model_types(base.config) & _SWITCH.keys())
    if match is None or not types:
        raise _without_stack(parameter, base, adapter)
    path = f"{match['layer']}.{_SWITCH[types[0]]}"
    b = change.require_factors().b
    if match["leaf"] != "gate_up_proj":
        leaf = match["leaf"] if types[0] != "nemotron_h" else _OF_NEMOTRON[match["leaf"]]
        yield f"{path}.{leaf}", _named(change, f"{path}.{leaf}", b)
        return
    for index, leaf in enumerate(("gate_proj", "up_proj")):
        yield f"{path}.{leaf}", _named(change, f"{path}.{leaf}", _half(b, index, types[0]))


def _without_stack(name: str, base: Checkpoint, adapter: Adapter) -> UnsupportedError:
    """Return why experts have no place in mlx-lm's model of a base."""
    unknown = _unknown_to_mlx(base)
    if unknown is not None:
        return UnsupportedError(
            f"mlx-lm {mlx_models.RELEASE} has no model of this type",
            path=adapter.source,
            tensor=name,
            got=f"model type {unknown}",
            hint=_FUSE_INSTEAD,
        )
    return UnsupportedError(
        "mlx-lm's name for these experts is not known",
        path=adapter.source,
        tensor=name,
        got=f"model type {base.config.get('model_type')}",
        expected=", ".join(sorted(_SWITCH)),
        hint=_FUSE_INSTEAD,
    )


def _router(name: str, base: Checkpoint) -> str:
    """Return a module's name in mlx-lm, which calls some routers as the model's files do."""
    match = _ROUTER.fullmatch(name)
    called = [_ROUTERS[each] for each in sorted(model_types(base.config) & _ROUTERS.keys())]
    return f"{match['layer']}.{called[0]}" if match is not None and called else name


def _half(b: TensorRef, index: int, model_type: str) -> TensorRef:
    experts, out, rank = b.shape

    def read() -> Any:
        values = b.load()
        half = (
            values[:, index::2]
            if model_type in expert_classes.ALTERNATING
            else values[:, index * out // 2 : (index + 1) * out // 2]
        )
        return np.ascontiguousarray(half).tobytes()

    return TensorRef(b.key, b.dtype, (experts, out // 2, rank), read)


def _named(change: ModuleChange, path: str, b: TensorRef) -> ModuleChange:
    part = change.require_factors()
    layer = Layer("experts", parameters=(f"{path}.weight",))
    return change.with_direction(replace(part, b=b, layer=layer))
