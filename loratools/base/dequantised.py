"""A quantised checkpoint seen as one of plain floating tensors, computed when they are read.

Values are those that loaders compute with: `loratools.base.codecs` has one file for each format.
Nothing is held: a range of elements is computed from the same range of the stored ones. Other
quantisations are refused, unless nothing needs their weights: `as_stored` then copies them as they
are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratools.base.codecs import (
    CODECS,
    CodedWeight,
    Stored,
    coded_weights,
    methods,
    without_marks,
)
from loratools.base.codecs.codec import DTYPE_KEYS
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.comfyui import marks_of_comfyui
from loratools_formats.checkpoints.eight_bit_floats import FP8_TYPES, activation_scales
from loratools_formats.checkpoints.quantization import (
    format_found,
    is_lone_part,
    is_part,
    parts_beside,
    refuse_rotated,
    stated_of,
)
from loratools_formats.core.dtypes import DTYPES, FLOATING, DType
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_INTEGERS = ("I8", "U8", "I32", "U32")
# By quant_method: the entry that names a variant whose tensors do not tell it, and those known.
_VARIANTS = {
    "compressed-tensors": ("format", (
        "dense", "float-quantized", "naive-quantized", "mxfp8-quantized", "int-quantized",
        "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision",
        "nvfp4-e5m3-pack-quantized",
    )),
    "awq": ("version", ("gemm", "gemv")),
}  # fmt: skip
_NAMED = ("quant_method", "format", "quant_algo", "version", "packing_format")
_OF_CONFIG = ("quantization_config", "compression_config", "_pre_quantization_dtype")
_OF_MLX = "quantization"


@dataclass(frozen=True)
class DequantisedCheckpoint:
    """A checkpoint whose quantised weights read as floating ones.

    Attributes:
        checkpoint: the base's files, with floating tensors and a configuration for them.
        stored: type to store each computed weight in by default: 16 bits.
        weights: the quantised weights, by plain name.
        dropped: tensors that only say how others are quantised.
    """

    checkpoint: Checkpoint
    stored: Mapping[str, DType]
    weights: Mapping[str, CodedWeight]
    dropped: tuple[str, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is computed."""
        return bool(self.stored)

    @property
    def places(self) -> Mapping[str, str]:
        """The stored tensor that each computed weight takes the place of, where names differ."""
        return {key: w.parts[0].key for key, w in self.weights.items() if w.parts[0].key != key}


def dequantised(base: Checkpoint) -> DequantisedCheckpoint:
    """Return a checkpoint whose weights read as floating ones; itself if none is quantised.

    Raises:
        AdapterError: malformed quantised weights.
        UnsupportedError: a quantisation that is not known; the error names it.
    """
    stated = stated_of(base)
    refuse_rotated(stated)
    _check_method(base, stated)
    weights = coded_weights(Stored(base.tensors, base.config, stated, _metadata(base)))
    parts = {part.key for weight in weights.values() for part in weight.parts}
    of_running: set[str] = set()
    if weights:
        of_running = {
            *activation_scales(base.tensors, weights),
            *marks_of_comfyui(base.tensors, weights),
        }
    _check_left_over(base, parts | of_running, stated)
    _check_beside(base, parts | of_running, weights)
    if weights or stated:
        _check_lone(base, parts | of_running)
    if not weights:
        return DequantisedCheckpoint(base, {}, {}, ())
    computed = {weight.parts[0].key: key for key, weight in weights.items()}
    tensors: dict[str, TensorRef] = {}
    for key, tensor in base.tensors.items():
        if key in computed:
            name = computed[key]
            if name != key and name in base.tensors:
                raise AdapterError(
                    "weight is there twice, plain and quantised", path=base.path, tensor=name
                )
            tensors[name] = weights[name].tensor()
        elif key not in parts and key not in of_running:
            tensors[key] = tensor
    stored = {key: _to_store(weights[key].dtype) for key in computed.values()}
    auxiliary = (parts | of_running) - {k for k, name in computed.items() if k == name}
    dtype = next(iter(stored.values())).torch
    checkpoint = replace(base, tensors=tensors, config=dequantised_config(base.config, str(dtype)))
    return DequantisedCheckpoint(checkpoint, stored, weights, tuple(sorted(auxiliary)))


