"""A quantised checkpoint seen as one of plain floating tensors, computed when they are read.

Four-bit weights of bitsandbytes mean what loaders compute with: codebook · scale rounded to the
type they were made from. Eight-bit floats mean code · scale, in float32. Nothing is held: a range
of elements is computed from the same range of the stored ones. Other quantisations are refused,
unless nothing needs their weights: `as_stored` then copies them as they are.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools_formats.checkpoints.bitsandbytes import (
    QuantizedWeight,
    is_four_bit_config,
    quantized_weights,
)
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.eight_bit_floats import (
    METHODS,
    PRE_SCALE,
    Fp8Weight,
    activation_scales,
    fp8_weights,
    marks_of_comfyui,
    unmarked,
)
from loratools_formats.checkpoints.facts import is_conv1d
from loratools_formats.checkpoints.quantization import (
    format_found,
    parts_beside,
    quantization_of,
    refuse_rotated,
)
from loratools_formats.core.dtypes import DTYPES, Array, DType
from loratools_formats.core.tensors import Buffer, TensorRef, in_file
from loratools_formats.disk.errors import UnsupportedError

if TYPE_CHECKING:
    from loratools.base.fourbit.decode import Dequantizer


_FLOATING = ("F64", "F32", "F16", "BF16")
_INTEGERS = ("I8", "U8", "I32", "U32")
_DTYPE_KEYS = ("dtype", "torch_dtype")
# Entries by which compressed-tensors and ModelOpt tell their variants apart, and those that store
# eight-bit floats.
_VARIANTS = {
    "format": ("dense", "float-quantized", "naive-quantized", "mxfp8-quantized"),
    "quant_algo": ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"),
}


@dataclass(frozen=True)
class DequantisedCheckpoint:
    """A checkpoint whose quantised weights read as floating ones.

    Attributes:
        checkpoint: the base's files, with floating tensors and a configuration for them.
        stored: type to store each computed weight in by default: 16 bits.
        four_bit: weights in four bits.
        dropped: tensors that only say how others are quantised.
        eight_bit: names of the weights in eight-bit floats.
    """

    checkpoint: Checkpoint
    stored: Mapping[str, DType]
    four_bit: Mapping[str, QuantizedWeight]
    dropped: tuple[str, ...]
    eight_bit: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is computed."""
        return bool(self.stored)


def dequantised(base: Checkpoint) -> DequantisedCheckpoint:
    """Return a checkpoint whose weights read as floating ones; itself if none is quantised.

    Raises:
        AdapterError: malformed quantised weights.
        UnsupportedError: a quantisation that is not known; the error names it.
    """
    _check_method(base)
    four_bit = quantized_weights(base.tensors)
    eight_bit = fp8_weights(base.tensors, base.config)
    _check_left_over(base, four_bit, eight_bit)
    if not four_bit and not eight_bit:
        return DequantisedCheckpoint(base, {}, {}, ())
    auxiliary = {t.key for w in four_bit.values() for t in w.tensors} - set(four_bit)
    auxiliary |= {part.key for weight in eight_bit.values() for part in weight.parts}
    if eight_bit:
        auxiliary |= {*activation_scales(base.tensors), *marks_of_comfyui(base.tensors, eight_bit)}
    tensors: dict[str, TensorRef] = {}
    stored: dict[str, DType] = {}
    for key, tensor in base.tensors.items():
        if key in four_bit:
            weight = four_bit[key]
            tensors[key] = four_bit_tensor(weight, transposed=is_conv1d(key, base.config))
            stored[key] = weight.dtype if weight.dtype.bits == 16 else DTYPES["BF16"]
        elif key in eight_bit:
            tensors[key] = _computed(key, DTYPES["F32"], tensor.shape, _Fp8Source(eight_bit[key]))
            stored[key] = DTYPES["BF16"]
        elif key not in auxiliary:
            tensors[key] = tensor
    name = next(iter(stored.values())).torch
    checkpoint = replace(base, tensors=tensors, config=dequantised_config(base.config, str(name)))
    return DequantisedCheckpoint(
        checkpoint, stored, four_bit, tuple(sorted(auxiliary)), tuple(sorted(eight_bit))
    )


def dequantised_metadata(base: DequantisedCheckpoint) -> dict[str, str] | None:
    """Return the metadata of files of dequantised weights; None if they keep their own."""
    files = base.checkpoint.files
    if not base.eight_bit or all(unmarked(f.metadata, base.eight_bit) == f.metadata for f in files):
        return None
    return unmarked(files[0].metadata, base.eight_bit)


