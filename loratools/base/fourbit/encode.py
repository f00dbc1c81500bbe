"""Values to four-bit codes, in pieces, with the error that results.

The codes are bitsandbytes': a full block is multiplied by the reciprocal of its largest magnitude,
an incomplete last one is divided by it, and a value at the middle between two levels takes the
lower. The error is measured, not estimated: each value is compared with the one its code stands
for, and what quantising the scales adds is worked out from sums kept for each block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratools.base.fourbit.scales import SMALLEST, NestedScales, nest, unnest
from loratools.base.fourbit.tables import (
    CELLS_PER_UNIT,
    F32,
    HAS_THRESHOLD,
    U8,
    FourBit,
    four_bit,
)
from loratools.work.declared import option
from loratools_formats.checkpoints.bitsandbytes import BLOCKSIZES, QuantType
from loratools_formats.core.dtypes import round_into
from loratools_formats.disk.errors import AdapterError, OptionError

# Elements at a time: the buffers fit the processor's cache, and two threads seldom wait for each
# other; half as many and twice as many were both measured slower.
CHUNK = 1 << 18


@dataclass(frozen=True)
class FourBitOptions:
    """How weights are quantised.

    Attributes:
        quant_type: the four-bit type.
        blocksize: elements that share a scale: a power of two from 32 to 4096.
        double_quant: also quantise the scales.

    Raises:
        OptionError: no such blocksize.
    """

    quant_type: QuantType = option("nf4", heading="Computing")
    blocksize: int = option(64, heading="Computing")
    double_quant: bool = option(True, heading="Computing")

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise OptionError(
                "no such blocksize",
                got=self.blocksize,
                expected=f"one of {', '.join(map(str, BLOCKSIZES))}",
            )


@dataclass(frozen=True)
class QuantisationLoss:
    """What quantising did to a tensor.

    Attributes:
        squared_error: ‖W − W'‖²_F, where W' is what the stored codes and scales give in float32.
        squared_norm: ‖W‖²_F.
    """

    squared_error: float
    squared_norm: float

    @property
    def relative(self) -> float:
        """‖W − W'‖/‖W‖; 0 for a zero weight that stays zero."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass(frozen=True)
class Scales:
    """The scales and the error of a tensor, known when all its codes are written.

    Attributes:
        absmax: (blocks,) float32 scales.
        nested: the same quantised, if asked for.
        loss: what was lost.
    """

    absmax: F32
    nested: NestedScales | None
    loss: QuantisationLoss


