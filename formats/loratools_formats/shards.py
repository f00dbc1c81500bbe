"""Writing checkpoints shard by shard: many tensors, filled in parallel, none held whole.

A shard is planned from names, types and shapes alone, so every byte has its place before the
first is written. Tensors that stay as they are get copied inside the kernel; others are filled by a
function, block by block. What goes where does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loratools_formats.dtypes import DType
from loratools_formats.safetensors_io import SafetensorsFile
from loratools_formats.tensors import Buffer, TensorRef


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


@dataclass(frozen=True)
class Made:
    """Tensors that one function computes together, such as a weight and its scales.

    Attributes:
        blanks: the tensors.
        fill: writes every byte of each, given their sinks by key; called once, from any thread.
    """

    blanks: tuple[Blank, ...]
    fill: Callable[[Mapping[str, Sink]], None] = field(compare=False)


@dataclass(frozen=True)
class Shard:
    """One file to write.

    Attributes:
        name: file name.
        copied: tensors that are copied bit for bit, by the key of each reference.
        made: tensors that are computed.
        template: a file whose header is used again if the tensors have the same names, types and
            shapes as there.
        metadata: for the header otherwise.
    """

    name: str
    copied: Sequence[TensorRef]
    made: Sequence[Made]
    template: SafetensorsFile | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def write_shards(
    folder: Path,
    shards: Sequence[Shard],
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write all shards into an existing folder; tensors are the unit of parallel work.

    Args:
        folder: where; normally a temporary one that is published when all is done.
        shards: what.
        workers: threads.
        progress: called with (bytes done, bytes in all).

    Raises:
        OutputError: not enough space, found before the first byte is written where the system
            tells; or writing failed.
        AdapterError: a source file is truncated or changed, or names clash.
    """
    raise NotImplementedError
