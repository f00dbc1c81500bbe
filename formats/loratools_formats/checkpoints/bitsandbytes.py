"""Four-bit weights of bitsandbytes inside a checkpoint: which tensors belong together, no maths.

A quantised weight `W` is packed codes under its own name, scales in `W.absmax`, the codebook in
`W.quant_map`, and JSON in `W.quant_state.bitsandbytes__nf4` (or `__fp4`); if scales are quantised
too, also `W.nested_absmax` and `W.nested_quant_map`. It is recognised by the JSON, never by the
type of `W`, whose bytes may be stored as if they were floats.
Source: `QuantState.as_dict` in bitsandbytes 0.50, and the bitsandbytes quantiser of transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loratools_formats.checkpoints.siblings import missing_part, sibling
from loratools_formats.core.dtypes import DTYPES, DType
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.disk.strict_json import parsed_object

QuantType = Literal["nf4", "fp4"]

NESTED_BLOCKSIZE = 256
MAX_STATE_BYTES = 1024
_STATE = ".quant_state.bitsandbytes__"
_QUANT_TYPES: dict[str, QuantType] = {"nf4": "nf4", "fp4": "fp4"}
_AUXILIARY = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SPOILT = "bitsandbytes spoils scales when a model is saved after running on a CPU"
_PACKED = ("U8", "F16", "BF16", "F32")


@dataclass(frozen=True)
class Nested:
    """How the scales of a weight are quantised themselves.

    Attributes:
        absmax: F32 (ceil(blocks / 256),) scale of each group of 256 scales.
        quant_map: F32 (256,) what the codes of the scales mean.
        offset: added to every scale.
        dtype: what scales are rounded to before and after the offset is added; 16 bits where
            bitsandbytes saved a model that had run on a CPU.
    """

    absmax: TensorRef
    quant_map: TensorRef
    offset: float
    dtype: DType


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight in four bits.

    Attributes:
        key: name of the weight.
        shape: its real dimensions.
        dtype: the type it was quantised from, which it is computed in.
        quant_type: nf4 or fp4.
        blocksize: elements that share a scale; blocks run over the flattened weight.
        packed: ceil(numel / 2) bytes, two codes each, the first in the high half.
        absmax: (blocks,) scales, F32, or U8 codes of scales if `nested`.
        quant_map: F32 (16,) the codebook.
        state: the JSON.
        nested: present if scales are quantised too.
    """

    key: str
    shape: tuple[int, ...]
    dtype: DType
    quant_type: QuantType
    blocksize: int
    packed: TensorRef
    absmax: TensorRef
    quant_map: TensorRef
    state: TensorRef
    nested: Nested | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """All tensors that make up the weight, the packed codes first."""
        nested = () if self.nested is None else (self.nested.absmax, self.nested.quant_map)
        return (self.packed, self.absmax, self.quant_map, *nested, self.state)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors)


def quantized_weights(tensors: Mapping[str, TensorRef]) -> dict[str, QuantizedWeight]:
    """Return the four-bit weights of a checkpoint by name.

    Raises:
        AdapterError: one of a weight's tensors is missing, or has another type or size than the
            others say.
        UnsupportedError: a variant whose values are not certain.
    """
    found: dict[str, QuantizedWeight] = {}
    for key in tensors:
        name, mark, quant_type = key.rpartition(_STATE)
        if not mark:
            continue
        if quant_type not in _QUANT_TYPES:
            raise UnsupportedError(
                "unknown quantisation type", tensor=key, got=quant_type, expected="nf4 or fp4"
            )
        if name in found:
            raise AdapterError("weight is quantised in two ways at once", tensor=name)
        found[name] = _weight(name, tensors[key], _QUANT_TYPES[quant_type], tensors)
    for key in tensors:
        for suffix in _AUXILIARY:
            name = key.removesuffix(suffix)
            if name != key and name in tensors and name not in found:
                raise AdapterError(
                    "quantised weight has no quant_state",
                    tensor=name,
                    got=key,
                    expected=f"{name}{_STATE}nf4 or …__fp4 beside it",
                )
    return found


