"""The safetensors container: a bounded header reader and a streaming, reproducible writer.

Source: the format section of the safetensors README and `validate()` in the safetensors crate 0.8.
The reader is stricter than that library where it lets through what two parsers would read
differently (duplicate keys, unknown fields), what breaks terminals (control characters) or
what only a hostile file contains (a million tensors, a hundred thousand dimensions). The writer
differs from it by fixed bytes (sorted metadata and tensors), an fsync before the rename, and the
umask's permissions.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from loratools_formats import strict_json
from loratools_formats.dtypes import DTYPES, DType
from loratools_formats.errors import AdapterError, OutputError
from loratools_formats.files import RegularFile, refuse_lfs_pointer
from loratools_formats.publish import publish_file
from loratools_formats.tensors import TensorRef, in_file

_LENGTH_BYTES = 8
_COPY_CHUNK_BYTES = 8 << 20
_MARKS_PER_TENSOR = 16
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Limits:
    """Bounds checked before anything is allocated.

    Attributes:
        header_bytes: longest header; the library's own bound is 100,000,000.
        tensors: most tensors in a file.
        dimensions: highest tensor rank.
        name_bytes: longest tensor or metadata name, in UTF-8.
        metadata_bytes: most metadata, keys and values together.
    """

    header_bytes: int = 16 << 20
    tensors: int = 200_000
    dimensions: int = 8
    name_bytes: int = 512
    metadata_bytes: int = 8 << 20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class SafetensorsFile:
    """An open file: its metadata, its tensors by name, and the descriptor they read through."""

    file: RegularFile
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorRef]


def read_safetensors(
    path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS
) -> SafetensorsFile:
    """Read the header of a file and check all of it; tensor bytes are read on demand.

    Raises:
        MissingFileError: nothing is at `path`.
        AdapterError: not a regular file, not safetensors, malformed, or beyond `limits`.
    """
    file = RegularFile(path)
    try:
        return _read(file, limits)
    except AdapterError:
        file.close()
        raise


def safetensors_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of a file's tensors, of which only the header need be there.

    Raises:
        MissingFileError: nothing is at `path`.
        AdapterError: not a regular file, not safetensors, or a malformed header.
    """
    file = RegularFile(path)
    try:
        header, data_start = _header(file, DEFAULT_LIMITS)
        header.pop(_METADATA, None)
        spans = [(*_entry(n, e, file.path, DEFAULT_LIMITS), n) for n, e in header.items()]
        is_alone = file.nbytes == data_start
        whole = max((end for _, end, *_ in spans), default=0)
        _check_layout(spans, whole if is_alone else file.nbytes - data_start, file.path)
    finally:
        file.close()
    return list(header)


def _read(file: RegularFile, limits: Limits) -> SafetensorsFile:
    header, data_start = _header(file, limits)
    metadata = _metadata(header.pop(_METADATA, {}), file.path, limits)
    spans = [(*_entry(name, entry, file.path, limits), name) for name, entry in header.items()]
    _check_layout(spans, file.nbytes - data_start, file.path)
    tensors = {
        name: in_file(name, dtype, shape, file, data_start + begin)
        for begin, _, dtype, shape, name in spans
    }
    return SafetensorsFile(file, metadata, tensors)


def _header(file: RegularFile, limits: Limits) -> tuple[dict[str, Any], int]:
    """Return the entries of a header, not yet checked, and where the data begin."""
    size = file.nbytes
    if size < _LENGTH_BYTES:
        raise AdapterError(
            "truncated safetensors header",
            path=file.path,
            got=f"{size} bytes",
            expected="at least 8",
        )
    start = bytes(file.read_at(0, min(size, 64)))
    refuse_lfs_pointer(start, file.path)
    (length,) = struct.unpack("<Q", start[:_LENGTH_BYTES])
    if length > size - _LENGTH_BYTES or length < 2:
        raise _not_safetensors(file, start, length)
    if length > limits.header_bytes:
        raise AdapterError(
            "safetensors header is too long",
            path=file.path,
            got=f"{length} bytes",
            expected=f"at most {limits.header_bytes}",
        )
    text = bytes(file.read_at(_LENGTH_BYTES, length))
    if not text.startswith(b"{"):
        raise AdapterError("safetensors header is not a JSON object", path=file.path, got=text[:24])
    _check_amount(text, file.path, limits)
    try:
        header: dict[str, Any] = strict_json.loads(text.rstrip(b" "))
    except strict_json.StrictJsonError as error:
        raise AdapterError(f"safetensors header: {error}", path=file.path) from error
    return header, _LENGTH_BYTES + length


def _check_amount(text: bytes, path: Path, limits: Limits) -> None:
    """Refuse a header that would become too many objects, before it is parsed.

    A tensor's entry has one "dtype", and a dozen brackets and commas.
    """
    marks = sum(map(text.count, (b"{", b"[", b",")))
    if text.count(b'"dtype"') > limits.tensors or marks > _MARKS_PER_TENSOR * limits.tensors:
        raise AdapterError(
            "too many tensors or values in the safetensors header",
            path=path,
            expected=f"at most {limits.tensors} tensors",
        )


