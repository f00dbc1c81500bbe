"""What a format of quantised weights must declare, and how any range of a weight is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np

from loratools_formats.checkpoints.shard_plan import Blank, Sink
from loratools_formats.core.dtypes import Array, DType, encode
from loratools_formats.core.tensors import Buffer, TensorRef, in_file

CHUNK = 1 << 19  # elements asked for at a time
_PIECE = 1 << 17  # elements computed at a time, which stay in a core's cache
_KEPT = 4 << 20  # bytes of a block that is freed once
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Keys of a configuration for the type that the model computes in, the newer first."""


@dataclass(frozen=True)
class Stored:
    """What a codec looks at.

    Attributes:
        tensors: those that no other codec has claimed.
        config: the model's configuration.
        stated: what the configuration, or a file beside it, says of quantisation; empty if nothing.
        metadata: that of the files, together.
    """

    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    stated: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """The type that the model computes in, BF16 unless its configuration says F16.

        Configurations of models of several parts may say it of the parts alone.
        """
        parts = [part for part in self.config.values() if isinstance(part, Mapping)]
        stated = next(filter(None, map(_stated_dtype, (self.config, *parts))), None)
        return "F16" if stated == "float16" else "BF16"

    def without(self, keys: Iterable[str]) -> Stored:
        """Return the same but for some tensors."""
        taken = set(keys)
        if not taken:
            return self
        return replace(self, tensors={k: t for k, t in self.tensors.items() if k not in taken})

    def named(self, leaf: str) -> dict[str, TensorRef]:
        """Return the tensors whose names end in `leaf`, by the rest of the name."""
        return {k.removesuffix(leaf): t for k, t in self.tensors.items() if k.endswith(leaf)}


