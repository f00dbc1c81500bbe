"""What a checkpoint says of its quantisation, in its configuration and by its tensors' names.

Tensors decide, since configurations leave quantisation out or describe it in another file. Sources:
compressed-tensors (`transform_config`), transformers (`quantization_config`, also in the section of
the language model), and the names that each format gives the parts of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratools_formats.checkpoints.facts import TEXT_SECTIONS
from loratools_formats.disk.errors import UnsupportedError

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
    ".weight_packed": "packed integers or NVFP4 of compressed-tensors",
    ".weight_scale_2": "NVFP4 of ModelOpt",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "LLM.int8 of bitsandbytes",
    ".W_q": "HQQ",
    ".biases": "MLX",
}
"""By the end of a tensor's name, the format that has tensors named so."""


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


def refuse_rotated(config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are rotated: what it stores is not what acts on inputs.

    Raises:
        UnsupportedError: `transform_config` says so.
    """
    found = quantization_of(config)
    if isinstance(found, Mapping) and found.get("transform_config"):
        raise UnsupportedError(
            "the base's weights are rotated (transform_config, as SpinQuant and QuIP do), so that "
            "a change cannot be added to them",
            got=", ".join(_applied(found["transform_config"])),
            hint="Start from the original checkpoint",
        )


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