def _not_safetensors(file: RegularFile, start: bytes, length: int) -> AdapterError:
    if start[:_LENGTH_BYTES].isascii() and start[:1] in b"<{[ \n#PvV":
        return AdapterError(
            "is not a safetensors file", path=file.path, got=f"a start of {start[:24]!r}"
        )
    return AdapterError(
        "truncated or not a safetensors file",
        path=file.path,
        got=f"a header length of {length} in a file of {file.nbytes} bytes",
    )


def _metadata(value: Any, path: Path, limits: Limits) -> dict[str, str]:
    if value is None:  # as MLX writes it
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise AdapterError("__metadata__ is not a map of strings to strings", path=path)
    total = sum(len(k.encode()) + len(v.encode()) for k, v in value.items())
    if total > limits.metadata_bytes:
        raise AdapterError(
            "too much metadata",
            path=path,
            got=f"{total} bytes",
            expected=f"at most {limits.metadata_bytes}",
        )
    for key in value:
        _check_name(key, path, limits)
    return value


def _check_name(name: str, path: Path | None, limits: Limits) -> None:
    if not name.isprintable():
        raise AdapterError("name has control or invisible characters", path=path, tensor=name)
    if len(name.encode()) > limits.name_bytes:
        raise AdapterError(
            "name is too long",
            path=path,
            tensor=name,
            expected=f"at most {limits.name_bytes} bytes",
        )


def _entry(
    name: str, entry: Any, path: Path, limits: Limits
) -> tuple[int, int, DType, tuple[int, ...]]:
    _check_name(name, path, limits)
    fields = sorted(entry) if isinstance(entry, dict) else None
    if fields != ["data_offsets", "dtype", "shape"]:
        raise AdapterError(
            "header entry has the wrong fields",
            path=path,
            tensor=name,
            got=fields,
            expected=["data_offsets", "dtype", "shape"],
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise AdapterError("unsupported dtype", path=path, tensor=name, got=code)
    dtype = DTYPES[code]
    if not _is_counts(shape) or len(shape) > limits.dimensions:
        raise AdapterError(
            "bad shape",
            path=path,
            tensor=name,
            got=shape,
            expected=f"at most {limits.dimensions} non-negative integers",
        )
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise AdapterError("bad data offsets", path=path, tensor=name, got=offsets)
    nbytes = dtype.nbytes(tuple(shape))
    if any(size > 1 << 62 for size in shape) or nbytes != offsets[1] - offsets[0]:
        raise AdapterError(
            "shape and dtype do not fit the data",
            path=path,
            tensor=name,
            got=f"{offsets[1] - offsets[0]} bytes",
            expected=f"{nbytes} for {code} {shape}",
        )
    return offsets[0], offsets[1], dtype, tuple(shape)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_layout(
    spans: list[tuple[int, int, DType, tuple[int, ...], str]], data_nbytes: int, path: Path
) -> None:
    position = 0
    for begin, end, _, _, name in sorted(spans, key=lambda span: (span[0], span[1])):
        if begin != position:
            kind = "overlaps another tensor" if begin < position else "leaves a hole before it"
            raise AdapterError(
                f"tensor data {kind}",
                path=path,
                tensor=name,
                got=f"offset {begin}",
                expected=position,
            )
        position = end
    if position != data_nbytes:
        kind = "truncated" if position > data_nbytes else "bytes after the last tensor"
        raise AdapterError(
            f"safetensors data: {kind}", path=path, got=f"{data_nbytes} bytes", expected=position
        )


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
        header[_METADATA] = dict(sorted(metadata.items()))
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
    length = -(-len(text) // 8) * 8 if nbytes is None else nbytes - _LENGTH_BYTES
    return struct.pack("<Q", length) + text.ljust(length)


def header_of(file: SafetensorsFile) -> bytes:
    """Return the header of a file as it is, the length in front included."""
    (length,) = struct.unpack("<Q", file.file.read_at(0, _LENGTH_BYTES))
    return bytes(file.file.read_at(0, _LENGTH_BYTES + length))


def header_digest(file: SafetensorsFile) -> dict[str, str]:
    """Return a digest of a file's header alone, and its size.

    For checkpoints: digesting all their bytes takes longer than changing them.
    """
    digest = hashlib.sha256(header_of(file)).hexdigest()
    return {"headerSha256": digest, "bytes": str(file.file.nbytes)}


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
        AdapterError: a tensor has no possible name, the name of another but for case, or not the
            bytes that its shape and type ask for.
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
    """Raise `AdapterError` if a tensor has no possible name, or that of another but for case."""
    seen: dict[str, str] = {}
    for tensor in ordered:
        _check_name(tensor.key, None, DEFAULT_LIMITS)
        if tensor.key == _METADATA:
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
