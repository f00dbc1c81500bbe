"""What a checkpoint says of its quantisation, in its configuration and by its tensors' names.

Tensors decide, since configurations leave quantisation out or describe it in another file. Sources:
compressed-tensors (`transform_config`), transformers (`quantization_config`, also in the section of
the language model), and the names that each format gives the parts of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import TEXT_SECTIONS
from loratools_formats.disk.errors import UnsupportedError
from loratools_formats.disk.strict_json import read_object

_KEYS = ("quantization_config", "compression_config")

_BESIDE_WEIGHT = (
    "_scale_inv", "_scale", "_scale_2", "_scales", "_blocks", "_packed", "_global_scale",
    "_zero_point", "_shape", "_g_idx", "_qdata", "_per_tensor_scale", ".absmax", ".quant_map",
)  # fmt: skip
"""What formats append to the name of a weight, to name a part of it or of what stands for it."""

_BESIDE_MODULE = (
    "scales", "biases", "scale", "qscale_weight", "qweight", "qzeros", "g_idx", "pre_quant_scale",
    "SCB", "weight_packed", "weight_quantizer", "svdquant_lora_a", "svdquant_lora_b", "W_q",
)  # fmt: skip
"""What formats store in a module beside `weight`, or in place of it."""

_FORMATS = {
    "_blocks": "MXFP4 as in gpt-oss",
    ".scale_packed": "marlin-24 of compressed-tensors",
    ".bitmask": "sparse weights of compressed-tensors",
    ".weight_packed": "packed numbers of compressed-tensors",
    ".pre_quant_scale": "ModelOpt, with scales of inputs",
    ".weight_scale_2": "NVFP4 of ModelOpt",
    ".svdquant_lora_a": "SVDQuant of ModelOpt",
    ".svdquant_lora_b": "SVDQuant of ModelOpt",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "LLM.int8 of bitsandbytes",
    ".W_q": "HQQ",
    "_weight_qdata": "torchao",
    ".trellis": "EXL3",
    ".q_weight": "EXL2",
    ".q_perm": "EXL2",
    ".codebooks": "AQLM",
    ".centroids": "VPTQ",
    ".centroids.weight": "VPTQ",
    ".weight._data": "quanto",
    ".weight_bitmap": "a sparse format",
    ".biases": "MLX",
    ".qbiases": "MLX as transformers' metal saves it",
}
"""By the end of a tensor's name, the format that has tensors named so."""

_SHARED_WITH_PLAIN = (
    "_blocks", ".biases", ".bitmask", ".codebooks", ".centroids.weight", ".q_weight",
)  # fmt: skip
"""Ends of names that plain tensors have, too: they count only beside other parts of a weight."""

_BESIDE_CONFIG = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""Files that say how weights are quantised where config.json does not, and what they are of."""

_ROTATIONS = ("rotat", "hadamard", "spinquant", "quarot")
"""What names of entries say that weights are rotated, as AutoRound and FP-Quant write them."""

_ABOUT = "meta"
"""Where gptqmodel says how it has quantised a model."""

_MAX_JSON_BYTES = 16 << 20

QUANTISATION_FILES = (*_BESIDE_CONFIG, "quantization_config.json")
"""Files beside config.json that say how weights are quantised."""


def quantization_of(config: Mapping[str, Any]) -> Any:
    """Return what a configuration, or its section about the language model, says; None if nothing.

    >>> quantization_of({"text_config": {"quantization_config": {"quant_method": "fp8"}}})
    {'quant_method': 'fp8'}
    """
    for key in _KEYS:
        if config.get(key) is not None:
            return config[key]
    sections = (config.get(name) for name in TEXT_SECTIONS)
    found = (quantization_of(section) for section in sections if isinstance(section, Mapping))
    return next((each for each in found if each is not None), None)


def stated_of(base: Checkpoint) -> Mapping[str, Any]:
    """Return what a checkpoint's configuration, or a file beside it, says of its quantisation.

    Returns:
        A mapping with `quant_method` where one is said; empty if nothing is.

    Raises:
        AdapterError: a file beside the configuration is no JSON object.
    """
    found = quantization_of(base.config)
    if isinstance(found, Mapping):
        return found
    if found is not None:
        return {"quant_method": found}
    for name, method in _BESIDE_CONFIG.items():
        if base.is_folder and (base.path / name).exists():
            values = read_object(base.path / name, _MAX_JSON_BYTES, name="file", max_depth=None)
            inner = values.get("quantization")
            return {"quant_method": method, **(inner if isinstance(inner, Mapping) else values)}
    return {}


def refuse_rotated(stated: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are rotated: what it stores is not what acts on inputs.

    Args:
        stated: what the checkpoint says of its quantisation.

    Raises:
        UnsupportedError: `transform_config` says so.
    """
    if stated.get("transform_config"):
        raise UnsupportedError(
            "the base's weights are rotated (transform_config, as SpinQuant and QuIP do), so that "
            "a change cannot be added to them",
            got=", ".join(_applied(stated["transform_config"])),
            hint="Start from the original checkpoint",
        )
    for name, value in (*stated.items(), *_entries(stated.get(_ABOUT))):
        if value and any(word in str(name).lower() for word in _ROTATIONS):
            raise UnsupportedError(
                "the base's weights are rotated, so that a change cannot be added to them",
                got=name,
                hint="Start from the original checkpoint",
            )


def _entries(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _applied(transform: Any) -> list[str]:
    groups = transform.get("config_groups") if isinstance(transform, Mapping) else None
    return list(groups) if isinstance(groups, Mapping) and groups else ["transform_config"]


def format_found(keys: Iterable[str]) -> str | None:
    """Return the quantised format that the names of tensors show; None if none does."""
    seen = {end for key in keys for end in _FORMATS if key.endswith(end)}
    return next((name for end, name in _FORMATS.items() if end in seen), None)


def parts_beside(key: str, tensors: Mapping[str, Any]) -> list[str]:
    """Return the tensors that show that a weight is stored quantised; empty if it is plain."""
    module = key.removesuffix(".weight")
    names = [f"{key}{end}" for end in _BESIDE_WEIGHT]
    if module != key:
        names += [f"{module}.{leaf}" for leaf in _BESIDE_MODULE]
    return [name for name in names if name in tensors]


def is_lone_part(key: str, *, is_integer: bool) -> bool:
    """Return whether a tensor's name is that of a part of a quantised weight.

    In a checkpoint that is quantised no other tensor is named so; plain ones may have such tensors.

    Args:
        key: name of the tensor.
        is_integer: whether it holds integers.
    """
    leaf = key.rpartition(".")[2]
    named = leaf.removeprefix("_").removeprefix("weight") in _BESIDE_WEIGHT and "weight" in leaf
    return named or (is_integer and leaf.endswith(("_blocks", "_scales")))


def is_part(key: str) -> bool:
    """Return whether a tensor's name alone shows that it is a part of a quantised weight."""
    return any(key.endswith(end) for end in _FORMATS if end not in _SHARED_WITH_PLAIN)
