"""The GGUF container: a bounded reader of headers.

Everything a file says about counts, lengths, offsets and types is checked as a Python integer
before anything is allocated, against the file's size and fixed limits. Vocabularies are stepped
over without becoming Python strings. Versions 2 and 3, little-endian; what llama.cpp would refuse
or crash on is refused here with one kind of error.
Source: docs/gguf.md of ggml, and gguf.cpp of llama.cpp b10605.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools_formats.containers.gguf.cursor import ARRAY, LAYOUTS, STRING, VALUE_TYPES, Cursor
from loratools_formats.containers.gguf.ggml_types import TYPES, GgmlType
from loratools_formats.core.tensors import Buffer
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile
from loratools_formats.disk.first_bytes import FETCH_AGAIN, refuse_other_file

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63

_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_KEY_BYTES = 1 << 10
_MAX_DIMENSIONS = 4
_MAX_LISTED_STRINGS = 1 << 22
_MAX_LOADED = 1 << 20
_MAX_ALIGNMENT = 1 << 20
_CHECKED_BYTES = 1 << 20
_VERSIONS = (2, 3)
_SMALLEST_KEY_BYTES = 8 + 1 + 4 + 1
_SMALLEST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class KeyValue:
    """One entry of the key/value table.

    Attributes:
        type: name of its type: u8 … f64, bool, string or array.
        value: a number, truth value or string. None for arrays and very long strings, which stay
            in the file until `load`.
        item: element type of an array, else empty.
        count: number of elements, 1 if it is no array.
        offset: where the value starts in the file; of an array, its first element.
        end: where it ends.
    """

    type: str
    value: Any
    item: str = ""
    count: int = 1
    offset: int = field(default=0, compare=False)
    end: int = field(default=0, compare=False)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its name, its row-major shape (the reverse of ggml's), and where it lies."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    file: RegularFile = field(repr=False, compare=False)
    offset: int = field(compare=False)

    @property
    def nbytes(self) -> int:
        """Size as stored."""
        return self.kind.nbytes(self.shape)

    def raw(self) -> Buffer:
        """Return the stored bytes."""
        return self.file.read_at(self.offset, self.nbytes)


@dataclass(frozen=True)
class GgufFile:
    """An open file: its keys and tensors in file order, and where its parts lie.

    Attributes:
        file: the descriptor.
        version: of the container, 2 or 3.
        keys: the key/value table.
        tensors: by name.
        alignment: of tensor data, in bytes.
        data_start: where tensor data starts.
    """

    file: RegularFile
    version: int
    keys: Mapping[str, KeyValue]
    tensors: Mapping[str, GgufTensor]
    alignment: int
    data_start: int

    def get(self, key: str, *types: str) -> Any:
        """Return the value of a key, None if it is absent.

        Args:
            key: its name.
            types: what its type must be among.

        Raises:
            AdapterError: it is of another type.
        """
        found = self.keys.get(key)
        if found is None:
            return None
        if found.type not in types:
            raise AdapterError(
                f"key {key} has the wrong type",
                path=self.file.path,
                got=found.type,
                expected=" or ".join(types),
            )
        return self.load(found)

    def load(self, entry: KeyValue) -> Any:
        """Return a value, reading it if it was left in the file.

        Raises:
            AdapterError: it is too long, or holds text that is no UTF-8.
        """
        if entry.value is not None:
            return entry.value
        cursor = Cursor(self.file, entry.offset)
        if entry.type == STRING:
            return cursor.text(entry.end - entry.offset, _MAX_LOADED << 6)
        if entry.count > _MAX_LOADED:
            raise AdapterError(
                "array is too long to be loaded", path=self.file.path, got=entry.count
            )
        if entry.item == STRING:
            return [cursor.string(_MAX_LOADED) for _ in range(entry.count)]
        return [cursor.scalar(entry.item) for _ in range(entry.count)]


def is_gguf(path: Path) -> bool:
    """Return whether a regular file starts as a GGUF file does; never raises."""
    if not os.path.isfile(path):
        return False
    try:
        file = RegularFile(path)
    except (AdapterError, OSError):
        return False
    try:
        return file.nbytes >= 8 and file.read_at(0, 4) == MAGIC
    except AdapterError:
        return False
    finally:
        file.close()


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read the header of a file and check all of it.

    Raises:
        MissingFileError: nothing is at `path`.
        AdapterError: not a regular file, not GGUF, malformed, or beyond the limits.
    """
    file = RegularFile(path)
    try:
        return _read(file)
    except AdapterError as error:
        file.close()
        error.path = error.path or str(path)
        raise