def _stated_dtype(config: Mapping[str, Any]) -> object:
    return next((config[key] for key in DTYPE_KEYS if config.get(key)), None)


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantised.

    Attributes:
        name: of the format and its variant.
        bits: of a code.
        group: values that share a scale, along the inputs; None if the scheme has no such number.
    """

    name: str
    bits: int
    group: int | None = None

    @property
    def short(self) -> str:
        """Name and bits in a few letters, for tables."""
        told = any(letter.isdigit() for letter in self.name)
        return self.name if told else f"{self.name} {self.bits}"

    def __str__(self) -> str:
        group = "" if self.group is None else f", groups of {self.group}"
        return f"{self.name}, {self.bits} bits{group}"


class CodedWeight(ABC):
    """One quantised weight: which tensors hold it, and its values.

    Attributes:
        key: name of the plain weight.
        shape: of the plain weight, the last dimension being the one that rows run along.
        dtype: type of the values, which loaders round to.
        parts: all tensors that make it up, the codes first.
        scheme: how it is quantised.
        caveat: what to know when something is added to it; empty if nothing.
        caveat_written: what to know when its codes are written anew; empty if nothing.
        together: rows that are read from the same bytes; fewer take as long.
        is_four_bit_format: whether it is what `quantize` makes of weights, which leaves it alone.
    """

    caveat: str = ""
    caveat_written: str = ""
    is_four_bit_format: ClassVar[bool] = False
    together: ClassVar[int] = 1

    def __init__(
        self,
        key: str,
        shape: tuple[int, ...],
        dtype: DType,
        parts: Iterable[TensorRef],
        scheme: Scheme,
    ) -> None:
        self.key = key
        self.shape = shape
        self.dtype = dtype
        self.parts = tuple(parts)
        self.scheme = scheme

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors together."""
        return sum(part.nbytes for part in self.parts)

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the weight as a matrix (rows, shape[-1]).

        The values are those of `dtype`, in it or in float32.
        """

    def elements(self, start: int, stop: int) -> Array:
        """Return elements [start, stop) of the flat weight in `dtype`, computed in pieces."""
        return self._elements_as(start, stop, self.dtype)

    def elements_to(self, start: int, stop: int, dtype: DType) -> Array:
        """Return elements [start, stop) of the flat weight, rounded to a type to store them in."""
        if self.dtype.code != "F32" or type(self).elements is not CodedWeight.elements:
            return encode(self.elements(start, stop), dtype)
        return self._elements_as(start, stop, dtype)

    def _elements_as(self, start: int, stop: int, dtype: DType) -> Array:
        width = max(self.shape[-1], 1)
        step = self.together
        height = max(_PIECE // width // step, 1) * step
        out = np.empty(stop - start, dtype.numpy_dtype())
        at = start
        while at < stop:
            first = at // width
            last = min(first // step * step + height, -(-stop // width))
            end = min(stop, last * width)
            values = self.rows(first, last).reshape(-1)[at - first * width : end - first * width]
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                np.copyto(out[at - start : end - start], values, casting="unsafe")
            at = end
        return out

    def exact(self, start: int, stop: int) -> Array:
        """Return elements [start, stop) in float32, before they are rounded to a type of storage.

        They are those of `dtype` where the format's loaders compute in that.
        """
        return self.elements(start, stop).astype(np.float32)

    def encoder(self) -> Encoder | WholeEncoder | None:
        """Return what stores new values as this weight is stored; None if it is only read."""
        return None

    def encoder_in(self, bits: int) -> Encoder | None:
        """Return what stores new values in so many bits; None if the format has no such entry."""
        del bits
        return None

    def config_in(
        self, config: Mapping[str, Any], modules: Collection[str], bits: int
    ) -> Mapping[str, Any]:
        """Return a configuration with which loaders take some modules as of so many bits.

        Only called where `encoder_in` gives an encoder.
        """
        del modules, bits
        return config

    def config_beside(
        self, config: Mapping[str, Any], modules: Collection[str]
    ) -> Mapping[str, Any] | None:
        """Return a configuration with which loaders take some modules as plain, others as coded.

        Args:
            config: of the quantised checkpoint.
            modules: paths of the modules that are plain now.

        Returns:
            None if the format's loaders want all or nothing.
        """
        del config, modules
        return None

    def tensor(self, dtype: DType | None = None) -> TensorRef:
        """Return the weight as a plain tensor that is computed when it is read.

        Args:
            dtype: type to round the values to; their own by default.
        """
        dtype = dtype or self.dtype
        _keep_freed_memory()
        return in_file(self.key, dtype, self.shape, _Source(self, dtype), 0)


@dataclass(frozen=True)
class Encoded:
    """Rows of a weight as they are to be stored.

    Attributes:
        values: F32 (rows, width), what loaders make of them.
        pieces: stored bytes, each with its tensor's key and the place of its first byte there.
    """

    values: Array
    pieces: Iterable[tuple[str, int, Array]]


class Encoder(ABC):
    """How new values of one weight are stored.

    Attributes:
        blanks: the tensors that are computed anew, the codes first; other parts stay as they are.
        scheme: of what is stored.
        step: rows that are encoded together.
    """

    step: int = 1

    def __init__(self, blanks: Iterable[Blank], scheme: Scheme) -> None:
        self.blanks = tuple(blanks)
        self.scheme = scheme

    @abstractmethod
    def encode(self, start: int, values: Array) -> Encoded:
        """Return rows from `start` on in the format.

        Args:
            start: number of the first row, a multiple of `step`.
            values: F32 (rows, width), whole steps unless they are the last of a matrix.
        """


class WholeEncoder(ABC):
    """How all new values of one weight are stored, where scales depend on all of them.

    Attributes:
        blanks: the tensors that are computed anew; other parts of the weight stay as they are.
        scheme: of what is stored.
    """

    def __init__(self, blanks: Iterable[Blank], scheme: Scheme) -> None:
        self.blanks = tuple(blanks)
        self.scheme = scheme

    @abstractmethod
    def write(self, sinks: Mapping[str, Sink], values: Iterable[Array]) -> CodedWeight:
        """Write all tensors, and return the weight as it is stored now.

        Args:
            sinks: where, by the keys of `blanks`.
            values: F32, those of the weight in the order of its elements.

        Raises:
            AdapterError: NaN or infinite values.
        """


class CodesOnly(Encoder):
    """New codes with the scales that are there: all other parts of the weight stay.

    Args:
        codes: the stored codes.
        scheme: of the weight.
        encode: does what `Encoder.encode` says.
        step: rows that are encoded together.
    """

    def __init__(
        self,
        codes: TensorRef,
        scheme: Scheme,
        encode: Callable[[int, Array], Encoded],
        step: int = 1,
    ) -> None:
        super().__init__((blank_like(codes),), scheme)
        self._encode = encode
        self.step = step

    def encode(self, start: int, values: Array) -> Encoded:
        """Return rows from `start` on in the format."""
        return self._encode(start, values)


def blank_like(tensor: TensorRef) -> Blank:
    """Return a tensor to be filled, of the name, type and shape of a stored one."""
    return Blank(tensor.key, tensor.dtype, tensor.shape)


def row_piece(tensor: TensorRef | Blank, start: int, data: Array) -> tuple[str, int, Array]:
    """Return bytes of rows from `start` on, which lie one behind the other.

    Args:
        tensor: the tensor.
        start: number of the first row.
        data: (rows, …) of any type; its bytes are those to be stored.
    """
    stored = np.ascontiguousarray(data).reshape(len(data), -1).view(np.uint8)
    return tensor.key, start * stored.shape[1], stored


def stripes(
    tensor: TensorRef | Blank, width: int, at: int, data: Array, first: int = 0
) -> Iterable[tuple[str, int, Array]]:
    """Yield bytes of columns, which lie apart: one piece for each stored row.

    Args:
        tensor: the tensor.
        width: bytes of a stored row.
        at: byte of each row that the data begins at.
        data: U8 (rows, bytes).
        first: number of the first stored row.
    """
    data = np.ascontiguousarray(data)
    for row, values in enumerate(data, first):
        yield tensor.key, row * width + at, values


@cache
def _keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, to be used for the next piece.

    glibc learns from the largest block that was freed so far. Below that it would give each piece
    back to the system, and new pages take longer than the values that are put there: decoding was
    measured 2 to 2.7 times as fast with this.
    """
    np.empty(_KEPT, np.uint8)