class StreamingQuantizer:
    """Quantise one tensor whose values arrive in order, in pieces of any length.

    Args:
        name: of the tensor, for messages.
        numel: number of elements that will come.
        options: how.

    `push` yields packed codes to be written one after another; `finish` returns the rest. An
    object belongs to one thread and may be used for one tensor.
    """

    def __init__(self, name: str, numel: int, options: FourBitOptions) -> None:
        self._name = name
        self._numel = numel
        self._options = options
        self._blocks = _BlockEncoder(four_bit(options.quant_type), options.blocksize)
        count = -(-numel // options.blocksize)
        self._absmax: F32 = np.empty(count, np.float32)
        # Σr·c and Σc² of each block, which the error of quantised scales is made of.
        self._sums = np.empty((count if options.double_quant else 0, 2), np.float32)
        self._error = self._norm = 0.0
        self._done = 0
        self._pending: F32 = np.empty(0, np.float32)

    def push(self, values: NDArray[Any]) -> Iterator[U8]:
        """Take the next values, and yield the packed codes that are ready.

        Yielded arrays are overwritten later. The values must not change until all are consumed.

        Args:
            values: any shape, flattened in row-major order; float32 or smaller.

        Raises:
            AdapterError: NaN or infinite values, or more than `numel` of them.
        """
        flat = values.reshape(-1)
        if self._done + self._pending.size + flat.size > self._numel:
            raise AdapterError(
                "more values than the tensor has", tensor=self._name, expected=self._numel
            )
        if self._pending.size:
            count = min(CHUNK - self._pending.size, flat.size)
            self._pending = np.concatenate([self._pending, flat[:count].astype(np.float32)])
            flat = flat[count:]
            if self._pending.size < CHUNK and not self._is_end(self._pending.size):
                return
            chunk, self._pending = self._pending, np.empty(0, np.float32)
            yield self._encoded(chunk)
        while flat.size and (flat.size >= CHUNK or self._is_end(flat.size)):
            yield self._encoded(flat[:CHUNK])
            flat = flat[CHUNK:]
        self._pending = flat.astype(np.float32)

    def _is_end(self, size: int) -> bool:
        return self._done + size == self._numel

    def _encoded(self, values: NDArray[Any]) -> U8:
        first = self._done // self._options.blocksize
        count = -(-values.size // self._options.blocksize)
        absmax = self._absmax[first : first + count]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            packed = self._blocks.encode(values, absmax)
        if packed is None:
            raise AdapterError(
                "weight holds NaN or infinite values, which have no four-bit code",
                tensor=self._name,
            )
        rr, rc, cc = self._blocks.sums[:count].T
        squares = absmax.astype(np.float64) ** 2
        self._error += float(squares @ rr)
        self._norm += float(squares @ (rr + 2 * rc + cc))
        if self._options.double_quant:
            self._sums[first : first + count] = self._blocks.sums[:count, 1:]
        self._done += values.size
        return packed

    def finish(self) -> Scales:
        """Return the scales and the error, once all values were pushed.

        Raises:
            AdapterError: values are missing.
        """
        if self._done != self._numel:
            raise AdapterError(
                "fewer values than the tensor has",
                tensor=self._name,
                got=self._done + self._pending.size,
                expected=self._numel,
            )
        if not self._options.double_quant:
            return Scales(self._absmax, None, QuantisationLoss(self._error, self._norm))
        nested = nest(self._absmax)
        exact = self._absmax.astype(np.float64)
        moved = unnest(nested.codes, nested.absmax, nested.offset) - exact
        rc, cc = self._sums.T
        error = self._error + float(moved**2 @ cc) - 2 * float((exact * moved) @ rc)
        return Scales(self._absmax, nested, QuantisationLoss(max(0.0, error), self._norm))


class _BlockEncoder:
    """Buffers for one piece, and the passes over them.

    Attributes:
        sums: Σr², Σrc and Σc² of each block of the last piece, where c is the codebook's value and
            r = w/absmax − c.
    """

    def __init__(self, kind: FourBit, blocksize: int) -> None:
        self._kind = kind
        self._blocksize = blocksize
        self._values: F32 = np.empty(CHUNK, np.float32)
        self._unit: F32 = np.empty(CHUNK, np.float32)
        self._work: F32 = np.empty(CHUNK, np.float32)
        self._cell = np.empty(CHUNK, np.uint16)
        self._spare = np.empty(CHUNK, np.uint16)
        self._level: U8 = np.empty(CHUNK, np.uint8)
        self._pairs = np.empty(CHUNK // 2, np.uint64)
        self.sums = np.empty((CHUNK // blocksize + 1, 3), np.float64)

    def encode(self, piece: NDArray[Any], absmax: F32) -> U8 | None:
        """Encode a piece; returns its packed codes, None if a value is not finite.

        Args:
            piece: (n,) values; n is a multiple of the blocksize, except in the last piece.
            absmax: (blocks,) receives the scales to be stored.
        """
        n = piece.size
        full = n - n % self._blocksize
        values, unit = self._values[:n], self._unit[:n]
        round_into(piece, values)
        self._largest(piece, absmax)
        if not np.isfinite(absmax).all():
            return None
        inverse = np.float32(1) / np.maximum(absmax, SMALLEST)
        rows = values[:full].reshape(-1, self._blocksize)
        np.multiply(rows, inverse[: len(rows), None], out=unit[:full].reshape(rows.shape))
        if full < n:
            absmax[-1] = np.maximum(absmax[-1], SMALLEST)
            np.divide(values[full:], absmax[-1], out=unit[full:])
        packed = self._packed(self._levels(unit))
        self._add_up(unit, packed)
        return packed

    def _largest(self, piece: NDArray[Any], absmax: F32) -> None:
        """Fill in the largest magnitude of each block; infinite or NaN if a value is.

        The maximum of windows is doubled in width step by step over the whole piece: seven passes
        over contiguous memory are faster than many short reductions. Bits without the sign order
        numbers as their magnitudes do, so 16-bit types are compared as integers of half the size.
        """
        n, size = piece.size, self._blocksize
        if piece.dtype.itemsize == 2:
            bits = piece.view(np.uint16)
            magnitude = np.bitwise_and(bits, np.uint16(0x7FFF), out=self._cell[:n])
            other: NDArray[Any] = self._spare
        else:
            magnitude, other = np.abs(self._values[:n], out=self._work[:n]), self._unit
        found = np.empty(absmax.size, magnitude.dtype)
        full = n - n % size
        if full < n:
            found[-1] = magnitude[full:].max()
        count, width = full, 1
        while width < min(size, 64) and count:
            count -= width
            np.maximum(magnitude[:count], magnitude[width : width + count], out=other[:count])
            magnitude, other = other, magnitude
            width *= 2
        starts = magnitude[:full:width].reshape(-1, size // width)
        starts.max(axis=1, out=found[: full // size])
        absmax[:] = found.view(piece.dtype) if piece.dtype.itemsize == 2 else found

    def _levels(self, unit: F32) -> U8:
        n = unit.size
        kind, work, cell, level = self._kind, self._work[:n], self._cell[:n], self._level[:n]
        np.multiply(unit, np.float32(CELLS_PER_UNIT), out=work)
        np.add(work, np.float32(kind.shift), out=work)
        np.copyto(cell, work, casting="unsafe")
        # "wrap" skips a check and never wraps: there is a cell for every possible number.
        np.take(kind.cells, cell, out=level, mode="wrap")
        near = np.flatnonzero(level >= HAS_THRESHOLD)
        below = level[near] & (HAS_THRESHOLD - 1)
        level[near] = below + (unit[near] > kind.thresholds[below])
        return level

    def _packed(self, level: U8) -> U8:
        if level.size % 2:
            packed = self._packed_pairs(level[:-1])
            zero = self._kind.zero
            last = level[-1:] if self._kind.packed is None else self._kind.packed[level[-1:]] & 15
            return np.concatenate([packed, (last << 4 | zero).astype(np.uint8)])
        return self._packed_pairs(level)

    def _packed_pairs(self, level: U8) -> U8:
        """Join neighbours, the first into the high half."""
        both = level.view("<u2")
        packed = (both << 4 | both >> 8).astype(np.uint8)
        return (
            packed if self._kind.packed is None else np.take(self._kind.packed, packed, mode="wrap")
        )

    def _add_up(self, unit: F32, packed: U8) -> None:
        n = unit.size
        pairs = self._pairs[: packed.size]
        values = np.take(self._kind.pairs, packed, out=pairs, mode="wrap").view(np.float32)[:n]
        rest = np.subtract(unit, values, out=self._work[:n])
        full = n - n % self._blocksize
        shape = (-1, self._blocksize)
        r, c = rest[:full].reshape(shape), values[:full].reshape(shape)
        for column, (left, right) in enumerate(((r, r), (r, c), (c, c))):
            self.sums[: len(r), column] = np.vecdot(left, right)
        if full < n:
            r, c = rest[full:], values[full:]
            self.sums[full // self._blocksize] = np.dot(r, r), np.dot(r, c), np.dot(c, c)