def _weight(
    name: str, state: TensorRef, quant_type: QuantType, tensors: Mapping[str, TensorRef]
) -> QuantizedWeight:
    values = _State(state, quant_type)
    numel = math.prod(values.shape)
    packed = _sibling(tensors, name, "", _PACKED)
    if packed.nbytes != -(-numel // 2):
        raise AdapterError(
            "packed codes have another size than the shape says",
            tensor=name,
            got=f"{packed.nbytes} bytes",
            expected=f"{-(-numel // 2)} for {list(values.shape)}",
        )
    blocks = -(-numel // values.blocksize)
    nested = None
    if f"{name}.nested_absmax" in tensors or f"{name}.nested_quant_map" in tensors:
        values.check_nested()
        groups = -(-blocks // NESTED_BLOCKSIZE)
        nested = Nested(
            _sibling(tensors, name, ".nested_absmax", ("F32",), groups),
            _sibling(tensors, name, ".nested_quant_map", ("F32",), 256),
            values.offset,
            values.nested_dtype,
        )
    elif values.is_nested:
        raise missing_part(f"{name}.nested_absmax")
    scale_types = ("F32",) if nested is None else ("U8",)
    return QuantizedWeight(
        name,
        values.shape,
        values.dtype,
        quant_type,
        values.blocksize,
        packed,
        _sibling(tensors, name, ".absmax", scale_types, blocks),
        _sibling(tensors, name, ".quant_map", ("F32",), 16),
        state,
        nested,
    )


def _sibling(
    tensors: Mapping[str, TensorRef],
    name: str,
    suffix: str,
    codes: tuple[str, ...],
    count: int | None = None,
) -> TensorRef:
    shape = None if count is None else (count,)
    hint = _SPOILT if suffix == ".absmax" or count is not None else None
    return sibling(tensors, f"{name}{suffix}", codes, shape, hint)


class _State:
    """The JSON of one weight, checked.

    Raises:
        AdapterError: an entry is missing or out of range.
    """

    def __init__(self, ref: TensorRef, quant_type: QuantType) -> None:
        self._ref = ref
        values = _json(ref)
        self._values = values
        if values.get("quant_type") != quant_type:
            raise self._wrong("quant_type", quant_type)
        self.blocksize: int = values.get("blocksize", 0)
        if type(self.blocksize) is not int or self.blocksize not in BLOCKSIZES:
            raise self._wrong("blocksize", f"one of {BLOCKSIZES}")
        self.dtype = self.nested_dtype = self._dtype("dtype")
        shape = values.get("shape")
        if (
            not isinstance(shape, list)
            or not 1 <= len(shape) <= 8
            or not all(type(size) is int and 0 < size < 1 << 62 for size in shape)
        ):
            raise self._wrong("shape", "positive integers")
        self.shape: tuple[int, ...] = tuple(shape)
        self.is_nested = "nested_blocksize" in values
        self.offset = 0.0

    def check_nested(self) -> None:
        """Check the entries on quantised scales, and take their offset and type."""
        if self._values.get("nested_blocksize") != NESTED_BLOCKSIZE:
            raise self._wrong("nested_blocksize", NESTED_BLOCKSIZE)
        self.nested_dtype = self._dtype("nested_dtype")
        offset: Any = self._values.get("nested_offset")
        if type(offset) not in (int, float) or not math.isfinite(offset):
            raise self._wrong("nested_offset", "a number")
        self.offset = float(offset)

    def _dtype(self, field: str) -> DType:
        found = self._values.get(field)
        if not isinstance(found, str) or found not in _DTYPES:
            raise self._wrong(field, f"one of {', '.join(_DTYPES)}")
        return DTYPES[_DTYPES[found]]

    def _wrong(self, field: str, expected: object) -> AdapterError:
        return AdapterError(
            f"{field} of a quantised weight",
            tensor=self._ref.key,
            got=self._values.get(field),
            expected=expected,
        )


def _json(ref: TensorRef) -> dict[str, Any]:
    if ref.dtype.code != "U8" or ref.nbytes > MAX_STATE_BYTES:
        raise AdapterError(
            "quant_state is not a short text",
            tensor=ref.key,
            got=f"{ref.nbytes} bytes of {ref.dtype.code}",
            expected=f"at most {MAX_STATE_BYTES} of U8",
        )
    return parsed_object(bytes(ref.raw()), "quant_state", tensor=ref.key, max_depth=3)


def state_key(name: str, quant_type: QuantType) -> str:
    """Return the name of the tensor that holds a weight's JSON."""
    return f"{name}{_STATE}{quant_type}"


def state_json(
    quant_type: QuantType,
    blocksize: int,
    dtype: DType,
    shape: tuple[int, ...],
    offset: float | None,
) -> bytes:
    """Return the JSON of a weight as bitsandbytes writes it.

    Args:
        quant_type: nf4 or fp4.
        blocksize: elements that share a scale.
        dtype: of the weight it was made from.
        shape: of the weight.
        offset: of quantised scales; None if scales are stored as they are.
    """
    names = {code: name for name, code in _DTYPES.items()}
    values: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": names[dtype.code],
        "shape": list(shape),
    }
    if offset is not None:
        values["nested_blocksize"] = NESTED_BLOCKSIZE
        values["nested_dtype"] = "float32"
        values["nested_offset"] = offset
    return strict_json.dumps(values, ensure_ascii=True).encode()


def quantization_config(
    quant_type: QuantType, *, double_quant: bool, compute_dtype: str, skipped: list[str]
) -> dict[str, Any]:
    """Return the entry of `config.json` that makes transformers load four-bit weights.

    Args:
        quant_type: nf4 or fp4.
        double_quant: whether scales are quantised too.
        compute_dtype: torch's name of the type to compute in.
        skipped: all modules that are not quantised, the output embedding among them; if empty,
            transformers applies its own rule.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped or None,
    }


def is_four_bit_config(config: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` is one of bitsandbytes in four bits."""
    return config.get("quant_method") == "bitsandbytes" and bool(
        config.get("load_in_4bit", config.get("_load_in_4bit"))
    )


def torch_name(dtype: DType) -> str:
    """Return torch's name of a type that weights are quantised from."""
    return {code: name for name, code in _DTYPES.items()}[dtype.code]