def _read(file: RegularFile) -> GgufFile:
    refuse_other_file(bytes(file.read_at(0, min(file.nbytes, 512))), file.nbytes, file.path)
    if file.nbytes < 24:
        raise AdapterError(
            "truncated GGUF header",
            got=f"{file.nbytes} bytes",
            expected="at least 24",
            hint=FETCH_AGAIN,
        )
    cursor = Cursor(file, 0)
    start = cursor.take(24)
    if not start.startswith(MAGIC):
        raise AdapterError("is not a GGUF file", got=f"a start of {start[:8]!r}")
    version, tensor_count, key_count = struct.unpack("<IQQ", start[4:])
    if version not in _VERSIONS:
        swapped = int.from_bytes(start[4:8], "big") in (1, *_VERSIONS)
        raise AdapterError(
            "GGUF file is big-endian" if swapped else "GGUF version is not supported",
            got=version,
            expected="2 or 3, little-endian",
            hint="Turn a copy of it, with the gguf package: gguf-convert-endian COPY little"
            if swapped
            else None,
        )
    _check_count("keys", key_count, _MAX_KEYS, _SMALLEST_KEY_BYTES, cursor)
    _check_count("tensors", tensor_count, _MAX_TENSORS, _SMALLEST_TENSOR_BYTES, cursor)
    keys: dict[str, KeyValue] = {}
    for _ in range(key_count):
        key = cursor.string(_MAX_KEY_BYTES)
        if not key or key in keys:
            raise AdapterError(f"key {key} is listed twice" if key else "key is empty")
        if key.startswith(_RESERVED):
            raise AdapterError(f"key {key} is reserved for readers", path=file.path)
        keys[key] = _value(cursor, key)
    alignment = _alignment(keys)
    infos: dict[str, tuple[GgmlType, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name, info = _tensor_info(cursor)
        if name in infos:
            raise AdapterError("tensor is listed twice", tensor=name)
        infos[name] = info
    data_start = _padded(cursor.position, alignment)
    _check_layout(infos, data_start, alignment, file.nbytes)
    tensors = {
        name: GgufTensor(name, kind, shape, file, data_start + offset)
        for name, (kind, shape, offset) in infos.items()
    }
    return GgufFile(file, version, keys, tensors, alignment, data_start)


def _check_count(what: str, count: int, limit: int, smallest: int, cursor: Cursor) -> None:
    most = min(limit, cursor.remaining // smallest)
    if count > most:
        raise AdapterError(
            f"too many {what} in the GGUF header", got=count, expected=f"at most {most}"
        )


_RESERVED = "GGUF."
"""gguf-py gives keys that begin so to the fields of the file's head."""


def _value(cursor: Cursor, key: str) -> KeyValue:
    kind = _value_type(cursor, key)
    if kind == STRING:
        nbytes = cursor.length(cursor.remaining)
        offset = cursor.position
        if nbytes <= _MAX_LOADED:
            return KeyValue(kind, cursor.text(nbytes, _MAX_LOADED), "", 1, offset, cursor.position)
        cursor.seek(offset + nbytes)
        return KeyValue(kind, None, "", 1, offset, offset + nbytes)
    if kind != ARRAY:
        offset = cursor.position
        return KeyValue(kind, cursor.scalar(kind), "", 1, offset, cursor.position)
    item = _value_type(cursor, key)
    (count,) = struct.unpack("<Q", cursor.take(8))
    if item == ARRAY:
        raise AdapterError(f"key {key} holds an array of arrays")
    width = 8 if item == STRING else struct.calcsize(LAYOUTS[item])
    if count * width > cursor.remaining or (item == STRING and count > _MAX_LISTED_STRINGS):
        raise AdapterError(
            f"array of key {key} is longer than the file or the limit",
            got=f"{count} elements",
            expected=f"at most {min(cursor.remaining // width, _MAX_LISTED_STRINGS)}",
        )
    offset = cursor.position
    if item == STRING:
        cursor.skip_strings(count)
    elif item == "bool":
        _check_bools(cursor, key, count)
    else:
        cursor.seek(offset + count * width)
    return KeyValue(ARRAY, None, item, count, offset, cursor.position)


def _check_bools(cursor: Cursor, key: str, count: int) -> None:
    while count:
        part = cursor.take(min(count, _CHECKED_BYTES))
        if part.strip(b"\0\1"):
            raise AdapterError(f"truth value of key {key} is neither 0 nor 1")
        count -= len(part)


def _value_type(cursor: Cursor, key: str) -> str:
    (code,) = struct.unpack("<I", cursor.take(4))
    if code not in VALUE_TYPES:
        raise AdapterError(f"key {key} has an unknown type", got=code)
    return VALUE_TYPES[code]


def _alignment(keys: Mapping[str, KeyValue]) -> int:
    found = keys.get("general.alignment")
    if found is None:
        return DEFAULT_ALIGNMENT
    value = found.value
    if found.type != "u32" or value < 1 or value & (value - 1) or value > _MAX_ALIGNMENT:
        raise AdapterError(
            "general.alignment is wrong",
            got=f"{found.type} {value}",
            expected=f"u32, a power of two up to {_MAX_ALIGNMENT}",
        )
    return int(value)


def _tensor_info(cursor: Cursor) -> tuple[str, tuple[GgmlType, tuple[int, ...], int]]:
    name = cursor.string(cursor.remaining)
    if not name or len(name.encode()) > MAX_NAME_BYTES or not name.isprintable():
        raise AdapterError(
            "tensor name is empty, too long or not printable",
            tensor=name,
            expected=f"1 to {MAX_NAME_BYTES} bytes",
        )
    (dimensions,) = struct.unpack("<I", cursor.take(4))
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise AdapterError(
            "tensor has a wrong number of dimensions",
            tensor=name,
            got=dimensions,
            expected=f"1 to {_MAX_DIMENSIONS}",
        )
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    code, offset = struct.unpack("<IQ", cursor.take(12))
    if code not in TYPES:
        raise AdapterError("tensor has an unknown type", tensor=name, got=code)
    kind = TYPES[code]
    if 0 in sizes or math.prod(sizes) >= 1 << 63 or sizes[0] % kind.block:
        raise AdapterError(
            "tensor has a wrong shape",
            tensor=name,
            got=list(sizes),
            expected=f"sizes above 0, the first a multiple of {kind.block}",
        )
    return name, (kind, tuple(reversed(sizes)), offset)


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _check_layout(
    infos: Mapping[str, tuple[GgmlType, tuple[int, ...], int]],
    data_start: int,
    alignment: int,
    file_nbytes: int,
) -> None:
    """Check that tensors lie one behind the other in the order listed, as llama.cpp wants."""
    position = end = 0
    for name, (kind, shape, offset) in infos.items():
        if offset != position:
            raise AdapterError(
                "tensor data does not lie behind the tensor before it",
                tensor=name,
                got=f"offset {offset}",
                expected=position,
            )
        end = offset + kind.nbytes(shape)
        if data_start + end > file_nbytes:
            raise AdapterError(
                "tensor data lies beyond the end of the file",
                tensor=name,
                got=f"{file_nbytes} bytes",
                expected=f"at least {data_start + end}",
            )
        position = _padded(end, alignment)
    if file_nbytes > data_start + position:
        raise AdapterError(
            "bytes after the last tensor", got=file_nbytes, expected=data_start + position
        )
