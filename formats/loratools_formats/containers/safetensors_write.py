"""Writing the safetensors container: streamed, reproducible, and read back before it appears.

It differs from the safetensors library by fixed bytes (sorted metadata and tensors), an fsync
before the rename, and the umask's permissions.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from loratools_formats.containers.safetensors_read import (
    DEFAULT_LIMITS,
    LENGTH_BYTES,
    METADATA,
    check_name,
)
from loratools_formats.core.dtypes import DTYPES, DType
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, OutputError
from loratools_formats.disk.publish import publish_file

_COPY_CHUNK_BYTES = 8 << 20


class Planned(Protocol):
    """A tensor to be written, as far as a header tells: a `TensorRef`, or one yet to be made."""

    @property
    def key(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> DType:
        """Element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


P = TypeVar("P", bound=Planned)


def in_file_order(tensors: Iterable[P]) -> list[P]:
    """Order as the safetensors library does: wide types first, which aligns them, then names.

    Types of one width come in the order of the library's own list, from its end. Digests of the
    tensors that other tools compute after writing them again depend on it.
    """
    return sorted(tensors, key=lambda tensor: (*_LIBRARY_ORDER[tensor.dtype.code], tensor.key))


_LIBRARY_ORDER = {
    code: (-DTYPES[code].bits, place)
    for place, code in enumerate((
        "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
        "F8_E8M0", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8",
        "F6_E3M2", "F6_E2M3", "F4", "BOOL",
    ))
}  # fmt: skip


def header_bytes(
    ordered: Sequence[Planned], metadata: Mapping[str, str], nbytes: int | None = None
) -> bytes:
    """Return a header for tensors that lie one after another, the length in front included.

    Args:
        ordered: the tensors, in the order of their bytes.
        metadata: string metadata.
        nbytes: length to pad to with spaces; the next multiple of 8 by default.

    Raises:
        AdapterError: a name cannot be encoded.
    """
    header: dict[str, Any] = {}
    if metadata:
        header[METADATA] = dict(sorted(metadata.items()))
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        header[tensor.key] = {
            "dtype": tensor.dtype.code,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise AdapterError("names or metadata hold lone surrogates") from error
    length = -(-len(text) // 8) * 8 if nbytes is None else nbytes - LENGTH_BYTES
    return struct.pack("<Q", length) + text.ljust(length)


def safetensors_nbytes(tensors: Iterable[TensorRef], metadata: Mapping[str, str]) -> int:
    """Return the exact size of the file that `write_safetensors` would make."""
    ordered = in_file_order(tensors)
    return len(header_bytes(ordered, metadata)) + sum(tensor.nbytes for tensor in ordered)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Iterable[TensorRef],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write tensors one after another, each read only when its turn comes.

    The same tensors and metadata give the same bytes. Before the file appears under its name it is
    flushed and its header is compared with what the `safetensors` library reads from it.

    Raises:
        AdapterError: a tensor has no possible name, a name that differs from another only in case,
            or not the bytes that its shape and type ask for.
        OutputExistsError: `path` exists and `overwrite` is false.
        OutputError: writing failed; nothing was changed.
    """
    ordered = in_file_order(tensors)
    check_names(ordered)
    header = header_bytes(ordered, metadata)
    with publish_file(path, overwrite=overwrite) as temporary:
        with open(temporary, "xb", buffering=0) as out:
            write_all(out.fileno(), header)
            for tensor in ordered:
                _copy(tensor, out.fileno())
        check_written(temporary, ordered)


def check_names(ordered: Sequence[Planned]) -> None:
    """Raise `AdapterError` if a name is impossible, or differs from another only in case."""
    seen: dict[str, str] = {}
    for tensor in ordered:
        check_name(tensor.key, None, DEFAULT_LIMITS)
        if tensor.key == METADATA:
            raise AdapterError("name is reserved for metadata", tensor=tensor.key)
        if tensor.dtype.nbytes(tensor.shape) is None:
            raise AdapterError(
                f"a tensor of {tensor.dtype.code} must fill whole bytes",
                tensor=tensor.key,
                got=list(tensor.shape),
            )
        folded = tensor.key.casefold()
        if folded in seen:
            raise AdapterError(
                "two tensors to write have names that differ at most by case",
                tensor=tensor.key,
                got=seen[folded],
            )
        seen[folded] = tensor.key


def _copy(tensor: TensorRef, out: int) -> None:
    if tensor.file is None:
        data = memoryview(tensor.raw())
        if data.nbytes != tensor.nbytes:
            raise AdapterError(
                "tensor has other bytes than its shape and type ask for",
                tensor=tensor.key,
                got=data.nbytes,
                expected=tensor.nbytes,
            )
        write_all(out, data)
        return
    for done in range(0, tensor.nbytes, _COPY_CHUNK_BYTES):
        count = min(_COPY_CHUNK_BYTES, tensor.nbytes - done)
        write_all(out, tensor.file.read_at(tensor.offset + done, count))


def write_all(out: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data` at the descriptor's position."""
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def check_written(path: Path, ordered: Sequence[Planned]) -> None:
    """Compare names, types and shapes with what the safetensors library finds in the file."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise OutputError(f"written file cannot be read back: {error}", path=path) from error
    with opened as written:
        found = set(written.keys())
        for tensor in ordered:
            if tensor.key not in found:
                raise OutputError("written file lost a tensor", path=path, tensor=tensor.key)
            part = written.get_slice(tensor.key)
            got = (part.get_dtype(), tuple(part.get_shape()))
            if got != (tensor.dtype.code, tensor.shape):
                raise OutputError(
                    "written file reads back differently",
                    path=path,
                    tensor=tensor.key,
                    got=got,
                    expected=(tensor.dtype.code, tensor.shape),
                )
    if len(found) != len(ordered):
        raise OutputError("written file has extra tensors", path=path)