class _Source:
    """Bytes of a plain tensor that are computed when they are read."""

    def __init__(self, weight: CodedWeight, dtype: DType) -> None:
        self._weight = weight
        self._dtype = dtype

    def read_at(self, offset: int, nbytes: int) -> Buffer:
        """Return exactly `nbytes` bytes from `offset`, both whole elements."""
        width = self._dtype.bits // 8
        values = self._weight.elements_to(offset // width, (offset + nbytes) // width, self._dtype)
        return memoryview(values.view(np.uint8).reshape(-1).data)


@dataclass(frozen=True)
class Codec:
    """A format of quantised weights.

    Attributes:
        name: for people.
        methods: what configurations call it in `quant_method`.
        declare: returns the weights of a checkpoint that are in this format, by plain name. Raises
            AdapterError if tensors contradict each other, and UnsupportedError for a variant whose
            values are not known; leaves alone what is not its own.
        without_marks: returns a file's metadata without what it says of weights that are plain now;
            None if the format says nothing there.
        keeps_conv1d: whether `declare` returns weights of transformers' Conv1D as the model holds
            them, (in, out); else as linear layers do.
    """

    name: str
    methods: tuple[str, ...]
    declare: Callable[[Stored], dict[str, CodedWeight]]
    without_marks: Callable[[Mapping[str, str], Collection[str]], dict[str, str]] | None = None
    keeps_conv1d: bool = False
