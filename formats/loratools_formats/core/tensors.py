"""Tensors whose bytes stay where they are until asked for.

A `TensorRef` knows its shape and type; reading happens in `raw()`, `load()` or `torch()`. It never
caches: holding many of them costs nothing, and whoever loads one decides how long it lives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from loratools_formats.core import dtypes
from loratools_formats.core.dtypes import DTYPES, DType
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.disk.files import RegularFile

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from loratools_formats.core.dtypes import Array

Buffer = bytes | bytearray | memoryview

_COMPARED = 1 << 20  # elements of two tensors that are compared at a time


class ByteSource(Protocol):
    """Something with bytes at positions: an open file, or a scratch file."""

    def read_at(self, offset: int, nbytes: int) -> Buffer:
        """Return exactly `nbytes` bytes from `offset`."""


@dataclass(frozen=True, repr=False)
class TensorRef:
    """A tensor somewhere: a file, a scratch file, memory, or a view of another one.

    Attributes:
        key: name in the file it came from, for messages.
        dtype: element type as stored.
        shape: dimensions, row-major.
        read: returns the tensor's `nbytes` little-endian bytes.
        file: the file that holds it, where `offset` counts bytes from its start; None if the
            bytes are computed or held in memory.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[], Buffer] = field(repr=False, compare=False)
    file: ByteSource | None = field(default=None, repr=False, compare=False)
    offset: int = field(default=0, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"TensorRef({self.key!r}, {self.dtype.code}, {self.shape})"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        """Return the values, for `np.asarray(tensor)`; they are read anew each time."""
        if copy is False:
            raise ValueError("the values of a TensorRef are read, which copies them")
        return self.load(dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return self.numel * self.dtype.bits // 8

    def raw(self) -> Buffer:
        """Return the stored bytes, for bit-exact copies."""
        return self.read()

    def raw_range(self, start: int, stop: int) -> Buffer:
        """Return the stored bytes [start, stop), reading no others if they lie in a file.

        Raises:
            AdapterError: the tensor has fewer bytes.
        """
        if not 0 <= start <= stop <= self.nbytes:
            raise AdapterError(
                "bytes beyond the end of a tensor",
                tensor=self.key,
                got=f"{start} to {stop}",
                expected=f"within {self.nbytes}",
            )
        if self.file is None:
            return memoryview(self.read()).cast("B")[start:stop]
        return self.file.read_at(self.offset + start, stop - start)

    def load(self, dtype: DTypeLike | None = None) -> Array:
        """Return the values as an array of `shape`, in the stored type or converted to `dtype`.

        Raises:
            UnsupportedError: the stored type cannot be decoded.
        """
        array = dtypes.decode(self.read(), self.dtype, self.shape)
        return array if dtype is None else dtypes.converted(array, dtype)

    def elements(self, start: int, stop: int) -> Array:
        """Return elements [start, stop) of the flat tensor in the stored type, reading only them.

        Raises:
            UnsupportedError: the stored type is smaller than a byte, or cannot be decoded.
        """
        if self.dtype.bits < 8:
            raise UnsupportedError(
                "elements below a byte cannot be read apart", tensor=self.key, got=self.dtype.code
            )
        width = self.dtype.bits // 8
        data = self.raw_range(start * width, stop * width)
        return dtypes.decode(data, self.dtype, (stop - start,))

    def elements_into(self, start: int, out: Array) -> None:
        """Fill a contiguous array of the stored type with the elements from `start` on.

        Raises:
            UnsupportedError: the stored type is smaller than a byte, or cannot be decoded.
        """
        width = self.dtype.bits // 8
        if isinstance(self.file, RegularFile) and self.dtype.bits >= 8:
            view = memoryview(out.reshape(-1).view("u1").data)
            self.file.read_into(self.offset + start * width, view)
        else:
            out[...] = self.elements(start, start + out.size).reshape(out.shape)

    def torch(self) -> Any:
        """Return the values as a torch tensor of the stored type, with memory of its own."""
        return dtypes.to_torch(self.read(), self.dtype, self.shape)

    def renamed(self, key: str) -> TensorRef:
        """Return the tensor under another name."""
        return TensorRef(key, self.dtype, self.shape, self.read, self.file, self.offset)

    def reshaped(self, shape: tuple[int, ...]) -> TensorRef:
        """Return the bytes with another shape.

        Raises:
            AdapterError: the shapes hold different numbers of elements.
        """
        if math.prod(shape) != self.numel:
            raise AdapterError(
                "shape does not fit", tensor=self.key, got=list(self.shape), expected=list(shape)
            )
        return replace(self, shape=shape)

    def row_range(self, start: int, stop: int) -> TensorRef:
        """Return rows [start, stop) along the first axis, bit for bit.

        Only types of whole bytes have rows that can be told apart.
        """
        row = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        if self.file is not None:
            return in_file(self.key, self.dtype, shape, self.file, self.offset + start * row)
        return TensorRef(
            self.key, self.dtype, shape, lambda: memoryview(self.read())[start * row : stop * row]
        )

    def transposed(self, axes: tuple[int, ...]) -> TensorRef:
        """Return the tensor with its axes permuted, bit for bit; permuted when read.

        Only types of whole bytes can be permuted, which adapter factors are.
        """
        shape = tuple(self.shape[axis] for axis in axes)

        def read() -> Buffer:
            import numpy as np

            units = np.dtype(f"V{self.dtype.bits // 8}")
            stored = np.frombuffer(self.read(), dtype=units).reshape(self.shape)
            return np.ascontiguousarray(stored.transpose(axes)).tobytes()

        return TensorRef(self.key, self.dtype, shape, read)

    def matrix(self, index: int) -> TensorRef:
        """Return one matrix of a stack, which is read without the others.

        Args:
            index: along the first axis.
        """
        shape = self.shape[1:]
        nbytes = math.prod(shape) * self.dtype.bits // 8
        start = index * nbytes
        return TensorRef(
            self.key,
            self.dtype,
            shape,
            lambda: self.raw_range(start, start + nbytes),
            self.file,
            self.offset + start,
        )

    def rows(self, order: Sequence[int]) -> TensorRef:
        """Return the tensor with these rows of every matrix, in this order, bit for bit.

        Args:
            order: rows along the last axis but one; a row may be missing or listed twice.
        """
        *stack, _, width = self.shape

        def read() -> Buffer:
            import numpy as np

            stored = np.frombuffer(self.read(), dtype=np.uint8)
            matrices = stored.reshape(-1, self.shape[-2], width * self.dtype.bits // 8)
            return matrices[:, np.asarray(order, dtype=np.intp)].reshape(-1).data

        return TensorRef(self.key, self.dtype, (*stack, len(order), width), read)


def in_file(
    key: str, dtype: DType, shape: tuple[int, ...], file: ByteSource, offset: int
) -> TensorRef:
    """Return a reference to the tensor whose bytes start at `offset` in `file`."""
    nbytes = math.prod(shape) * dtype.bits // 8
    return TensorRef(key, dtype, shape, lambda: file.read_at(offset, nbytes), file, offset)


def have_same_bits(one: TensorRef, other: TensorRef) -> bool:
    """Return whether two tensors agree in type, shape and every stored bit; reads both."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and bytes(one.raw()) == bytes(other.raw())


def unmade(key: str, dtype: DType, shape: tuple[int, ...]) -> TensorRef:
    """Return a tensor that has name, type and shape, and no values; reading it is an error."""

    def read() -> Buffer:
        raise AssertionError(f"{key} is planned and has no values yet")

    return TensorRef(key, dtype, shape, read)


def rounded(tensor: TensorRef, dtype: DType) -> TensorRef:
    """Return the tensor in another floating-point type, converted when it is read."""
    if tensor.dtype == dtype:
        return tensor

    def read() -> Buffer:
        import numpy as np

        return dtypes.encode(tensor.load(), dtype).reshape(-1).view(np.uint8).data

    return TensorRef(tensor.key, dtype, tensor.shape, read)


def joined(key: str, tensors: Sequence[TensorRef], shape: tuple[int, ...]) -> TensorRef:
    """Return the bytes of tensors of one type, one behind the other, seen with a shape.

    Raises:
        AdapterError: their types differ, or they do not fill the shape.
    """
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype:
            raise AdapterError(
                "tensors to join differ in type",
                tensor=tensor.key,
                got=tensor.dtype.code,
                expected=first.dtype.code,
            )
    if sum(tensor.numel for tensor in tensors) != math.prod(shape):
        raise AdapterError("tensors to join do not fill the shape", tensor=key, expected=shape)
    return TensorRef(key, first.dtype, shape, lambda: b"".join(t.read() for t in tensors))


def in_memory(key: str, array: Array, code: str | None = None) -> TensorRef:
    """Return a reference to an array, rounded once to the type `code` if that differs.

    Args:
        key: its name.
        array: values; converted to little-endian and made contiguous.
        code: a safetensors type name; by default the one of the array's own type.

    Raises:
        AdapterError: the array's type has no safetensors name.
        UnsupportedError: elements of the type are smaller than a byte.
    """
    import numpy as np

    if code is None:
        code = next(
            (
                d.code
                for d in DTYPES.values()
                if d.numpy and d.numpy.split(":")[-1] == array.dtype.name
            ),
            array.dtype.name,
        )
    if code not in DTYPES:
        raise AdapterError("array type has no safetensors name", tensor=key, got=code)
    dtype = DTYPES[code]
    if dtype.bits < 8:
        raise UnsupportedError(
            "types below a byte can be copied but not made", tensor=key, got=code
        )
    stored = dtypes.encode(array, dtype)
    data = np.atleast_1d(stored).view(np.uint8).reshape(-1).data
    return TensorRef(key, dtype, tuple(array.shape), lambda: data)


def of_torch(key: str, tensor: Any) -> TensorRef:
    """Return a reference to a torch tensor, whose values are read from its device each time.

    Raises:
        AdapterError: the tensor's type has no safetensors name.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = next((d for d in DTYPES.values() if d.torch == name and d.bits >= 8), None)
    if dtype is None:
        raise AdapterError("tensor type has no safetensors name", tensor=key, got=name)

    def read() -> Buffer:
        import torch

        stored = tensor.detach().cpu().contiguous().reshape(-1)
        data: Buffer = stored.view(torch.uint8).numpy().data
        return data

    return TensorRef(key, dtype, tuple(tensor.shape), read)


def equal_values(one: TensorRef, other: TensorRef) -> bool:
    """Return whether two tensors hold the same numbers, whatever their types.

    Both are read a block at a time.
    """
    import numpy as np

    if one.shape != other.shape:
        return False
    for start in range(0, one.numel, _COMPARED):
        stop = min(start + _COMPARED, one.numel)
        first, second = one.elements(start, stop), other.elements(start, stop)
        if one.dtype == other.dtype and first.tobytes() == second.tobytes():
            continue
        if not np.array_equal(first.astype(np.float64), second.astype(np.float64)):
            return False
    return True
