"""GGUF models to be changed: their tensors as plain ones, and the layout of a copy.

A quantised tensor reads as the float32 values it stands for, computed from the blocks that hold
the elements asked for. A copy has the same keys, byte for byte, and the same tensors in the same
order; some may be stored in another type. It is one file, so that it appears whole or not at all,
also where the model is split; then its keys about splitting are left out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from loratools_formats.containers.gguf.container import MAGIC, GgufTensor, read_gguf
from loratools_formats.containers.gguf.ggml_types import GgmlType, decode
from loratools_formats.containers.gguf.splits import SPLIT_KEYS, GgufModel
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import Buffer, TensorRef, in_file
from loratools_formats.disk.errors import OutputError
from loratools_formats.disk.files import write_at

_START_BYTES = 24


def decoded(tensor: GgufTensor) -> TensorRef:
    """Return a tensor as a floating one; quantised values are decoded when they are read."""
    if tensor.kind.is_float:
        dtype = DTYPES[tensor.kind.name]
        return in_file(tensor.name, dtype, tensor.shape, tensor.file, tensor.offset)
    return in_file(tensor.name, DTYPES["F32"], tensor.shape, _Decoded(tensor), 0)


@dataclass(frozen=True)
class _Decoded:
    """The bytes that a quantised tensor would have in float32."""

    tensor: GgufTensor

    def read_at(self, offset: int, nbytes: int) -> Buffer:
        """Return exactly `nbytes` bytes from `offset`, both whole elements."""
        import numpy as np

        kind = self.tensor.kind
        start, stop = offset // 4, (offset + nbytes) // 4
        first, last = start // kind.block, -(-stop // kind.block)
        stored = self.tensor.file.read_at(
            self.tensor.offset + first * kind.block_nbytes, (last - first) * kind.block_nbytes
        )
        values = decode(stored, kind, (last - first, kind.block)).reshape(-1)
        wanted = values[start - first * kind.block : stop - first * kind.block]
        return np.ascontiguousarray(wanted, dtype="<f4").view(np.uint8).data


class ModelLayout:
    """Where everything lies in a copy of a model.

    Args:
        base: the model.
        kinds: new types of some of its tensors.
    """

    def __init__(self, base: GgufModel, kinds: Mapping[str, GgmlType]) -> None:
        self.base = base
        self._keys = self._kept_keys()
        self._keys_end = _START_BYTES + sum(end - start for start, end in self._keys.values())
        self.kinds = {name: kinds.get(name, t.kind) for name, t in base.tensors.items()}
        self._infos, positions, end = self._tensor_infos()
        self.data_start = self._padded(self._keys_end + len(self._infos))
        self.offsets = {name: self.data_start + place for name, place in positions.items()}
        self.nbytes = self.data_start + end

    def _padded(self, position: int) -> int:
        alignment = self.base.first.alignment
        return -(-position // alignment) * alignment

    def _kept_keys(self) -> dict[str, tuple[int, int]]:
        """Return from where to where in the first part each key lies that is kept."""
        found, start = {}, _START_BYTES
        for key, entry in self.base.first.keys.items():
            if len(self.base.parts) == 1 or key not in SPLIT_KEYS:
                found[key] = start, entry.end
            start = entry.end
        return found

    def _tensor_infos(self) -> tuple[bytes, dict[str, int], int]:
        infos, positions, position = [], {}, 0
        for name, tensor in self.base.tensors.items():
            sizes = tuple(reversed(tensor.shape))
            text = name.encode()
            infos += [
                struct.pack("<Q", len(text)),
                text,
                struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes),
                struct.pack("<IQ", self.kinds[name].code, position),
            ]
            positions[name] = position
            position += self._padded(self.kinds[name].nbytes(tensor.shape))
        return b"".join(infos), positions, position

    def write_header(self, out: int) -> None:
        """Write all that comes before the tensors' data, and give the file its size."""
        first = self.base.first
        start = MAGIC + struct.pack("<IQQ", first.version, len(self.base.tensors), len(self._keys))
        os.ftruncate(out, self.nbytes)
        write_at(out, 0, memoryview(start))
        position = _START_BYTES
        for begin, end in self._keys.values():
            first.file.copy_at(begin, end - begin, out, position)
            position += end - begin
        write_at(out, position, memoryview(self._infos))

    def copy_tensor(self, name: str, out: int) -> None:
        """Copy a tensor that keeps its type."""
        tensor = self.base.tensors[name]
        tensor.file.copy_at(tensor.offset, tensor.nbytes, out, self.offsets[name])

    def check_written(self, path: str | os.PathLike[str]) -> None:
        """Raise `OutputError` if a written copy reads back differently."""
        written = read_gguf(path)
        found = {name: (t.kind, t.shape, t.offset) for name, t in written.tensors.items()}
        wanted = {
            name: (self.kinds[name], t.shape, self.offsets[name])
            for name, t in self.base.tensors.items()
        }
        if found != wanted or list(written.keys) != list(self._keys):
            raise OutputError("written file reads back differently", path=path)
