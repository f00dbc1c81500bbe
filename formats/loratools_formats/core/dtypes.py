"""The element types of safetensors, and how each becomes a NumPy array or a torch tensor.

Source: the `Dtype` enum of the safetensors crate, version 0.8. NumPy has no bfloat16 or 8-bit
floats; `ml_dtypes` supplies them and is imported only when one is met.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools_formats.core import half
from loratools_formats.disk.errors import MissingDependencyError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

    Array = NDArray[Any]
else:
    Array = Any  # NumPy is imported by whoever has an array


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        code: the name in a safetensors header.
        bits: size of one element in bits.
        numpy: name of the NumPy type, looked up in `ml_dtypes` when prefixed by `ml:`;
            None where the packing of sub-byte elements is not specified.
        torch: name of the torch type, None where torch has none.
        floating: whether it can hold adapter factors: of whole bytes, and real.
    """

    code: str
    bits: int
    numpy: str | None
    torch: str | None
    floating: bool = False

    def nbytes(self, shape: tuple[int, ...]) -> int | None:
        """Bytes of a tensor of `shape`, None if its elements do not fill whole bytes."""
        bits = math.prod(shape) * self.bits
        return None if bits % 8 else bits // 8

    def numpy_dtype(self) -> np.dtype[Any]:
        """Return the NumPy type.

        Raises:
            UnsupportedError: there is no defined way to unpack this type.
        """
        import numpy as np

        if self.numpy is None:
            raise UnsupportedError(
                f"dtype {self.code} can be copied but not decoded: its packing is not specified"
            )
        if self.numpy.startswith("ml:"):
            import ml_dtypes

            extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.numpy[3:]))
            return extended
        little_endian: np.dtype[Any] = np.dtype(self.numpy).newbyteorder("<")
        return little_endian


_TABLE = (
    DType("BOOL", 8, "bool", "bool"),
    DType("U8", 8, "uint8", "uint8"),
    DType("I8", 8, "int8", "int8"),
    DType("I16", 16, "int16", "int16"),
    DType("U16", 16, "uint16", "uint16"),
    DType("I32", 32, "int32", "int32"),
    DType("U32", 32, "uint32", "uint32"),
    DType("I64", 64, "int64", "int64"),
    DType("U64", 64, "uint64", "uint64"),
    DType("F16", 16, "float16", "float16", floating=True),
    DType("BF16", 16, "ml:bfloat16", "bfloat16", floating=True),
    DType("F32", 32, "float32", "float32", floating=True),
    DType("F64", 64, "float64", "float64", floating=True),
    DType("C64", 64, "complex64", "complex64"),
    DType("F8_E4M3", 8, "ml:float8_e4m3fn", "float8_e4m3fn", floating=True),
    DType("F8_E5M2", 8, "ml:float8_e5m2", "float8_e5m2", floating=True),
    DType("F8_E8M0", 8, "ml:float8_e8m0fnu", "float8_e8m0fnu", floating=True),
    DType("F8_E4M3FNUZ", 8, "ml:float8_e4m3fnuz", "float8_e4m3fnuz", floating=True),
    DType("F8_E5M2FNUZ", 8, "ml:float8_e5m2fnuz", "float8_e5m2fnuz", floating=True),
    DType("F4", 4, "ml:float4_e2m1fn", "float4_e2m1fn_x2"),
    DType("F6_E2M3", 6, None, None),
    DType("F6_E3M2", 6, None, None),
)

DTYPES: dict[str, DType] = {entry.code: entry for entry in _TABLE}

OF_MODELS = ("F32", "F16", "BF16")
"""Types that models compute in: those of plain weights, and of the scales of quantised ones."""
FLOATING = ("F64", *OF_MODELS)
"""Types that weights are added up in and stored in without a scale."""


@dataclass(frozen=True)
class Spacing:
    """How far numbers of a type are apart.

    Attributes:
        relative: distance of neighbours just above a power of two, over that power.
        smallest: distance of neighbours next to zero.
    """

    relative: float
    smallest: float


SPACINGS = {
    "F64": Spacing(2.0**-52, 2.0**-1074),
    "F32": Spacing(2.0**-23, 2.0**-149),
    "F16": Spacing(2.0**-10, 2.0**-24),
    "BF16": Spacing(2.0**-7, 2.0**-133),
}


_LONG_RANGE = ("BF16", "F32", "F64")


def is_power_of_two(number: float) -> bool:
    """Return whether multiplying by a number is exact, as long as nothing over- or underflows.

    >>> is_power_of_two(-0.25), is_power_of_two(3.0), is_power_of_two(0.0)
    (True, False, False)
    """
    return abs(math.frexp(number)[0]) == 0.5


def common_dtype(dtypes: Sequence[DType]) -> DType:
    """Return a type that holds every value of all."""
    codes = {dtype.code for dtype in dtypes}
    if len(codes) == 1:
        return dtypes[0]
    return DTYPES["F64" if "F64" in codes else "F32"]


