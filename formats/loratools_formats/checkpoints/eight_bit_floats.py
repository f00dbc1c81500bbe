"""Eight-bit floating weights with scales beside them: which tensors belong together, no maths.

A weight `W` of type F8_E4M3 or F8_E5M2 means W · scale. The scale is one number, one for each
output, or one for each block of outputs and inputs, ragged at the ends; all are multiplied,
whatever their name says. Scales of type F8_E8M0 are powers of two, and bytes are the exponents of
such powers. A `pre_quant_scale` multiplies the inputs of a layer, and so its weight's columns.
Scales of activations and of the key-value cache belong to running the model in eight bits and mean
nothing for its weights. Where a checkpoint holds no scale at all and says nothing of quantisation,
its eight-bit floats are numbers like any other.

Sources: DeepSeek-V3's and transformers' fine-grained FP8 (`weight_scale_inv`, `weight_block_size`),
DeepSeek-V4 (`scale`), Mistral Large (`qscale_weight`), fbgemm_fp8, compressed-tensors and ModelOpt
(`weight_scale`, `pre_quant_scale`); ComfyUI's older scaled checkpoints (`scale_weight`, marked by
`scaled_fp8`) and its present ones (`weight_scale`, marked by `comfy_quant` beside the weight or
`_quantization_metadata` in the file).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loratools_formats.checkpoints.comfyui import MARKS
from loratools_formats.checkpoints.quantization import quantization_of
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

FP8_TYPES = ("F8_E4M3", "F8_E5M2")
METHODS = ("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_SCALES = ("_scale_inv", "_scale")
_SCALES_OF_MODULE = ("scale", "qscale_weight", "scale_weight")
_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
PRE_SCALE = ".pre_quant_scale"
_OF_ACTIVATIONS = (
    "input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale",
    "k_proj.output_scale", "v_proj.output_scale", "scale_input", "input_global_scale",
    "q_global_scale", "k_global_scale", "v_global_scale", "input_zero_point", "output_zero_point",
    "q_zero_point", "k_zero_point", "v_zero_point", "input_g_idx",
)  # fmt: skip
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Fp8Weight:
    """One weight in eight bits.

    Attributes:
        values: (…, out, in) the codes.
        scale: its scales.
        block: outputs and inputs that share one scale; None for one scale per matrix.
        of_inputs: (in,) what the layer multiplies its inputs with; None if nothing.
    """

    values: TensorRef
    scale: TensorRef
    block: tuple[int, int] | None
    of_inputs: TensorRef | None = None

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """The tensors beside the codes."""
        return (self.scale,) if self.of_inputs is None else (self.scale, self.of_inputs)


def fp8_weights(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> dict[str, Fp8Weight]:
    """Return the eight-bit floating weights of a checkpoint by name.

    Raises:
        AdapterError: a scale does not fit its weight.
        UnsupportedError: a weight has no scale of a known name, or one of an unknown type.
    """
    quantization = quantization_of(config)
    if quantization is None and not any("scale" in key for key in tensors):
        return {}
    block = _block_size(quantization)
    marked = any(key.rpartition(".")[2] in MARKS for key in tensors)
    return {
        key: _weight(tensor, tensors, block)
        for key, tensor in tensors.items()
        if tensor.dtype.code in FP8_TYPES and (not marked or _scales_of(key, tensors))
    }


def _scales_of(key: str, tensors: Mapping[str, TensorRef]) -> list[str]:
    """Return the names of the scales that a weight has."""
    return [name for name in _scale_names(key) if name in tensors]


def activation_scales(
    tensors: Mapping[str, TensorRef], stacks: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the names of scales that belong to activations, not to weights.

    Args:
        tensors: those of a checkpoint.
        stacks: names of quantised weights, after which such scales may be named.
    """
    suffixes = tuple(f".{name}" for name in _OF_ACTIVATIONS)
    of_stacks = {f"{key}_{name}" for key in stacks for name in _OF_ACTIVATIONS}
    return tuple(key for key in tensors if key.endswith(suffixes) or key in of_stacks)


def _weight(
    values: TensorRef, tensors: Mapping[str, TensorRef], block: tuple[int, int] | None
) -> Fp8Weight:
    found = _scales_of(values.key, tensors)
    if len(found) != 1:
        raise UnsupportedError(
            "eight-bit weight without one scale of a known name",
            tensor=values.key,
            got=", ".join(found) or values.dtype.code,
            expected=" or ".join(_scale_names(values.key)),
        )
    scale = tensors[found[0]]
    if scale.dtype.code not in _SCALE_TYPES:
        raise UnsupportedError(
            "scale of a type that is not known",
            tensor=scale.key,
            got=scale.dtype.code,
            expected=" or ".join(_SCALE_TYPES),
        )
    of_inputs = tensors.get(f"{values.key.removesuffix('.weight')}{PRE_SCALE}")
    if of_inputs is not None and of_inputs.numel not in (1, values.shape[-1]):
        raise AdapterError(
            "a scale of inputs does not fit its weight",
            tensor=of_inputs.key,
            got=list(of_inputs.shape),
            expected=f"{values.shape[-1]} elements",
        )
    return Fp8Weight(values, scale, _block(values, scale, block), of_inputs)


def _scale_names(key: str) -> list[str]:
    names = [f"{key}{suffix}" for suffix in _SCALES]
    if key.endswith(".weight"):
        names += [f"{key.removesuffix('weight')}{name}" for name in _SCALES_OF_MODULE]
    return names


def _block(
    values: TensorRef, scale: TensorRef, stated: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the outputs and inputs that share one scale; None for one scale per matrix.

    The stated size holds where it fits. Else the grid of scales tells, as transformers reads it,
    since one file may hold blocks of several sizes. ModelOpt stores a grid as (down, 1, across, 1).
    """
    *stack, out, in_ = values.shape if len(values.shape) > 1 else (1, *values.shape)
    trimmed = _trimmed(scale.shape)
    if scale.numel == 1 or trimmed == _trimmed(tuple(stack)):
        return None
    if trimmed == _trimmed((*stack, out)):
        return 1, in_
    rows, columns = stated or _DEFAULT_BLOCK
    grid = (*stack, -(-out // rows), -(-in_ // columns))
    shape = scale.shape
    if len(shape) == len(grid) + 2 and shape[-3] == shape[-1] == 1:
        shape = (*shape[:-4], shape[-4], shape[-2])
    if shape == grid:
        return rows, columns
    if shape[:-2] == tuple(stack) and len(shape) == len(grid):
        down, across = shape[-2:]
        if down and across and not out % down and not in_ % across:
            return out // down, in_ // across
    raise AdapterError(
        f"scales do not fit blocks of {rows} × {columns}",
        tensor=scale.key,
        got=list(scale.shape),
        expected=list(grid),
    )


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the ones at its end, which spread a scale over the rest."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _block_size(quantization: Any) -> tuple[int, int] | None:
    """Return the size of blocks that a configuration states, None if it states none or several."""
    if not isinstance(quantization, Mapping):
        return None
    found = {"weight_block_size": quantization.get("weight_block_size")}
    groups = quantization.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            found[f"block_structure of {name}"] = weights.get("block_structure")
    sizes = set()
    for name, stated in found.items():
        if stated is None:
            continue
        valid = isinstance(stated, list) and len(stated) == 2
        if not valid or not all(type(size) is int and size > 0 for size in stated):
            raise AdapterError(
                f"config {name} is wrong", got=stated, expected="two positive integers"
            )
        sizes.add((stated[0], stated[1]))
    return sizes.pop() if len(sizes) == 1 else None
