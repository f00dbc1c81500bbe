"""Eight-bit floating weights with scales beside them: which tensors belong together, no maths.

A weight `W` of type F8_E4M3 or F8_E5M2 means W · scale. The scale is one number, one for each
output, or one for each block of outputs and inputs, ragged at the ends; all are multiplied,
whatever their name says. Scales of activations and of the key-value cache belong to running the
model in eight bits and mean nothing for its weights. Where a checkpoint holds no scale at all and
says nothing of quantisation, its eight-bit floats are numbers like any other.

Sources: DeepSeek-V3's and transformers' fine-grained FP8 (`weight_scale_inv`, `weight_block_size`),
fbgemm_fp8, compressed-tensors and ModelOpt (`weight_scale`); ComfyUI's older scaled checkpoints
(`scale_weight` beside the weight, and the mark `scaled_fp8`) and its present ones (`weight_scale`,
and `comfy_quant` beside the weight or `_quantization_metadata` in the file).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.disk.strict_json import parsed_object

FP8_TYPES = ("F8_E4M3", "F8_E5M2")
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_SCALES = ("_scale_inv", "_scale")
_SCALE_OF_COMFYUI = "scale_weight"
_MARKS_OF_COMFYUI = ("scaled_fp8", "comfy_quant")
_METADATA_OF_COMFYUI = "_quantization_metadata"
_SCALE_TYPES = ("F32", "BF16", "F16")
_OF_ACTIVATIONS = (
    "input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale",
    "k_proj.output_scale", "v_proj.output_scale", "scale_input",
)  # fmt: skip
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Fp8Weight:
    """One weight in eight bits.

    Attributes:
        values: (…, out, in) the codes.
        scale: its scales.
        block: outputs and inputs that share one scale; None for one scale per matrix.
    """

    values: TensorRef
    scale: TensorRef
    block: tuple[int, int] | None


def fp8_weights(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> dict[str, Fp8Weight]:
    """Return the eight-bit floating weights of a checkpoint by name.

    Raises:
        AdapterError: a scale does not fit its weight.
        UnsupportedError: a weight has no scale of a known name, or one of an unknown type.
    """
    if "quantization_config" not in config and not any("scale" in key for key in tensors):
        return {}
    of_comfyui = any(key.rpartition(".")[2] == _SCALE_OF_COMFYUI for key in tensors)
    marked = of_comfyui or any(key.rpartition(".")[2] in _MARKS_OF_COMFYUI for key in tensors)
    return {
        key: _weight(tensor, tensors, config)
        for key, tensor in tensors.items()
        if tensor.dtype.code in FP8_TYPES and (not marked or _scales_of(key, tensors))
    }


def _scales_of(key: str, tensors: Mapping[str, TensorRef]) -> list[str]:
    """Return the names of the scales that a weight has."""
    beside = f"{key.rpartition('.')[0]}.{_SCALE_OF_COMFYUI}"
    return [name for name in (*(f"{key}{suffix}" for suffix in _SCALES), beside) if name in tensors]


def marks_of_comfyui(tensors: Mapping[str, TensorRef], weights: Collection[str]) -> list[str]:
    """Return the names of tensors by which ComfyUI tells that some weights are in eight bits."""
    of_weights = [f"{key.rpartition('.')[0]}.{_MARKS_OF_COMFYUI[1]}" for key in weights]
    return [key for key in (_MARKS_OF_COMFYUI[0], *of_weights) if key in tensors]


def unmarked(metadata: Mapping[str, str], weights: Collection[str]) -> dict[str, str]:
    """Return a file's metadata, in which ComfyUI finds some weights in eight bits no more.

    Raises:
        AdapterError: what it says of layers is not sound.
    """
    text = metadata.get(_METADATA_OF_COMFYUI)
    if text is None:
        return dict(metadata)
    stated = parsed_object(text.encode(), _METADATA_OF_COMFYUI, path=None, max_depth=16)
    layers = stated.get("layers")
    if not isinstance(layers, dict):
        raise AdapterError(f"metadata {_METADATA_OF_COMFYUI} lists no layers")
    modules = {key.rpartition(".")[0] for key in weights}
    kept = {name: layer for name, layer in layers.items() if name not in modules}
    rest = {key: value for key, value in metadata.items() if key != _METADATA_OF_COMFYUI}
    return rest | ({_METADATA_OF_COMFYUI: json.dumps({**stated, "layers": kept})} if kept else {})


def activation_scales(tensors: Mapping[str, TensorRef]) -> tuple[str, ...]:
    """Return the names of scales that belong to activations, not to weights."""
    suffixes = tuple(f".{name}" for name in _OF_ACTIVATIONS)
    return tuple(key for key in tensors if key.endswith(suffixes))


def _weight(
    values: TensorRef, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> Fp8Weight:
    found = _scales_of(values.key, tensors)
    if len(found) != 1:
        raise UnsupportedError(
            "eight-bit weight without one scale of a known name",
            tensor=values.key,
            got=", ".join(found) or values.dtype.code,
            expected=" or ".join(f"{values.key}{suffix}" for suffix in _SCALES),
        )
    scale = tensors[found[0]]
    if scale.dtype.code not in _SCALE_TYPES:
        raise UnsupportedError(
            "scale of a type that is not known",
            tensor=scale.key,
            got=scale.dtype.code,
            expected=" or ".join(_SCALE_TYPES),
        )
    *stack, out, in_ = values.shape if len(values.shape) > 1 else (1, *values.shape)
    trimmed = _trimmed(scale.shape)
    if scale.numel == 1 or trimmed == _trimmed(tuple(stack)):
        return Fp8Weight(values, scale, None)
    if trimmed == _trimmed((*stack, out)):
        return Fp8Weight(values, scale, (1, in_))
    rows, columns = _block_size(config)
    grid = (*stack, -(-out // rows), -(-in_ // columns))
    if scale.shape != grid:
        raise AdapterError(
            f"scales do not fit blocks of {rows} × {columns}",
            tensor=scale.key,
            got=list(scale.shape),
            expected=list(grid),
        )
    return Fp8Weight(values, scale, (rows, columns))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the ones at its end, which spread a scale over the rest."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    quantization = config.get("quantization_config")
    stated = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if stated is None:
        return _DEFAULT_BLOCK
    valid = isinstance(stated, list) and len(stated) == 2
    if not valid or not all(type(size) is int and size > 0 for size in stated):
        raise AdapterError(
            "config weight_block_size is wrong", got=stated, expected="two positive integers"
        )
    return stated[0], stated[1]