def _metadata(base: Checkpoint) -> dict[str, str]:
    """Return the metadata of all files together."""
    return {key: text for file in base.files for key, text in file.metadata.items()}


def _to_store(dtype: DType) -> DType:
    return dtype if dtype.bits == 16 else DTYPES["BF16"]


def config_beside(base: Checkpoint, plain: Iterable[CodedWeight]) -> Mapping[str, Any] | None:
    """Return a configuration for a quantised checkpoint of which some weights become plain.

    Returns:
        None if the format's loaders want all of its weights plain, or none.
    """
    config: Mapping[str, Any] | None = base.config
    found = list(plain)
    modules = [weight.key.removesuffix(".weight") for weight in found]
    for weight in {type(weight): weight for weight in found}.values():
        config = None if config is None else weight.config_beside(config, modules)
    return config


def in_16_bits(base: DequantisedCheckpoint) -> Checkpoint:
    """Return a checkpoint whose weights are in the types that they would be stored in."""
    tensors = {
        key: base.weights[key].tensor(base.stored[key]) if key in base.stored else tensor
        for key, tensor in base.checkpoint.tensors.items()
    }
    return replace(base.checkpoint, tensors=tensors)


def rounded_as(base: DequantisedCheckpoint, other: DequantisedCheckpoint) -> Checkpoint:
    """Return a checkpoint whose weights are rounded as another one stores them in 16 bits.

    What `fuse` and `dequantize` wrote of a weight that nothing changed is then equal, not near.
    """
    tensors = dict(base.checkpoint.tensors)
    for key, weight in base.weights.items():
        there = other.checkpoint.tensors.get(key)
        is_plain = there is not None and key not in other.weights
        if there is not None and is_plain and there.dtype.floating and there.dtype.bits == 16:
            tensors[key] = weight.tensor(there.dtype)
    return replace(base.checkpoint, tensors=tensors)


def dequantised_metadata(base: DequantisedCheckpoint) -> dict[str, str] | None:
    """Return the metadata of files of dequantised weights; None if they keep their own."""
    files = base.checkpoint.files
    weights = base.weights
    if not weights or all(without_marks(f.metadata, weights) == f.metadata for f in files):
        return None
    return without_marks(files[0].metadata, weights)