def dequantised_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a configuration, and those nested in it, for plain weights of a torch type."""
    changed: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("quantization_config", "compression_config", "_pre_quantization_dtype"):
            continue
        if name in _DTYPE_KEYS and isinstance(value, str):
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
    refuse_rotated(base.config)
    return DequantisedCheckpoint(base, {}, {}, ())


def is_stored_plain(base: Checkpoint, key: str) -> bool:
    """Return whether a tensor of a checkpoint is stored as plain floating numbers."""
    code = base.tensors[key].dtype.code
    return code in _FLOATING and not parts_beside(key, base.tensors)


def _check_method(base: Checkpoint) -> None:
    refuse_rotated(base.config)
    found = quantization_of(base.config)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    variant = ""
    if isinstance(found, Mapping):
        variant = next((f", {key} {found[key]}" for key in _VARIANTS if found.get(key)), "")
        is_fp8 = method in METHODS and all(
            found.get(key) in (None, *known) for key, known in _VARIANTS.items()
        )
        if is_four_bit_config(found) or is_fp8:
            return
    raise _not_readable(base, f"quant_method {method}{variant}")


def _check_left_over(
    base: Checkpoint, four_bit: Mapping[str, QuantizedWeight], eight_bit: Mapping[str, Fp8Weight]
) -> None:
    """Refuse weights in integers, and scales of inputs, that belong to no weight that was found.

    Raises:
        UnsupportedError: there are some, such as four-bit experts beside eight-bit layers.
    """
    scales = {part.key for weight in eight_bit.values() for part in weight.parts}
    for key, tensor in base.tensors.items():
        is_integer = tensor.dtype.code in _INTEGERS and key not in four_bit
        beside_others = is_integer and (four_bit or eight_bit) and key.endswith(".weight")
        if (beside_others and parts_beside(key, base.tensors)) or (
            key.endswith(PRE_SCALE) and key not in scales
        ):
            raise _not_readable(base, key)


def _not_readable(base: Checkpoint, got: str) -> UnsupportedError:
    told = format_found(base.tensors)
    return UnsupportedError(
        "the base is quantised in a way that cannot be read",
        path=base.path,
        got=got if told is None else f"{got}: {told}",
        expected=f"bitsandbytes in four bits, or {', '.join(METHODS)} with eight-bit floats",
        hint="Start from the original checkpoint; only fuse leaves quantised weights as they are, "
        "where no adapter changes them",
    )


def _computed(key: str, dtype: DType, shape: tuple[int, ...], source: _Source) -> TensorRef:
    return in_file(key, dtype, shape, source, 0)


def four_bit_tensor(weight: QuantizedWeight, *, transposed: bool) -> TensorRef:
    """Return a four-bit weight as a plain tensor; Conv1D weights are stored transposed."""
    if transposed and len(weight.shape) == 2:
        return _computed(weight.key, weight.dtype, weight.shape[::-1], _TransposedSource(weight))
    return _computed(weight.key, weight.dtype, weight.shape, _FourBitSource(weight))


class _Source(ABC):
    """Bytes of a plain tensor that are computed when they are read."""

    dtype: DType

    def read_at(self, offset: int, nbytes: int) -> Buffer:
        """Return exactly `nbytes` bytes from `offset`, both whole elements."""
        width = self.dtype.bits // 8
        values = self.values(offset // width, (offset + nbytes) // width)
        return memoryview(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)

    @abstractmethod
    def values(self, start: int, stop: int) -> Array:
        """Return elements [start, stop) of the flat tensor in its type."""


class _FourBitSource(_Source):
    """A weight of bitsandbytes, rounded to the type it was made from."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.dtype = weight.dtype
        self._weight = weight
        self._lock = threading.Lock()
        self._decoder: Dequantizer | None = None

    def values(self, start: int, stop: int) -> Array:
        from loratools.base.fourbit.decode import Dequantizer

        with self._lock:
            if self._decoder is None:
                self._decoder = Dequantizer(self._weight)
        out = np.empty(stop - start, self.dtype.numpy_dtype())
        return self._decoder.elements(start, stop, out)


class _TransposedSource(_FourBitSource):
    """The same of a Conv1D weight, transposed back; each thread keeps the last one whole."""

    _kept = threading.local()

    def values(self, start: int, stop: int) -> Array:
        if getattr(self._kept, "key", None) is not self._weight:
            whole = super().values(0, self._weight.numel).reshape(self._weight.shape)
            self._kept.key, self._kept.values = self._weight, np.ascontiguousarray(whole.T)
        values: Array = self._kept.values.reshape(-1)
        return values[start:stop]


class _Fp8Source(_Source):
    """An eight-bit floating weight times its scales, in float32."""

    def __init__(self, weight: Fp8Weight) -> None:
        self.dtype = DTYPES["F32"]
        self._weight = weight

    def values(self, start: int, stop: int) -> Array:
        weight = self._weight
        codes: Array = weight.values.elements(start, stop).astype(np.float32)
        *_, out, in_ = weight.values.shape if len(weight.values.shape) > 1 else (1, stop)
        scale = _numbers(weight.scale).reshape(-1)
        if weight.block is None:
            one = scale[0] if len(scale) == 1 else scale[np.arange(start, stop) // (out * in_)]
            codes *= one
            return self._of_inputs(codes, start, in_)
        rows, columns = weight.block
        across = -(-in_ // columns)
        first, last = start // in_, -(-stop // in_)
        lines = np.arange(first, last)
        grid = scale.reshape(-1, across)
        of_line = lines // out * -(-out // rows) + lines % out // rows
        spread = np.repeat(grid[of_line], columns, axis=1)[:, :in_].reshape(-1)
        codes *= spread[start - first * in_ : stop - first * in_]
        return self._of_inputs(codes, start, in_)

    def _of_inputs(self, values: Array, start: int, width: int) -> Array:
        """Multiply elements from `start`, of rows of `width`, with the scale of inputs."""
        if self._weight.of_inputs is not None:
            scale = np.broadcast_to(self._weight.of_inputs.load(np.float32).reshape(-1), width)
            values *= scale[np.arange(start, start + len(values)) % width]
        return values


def _numbers(scale: TensorRef) -> Array:
    """Return scales in float32; bytes are exponents of two, where 127 stands for one."""
    if scale.dtype.code == "U8":
        return np.exp2(scale.load(np.float32) - np.float32(127))
    values: Array = scale.load(np.float32)
    return values