def dtype_of_multiples(dtype: DType, ratios: Iterable[float]) -> DType:
    """Return a type for values of `dtype` times each ratio: the same, unless that may round.

    Powers of two round nothing in types of float32's range. That of float16 is so short that
    factors have values at its ends, where bits are lost.
    """
    found = [ratio for ratio in ratios if ratio != 1.0]
    if not found or (dtype.code in _LONG_RANGE and all(map(is_power_of_two, found))):
        return dtype
    return common_dtype([dtype, DTYPES["F64" if _UNROUNDED.get() else "F32"]])


_UNROUNDED = ContextVar("_UNROUNDED", default=False)


@contextlib.contextmanager
def unrounded_multiples() -> Iterator[None]:
    """Let `dtype_of_multiples` take float64 in place of float32, which rounds.

    What is made so is what errors of the narrower one are measured against.
    """
    before = _UNROUNDED.set(True)
    try:
        yield
    finally:
        _UNROUNDED.reset(before)


def decode(data: bytes | bytearray | memoryview, dtype: DType, shape: tuple[int, ...]) -> Array:
    """View little-endian bytes as an array of `shape` in the stored type.

    Nothing is copied, except for F4, whose pairs are unpacked low half first, as torch packs them.
    """
    import numpy as np

    stored = dtype.numpy_dtype()
    if dtype.bits == 4:
        pairs = np.frombuffer(data, dtype=np.uint8)
        return np.stack([pairs & 15, pairs >> 4], axis=-1).view(stored).reshape(shape)
    return np.frombuffer(data, dtype=stored).reshape(shape)


def converted(array: Array, dtype: DTypeLike) -> Array:
    """Convert to a NumPy type in silence: overflow gives infinities, and any NaN stays one."""
    import numpy as np

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        convert = _half_conversion(array, np.dtype(dtype))
        if convert is None:
            return array.astype(dtype, copy=False)
        out = np.empty(array.shape, dtype)
        convert(array.reshape(-1), out.reshape(-1))
        return out


def encode(array: Array, dtype: DType) -> Array:
    """Round `array` to `dtype` (to nearest, ties to even) and make it contiguous.

    It is rounded once, except from float64 to bfloat16, which goes through float32 and may take
    the other neighbour for values within 2^-24 of a tie, eight in a million.
    """
    import numpy as np

    return np.ascontiguousarray(converted(array, dtype.numpy_dtype()))


def round_into(values: Array, out: Array) -> None:
    """Put contiguous values into `out`, rounded once and to nearest, from float64 to bfloat16 too.

    Conversion by way of float32 would round twice; it is rounded to odd on the way.
    """
    import numpy as np

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if values.dtype == np.float64 and out.dtype.name == "bfloat16":
            values = rounded_to_odd(values)
        convert = _half_conversion(values, out.dtype)
        if convert is None:
            np.copyto(out, values, casting="unsafe")
        else:
            convert(values.reshape(-1), out.reshape(-1))


def _half_conversion(values: Array, dtype: np.dtype[Any]) -> Callable[[Array, Array], None] | None:
    """Return the fast way between float16 and float32; None if it is not for these values."""
    if values.size < half.LEAST_ELEMENTS or not values.flags.c_contiguous:
        return None
    if not (values.dtype.isnative and dtype.isnative):
        return None
    ways = {("e", "f"): half.widen, ("f", "e"): half.narrow}
    return ways.get((values.dtype.char, dtype.char))


def rounded_to_odd(values: Array) -> Array:
    """Return float64 values in float32, whose last bit is odd where something was cut off.

    Rounding that to a shorter type is rounding the exact value once (Boldo and Melquiond 2008,
    doi 10.1109/TC.2007.70819).
    """
    import numpy as np

    narrow = values.astype(np.float32)
    bits = narrow.view(np.int32)
    even = np.nonzero((narrow != values) & (bits & 1 == 0) & np.isfinite(narrow))
    bits[even] += np.where(np.abs(values[even]) > np.abs(narrow[even]), 1, -1).astype(np.int32)
    return narrow


def to_torch(data: bytes | bytearray | memoryview, dtype: DType, shape: tuple[int, ...]) -> Any:
    """Hand bytes over as a torch tensor of the stored type, over a buffer of its own.

    F4 becomes torch's pair type: its last axis is half as long, as in the safetensors library.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "torch is needed to hand out torch tensors", hint="pip install torch"
        ) from error

    if dtype.torch is None:
        raise UnsupportedError(f"torch has no type for dtype {dtype.code}")
    if dtype.bits == 4:
        if not shape or shape[-1] % 2:
            raise UnsupportedError(
                "torch holds F4 in pairs along the last axis",
                got=list(shape),
                expected="an even one",
            )
        shape = (*shape[:-1], shape[-1] // 2)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=getattr(torch, dtype.torch))
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype.torch)).reshape(shape)
