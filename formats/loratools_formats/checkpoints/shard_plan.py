"""What a shard of a checkpoint will be, from names, types and shapes alone.

Every byte has its place before the first is written. A header is used again, byte for byte, where
the tensors have the names, types and shapes of the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loratools_formats.containers.safetensors_read import SafetensorsFile, header_of
from loratools_formats.containers.safetensors_write import check_names, header_bytes, in_file_order
from loratools_formats.core.dtypes import DType
from loratools_formats.core.tensors import Buffer, TensorRef
from loratools_formats.disk.errors import AdapterError


class Sink(Protocol):
    """The place of one tensor in the shard that is being written."""

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write bytes `offset` bytes into the tensor."""


@dataclass(frozen=True)
class Blank:
    """A tensor to be filled.

    Attributes:
        key: its name.
        dtype: element type.
        shape: dimensions.
        is_text: it is U8, its length is only known when it is written, and `shape` is the most it
            can be; it is written once, whole. Such tensors lie last in their shard.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    is_text: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes; of text, the most it can be."""
        nbytes = self.dtype.nbytes(self.shape)
        if nbytes is None:
            raise AdapterError(
                f"a tensor of {self.dtype.code} must fill whole bytes",
                tensor=self.key,
                got=list(self.shape),
            )
        return nbytes


@dataclass(frozen=True)
class Made:
    """Tensors that one function computes together, such as a weight and its scales.

    Attributes:
        blanks: the tensors.
        fill: writes every byte of each, given their sinks by key; called once, from any thread.
    """

    blanks: tuple[Blank, ...]
    fill: Callable[[Mapping[str, Sink]], None] = field(compare=False)


NewTensor = TensorRef | Made


def new_nbytes(part: NewTensor) -> int:
    """Return the size of a part of a shard in bytes; of text, the most it can be."""
    return part.nbytes if isinstance(part, TensorRef) else sum(b.nbytes for b in part.blanks)


@dataclass(frozen=True)
class Shard:
    """One file to write.

    Attributes:
        name: file name.
        parts: tensors copied bit for bit under the key of their reference, and made ones.
        template: a file whose header is used again if the tensors have the same names, types and
            shapes as there.
        metadata: for the header otherwise.
    """

    name: str
    parts: Sequence[NewTensor]
    template: SafetensorsFile | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def copied(self) -> Iterator[TensorRef]:
        """The tensors that are copied."""
        return (part for part in self.parts if isinstance(part, TensorRef))

    @property
    def blanks(self) -> Iterator[Blank]:
        """The tensors that are made."""
        return (b for part in self.parts if isinstance(part, Made) for b in part.blanks)

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes; with text, the most it can be."""
        return Layout(self).end


class Layout:
    """Where everything in a shard lies.

    Attributes:
        ordered: its tensors in the order of their bytes.
        header: to be written first, lengths of texts still unknown in it.
        offsets: where each tensor begins in the file, in bytes.
        texts: the tensors whose lengths become known when they are written.
        text_start: where the first of those begins.
        end: size of the file; with texts, the most it can be.
    """

    def __init__(self, shard: Shard) -> None:
        self._metadata = shard.metadata
        self.texts = sorted((b for b in shard.blanks if b.is_text), key=lambda b: b.key)
        fixed: list[TensorRef | Blank] = [*shard.copied]
        fixed += [blank for blank in shard.blanks if not blank.is_text]
        self.ordered = [*in_file_order(fixed), *self.texts]
        check_names(self.ordered)
        found = {t.key: (t.dtype, t.shape) for t in self.ordered}
        template = shard.template
        if template is not None and not self.texts and found == _signature(template):
            self.header = header_of(template)
            self.offsets = {key: ref.offset for key, ref in template.tensors.items()}
        else:
            self.header = header_bytes(self.ordered, self._metadata)
            self.offsets = {}
            position = len(self.header)
            for tensor in self.ordered:
                self.offsets[tensor.key] = position
                position += tensor.nbytes
        self.text_start = min((self.offsets[b.key] for b in self.texts), default=0)
        self.end = len(self.header) + sum(tensor.nbytes for tensor in self.ordered)

    def with_texts(
        self, texts: Mapping[str, bytes]
    ) -> tuple[bytes, bytes, list[TensorRef | Blank]]:
        """Return the header in the space kept for it, the texts, and all tensors as they are."""
        known = [
            Blank(t.key, t.dtype, (len(texts[t.key]),)) if t.key in texts else t
            for t in self.ordered
        ]
        header = header_bytes(known, self._metadata, nbytes=len(self.header))
        return header, b"".join(texts[blank.key] for blank in self.texts), known


def _signature(file: SafetensorsFile) -> dict[str, tuple[DType, tuple[int, ...]]]:
    return {key: (ref.dtype, ref.shape) for key, ref in file.tensors.items()}