def dequantised_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a configuration, and those nested in it, for plain weights of a torch type."""
    changed: dict[str, Any] = {}
    for name, value in config.items():
        if name in _OF_CONFIG or (name == _OF_MLX and isinstance(value, Mapping)):
            continue
        if name in DTYPE_KEYS and isinstance(value, str):
            changed[name] = dtype
        else:
            changed[name] = (
                dequantised_config(value, dtype) if isinstance(value, Mapping) else value
            )
    return changed


def as_stored(base: Checkpoint) -> DequantisedCheckpoint:
    """Return a checkpoint with all its tensors as they are, and its configuration.

    Of such a checkpoint, only tensors that `is_stored_plain` tells may be read as weights.

    Raises:
        UnsupportedError: its weights are rotated.
    """
    refuse_rotated(stated_of(base))
    return DequantisedCheckpoint(base, {}, {}, ())


def is_stored_plain(base: Checkpoint, key: str) -> bool:
    """Return whether a tensor of a checkpoint is stored as plain floating numbers."""
    code = base.tensors[key].dtype.code
    return code in FLOATING and not parts_beside(key, base.tensors)


def _check_method(base: Checkpoint, stated: Mapping[str, Any]) -> None:
    """Refuse a format by the name that the configuration gives it.

    What tensors do not show, such as codes whose meaning a program computes, only that tells.
    """
    method = stated.get("quant_method")
    entry, known = _VARIANTS.get(str(method), ("", ()))
    variant = stated.get(entry)
    fits = not isinstance(variant, str) or variant.lower() in known
    if method is not None and (method not in methods() or not fits):
        raise _not_readable(base, None, stated)


def _check_left_over(base: Checkpoint, known: Collection[str], stated: Mapping[str, Any]) -> None:
    """Refuse parts of quantised weights that belong to no weight that was found.

    Raises:
        UnsupportedError: there are some, such as experts of an unknown format beside known layers.
    """
    is_quantised = bool(known or stated)
    for key, tensor in base.tensors.items():
        if key in known:
            continue
        is_weight = key.endswith(".weight") and tensor.dtype.code in _INTEGERS
        beside = is_weight and is_quantised and parts_beside(key, base.tensors)
        lone = is_weight and is_quantised and len(tensor.shape) > 1
        coded = tensor.dtype.code in FP8_TYPES and stated
        if beside or lone or coded or is_part(key):
            raise _not_readable(base, key, stated)


def _check_beside(
    base: Checkpoint, known: Collection[str], weights: Mapping[str, CodedWeight]
) -> None:
    """Refuse tensors that may change what a quantised weight means, or what it is multiplied with.

    A linear layer has a weight and a bias. Whatever else is stored in one, such as scales of its
    inputs or an order of its columns, belongs to a format that is not known; so does what is named
    after a weight, as after a stack of experts. AutoAWQ stores scales of the activations before a
    layer under the name of the activation.

    Raises:
        UnsupportedError: there are some.
    """
    for key, tensor in base.tensors.items() if weights else ():
        if key in known or key in weights:
            continue
        weight, rest = _named_after(key, weights)
        is_own = weight is not None and not _is_bias(rest, tensor, weight)
        if is_own or key.endswith(".scales"):
            raise UnsupportedError(
                "a tensor beside quantised weights may change what they mean",
                path=base.path,
                tensor=key,
                hint="Start from the original checkpoint",
            )


def _check_lone(base: Checkpoint, known: Collection[str]) -> None:
    """Refuse what is named as a part of a quantised weight, and belongs to none that was found.

    Raises:
        UnsupportedError: there is some; a part is missing, or has another type than it should.
    """
    for key, tensor in base.tensors.items():
        is_integer = tensor.dtype.code in _INTEGERS
        is_power = tensor.dtype.code == "F8_E8M0"
        if key not in known and (is_power or is_lone_part(key, is_integer=is_integer)):
            raise UnsupportedError(
                "a part of a quantised weight of which other parts are missing or wrong",
                path=base.path,
                tensor=key,
                got=f"{tensor.dtype.code} {list(tensor.shape)}",
                hint="Start from the original checkpoint",
            )


def _named_after(key: str, weights: Mapping[str, CodedWeight]) -> tuple[CodedWeight | None, str]:
    """Return the weight that a tensor is in one module with or named after, and the name's rest."""
    module, _, leaf = key.rpartition(".")
    own = weights.get(f"{module}.weight")
    if own is not None:
        return own, leaf
    for at, letter in enumerate(key):
        if letter in "._" and key[:at] in weights:
            return weights[key[:at]], key[at + 1 :]
    return None, ""


def _is_bias(name: str, tensor: TensorRef, weight: CodedWeight) -> bool:
    """Return whether a tensor is added to what a layer computes."""
    if name == "bias":
        return True
    is_like_one = name.endswith("_bias") and not name.startswith("weight") and "scale" not in name
    out, in_ = weight.shape[-2:-1], weight.shape[-1:]
    of_stack = (*weight.shape[:-2], weight.shape[-1])
    outputs = (out,) if weight.key.endswith(".weight") else (out, in_, of_stack)
    return is_like_one and tensor.dtype.floating and tensor.shape in outputs


def _not_readable(base: Checkpoint, key: str | None, stated: Mapping[str, Any]) -> UnsupportedError:
    said = [f"{entry} {stated[entry]}" for entry in _NAMED if stated.get(entry)]
    return UnsupportedError(
        "the base is quantised in a way that cannot be read",
        path=base.path,
        tensor=key,
        got=": ".join(filter(None, (", ".join(said), format_found(base.tensors)))) or None,
        expected=", ".join(codec.name for codec in CODECS),
        hint="Start from the original checkpoint; only fuse leaves quantised weights as they are, "
        "where no adapter changes them",
    )
