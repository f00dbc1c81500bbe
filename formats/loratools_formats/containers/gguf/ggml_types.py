"""The element types of GGUF files, and their values as arrays.

Source: `enum ggml_type` and the block structs of ggml; a test compares with `GGML_QUANT_SIZES` of
gguf-py. Q8_0 has a file of its own here. Other quantised types are decoded and encoded by the
`gguf` package, which is imported only then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools_formats.core import dtypes
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import Buffer
from loratools_formats.disk.errors import MissingDependencyError, UnsupportedError

if TYPE_CHECKING:
    from loratools_formats.core.dtypes import Array


_CHUNK_ELEMENTS = 1 << 16  # more, and allocating temporaries costs more than computing them


@dataclass(frozen=True)
class GgmlType:
    """One element type.

    Attributes:
        code: number in the file.
        name: as ggml calls it.
        block: elements that are stored together; a row must be a multiple of it.
        block_nbytes: bytes of a block.
    """

    code: int
    name: str
    block: int
    block_nbytes: int

    @property
    def is_float(self) -> bool:
        """Whether elements are stored one by one as numbers."""
        return self.name in DTYPES

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape`, whose rows are whole blocks."""
        return math.prod(shape) // self.block * self.block_nbytes


_TABLE = (
    (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40),
    (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4),
    (27, "I64", 1, 8), (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
)  # fmt: skip

TYPES: dict[int, GgmlType] = {row[0]: GgmlType(*row) for row in _TABLE}
BY_NAME: dict[str, GgmlType] = {entry.name: entry for entry in TYPES.values()}


def decode(data: Buffer, kind: GgmlType, shape: tuple[int, ...]) -> Array:
    """Return the values of stored rows: in their own type if it is plain, else as float32.

    Raises:
        UnsupportedError: the `gguf` package cannot decode the type.
    """
    if kind.is_float:
        return dtypes.decode(data, DTYPES[kind.name], shape)
    import numpy as np

    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, kind.block_nbytes)
    if kind.name == "Q8_0":
        from loratools_formats.containers.gguf import q8_0

        return q8_0.decode(blocks).reshape(shape)
    gguf = package()
    code = gguf.GGMLQuantizationType(kind.code)
    values = np.empty((len(blocks), kind.block), np.float32)
    _in_pieces(gguf.quants.dequantize, blocks, code, values, f"{kind.name} cannot be decoded")
    return values.reshape(shape)


def _in_pieces(
    function: Callable[[Array, Any], Array], blocks: Array, code: Any, out: Array, failure: str
) -> None:
    """Fill `out` by a function of gguf-py, whose temporaries would be large for all blocks at once.

    It gets blocks as one row, since it takes rows sixteen at a time.
    """
    count = _CHUNK_ELEMENTS // max(blocks.shape[1], out.shape[1])
    try:
        for start in range(0, len(blocks), count):
            part = blocks[start : start + count]
            result = function(part.reshape(1, -1), code)
            out[start : start + len(part)] = result.reshape(len(part), -1)
    except NotImplementedError as error:  # what gguf-py raises for a type it has no code for
        raise UnsupportedError(f"values of type {failure}") from error


def encode(values: Array, kind: GgmlType) -> Array:
    """Return the stored bytes of values, as a flat array of bytes.

    Raises:
        UnsupportedError: the `gguf` package cannot encode the type.
    """
    import numpy as np

    if kind.is_float:
        return dtypes.encode(values, DTYPES[kind.name]).reshape(-1).view(np.uint8)
    blocks = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, kind.block)
    if kind.name == "Q8_0":
        from loratools_formats.containers.gguf import q8_0

        return q8_0.encode(blocks).reshape(-1)
    gguf = package()
    code = gguf.GGMLQuantizationType(kind.code)
    stored = np.empty((len(blocks), kind.block_nbytes), np.uint8)
    _in_pieces(gguf.quants.quantize, blocks, code, stored, f"{kind.name} cannot be encoded")
    return stored.reshape(-1)


def package() -> Any:
    """Return the `gguf` package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise MissingDependencyError(
            "the gguf package is needed for this", hint='pip install "loratools[gguf]"'
        ) from error
    return gguf
