"""Reading the safetensors container: its header, bounded, and never the tensors themselves.

Source: the format section of the safetensors README and `validate()` in the safetensors crate 0.8.
It is stricter than that library where it lets through what two parsers would read differently
(duplicate keys, unknown fields), what breaks terminals (control characters) or what only a hostile
file contains (a million tensors, a hundred thousand dimensions).
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.core.dtypes import DTYPES, DType
from loratools_formats.core.tensors import TensorRef, in_file
from loratools_formats.disk.distant import open_file
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile
from loratools_formats.disk.first_bytes import (
    ARCHIVE_START,
    FETCH_AGAIN,
    is_cut_safetensors,
    refuse_other_file,
)
from loratools_formats.disk.strict_json import parsed_object

LENGTH_BYTES = 8
_MARKS_PER_TENSOR = 16
_START_BYTES = 512
METADATA = "__metadata__"
_FIELDS = {"data_offsets", "dtype", "shape"}


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

    header_bytes: int = 40 << 20
    tensors: int = 300_000
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
    file = open_file(path)
    try:
        return _read(file, limits)
    except AdapterError:
        file.close()
        raise


def safetensors_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of a file's tensors; only the header need be there.

    Raises:
        MissingFileError: nothing is at `path`.
        AdapterError: not a regular file, not safetensors, or a malformed header.
    """
    file = open_file(path)
    try:
        header, data_start = _header(file, DEFAULT_LIMITS)
        header.pop(METADATA, None)
        spans = [(*_entry(n, e, file.path, DEFAULT_LIMITS), n) for n, e in header.items()]
        is_alone = file.nbytes == data_start
        whole = max((end for _, end, *_ in spans), default=0)
        _check_layout(spans, whole if is_alone else file.nbytes - data_start, file.path)
    finally:
        file.close()
    return list(header)


def _read(file: RegularFile, limits: Limits) -> SafetensorsFile:
    header, data_start = _header(file, limits)
    metadata = _metadata(header.pop(METADATA, {}), file.path, limits)
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
    start = bytes(file.read_at(0, min(size, _START_BYTES)))
    if size < LENGTH_BYTES:
        refuse_other_file(start, size, file.path)
        raise AdapterError(
            "truncated safetensors header",
            path=file.path,
            got=f"{size} bytes",
            expected="at least 8",
            hint=FETCH_AGAIN,
        )
    (length,) = struct.unpack("<Q", start[:LENGTH_BYTES])
    if length > size - LENGTH_BYTES or length < 2:
        raise _not_safetensors(file, start, length)
    if length > limits.header_bytes:
        raise AdapterError(
            "safetensors header is too long",
            path=file.path,
            got=f"{length} bytes",
            expected=f"at most {limits.header_bytes}",
        )
    text = bytes(file.read_at(LENGTH_BYTES, length))
    if not text.startswith(b"{"):
        refuse_other_file(start, size, file.path)
        raise AdapterError("safetensors header is not a JSON object", path=file.path, got=text[:24])
    _check_amount(text, file.path, limits)
    header = parsed_object(
        text.rstrip(b" "),
        "safetensors header",
        path=file.path,
        most_values=_MARKS_PER_TENSOR * limits.tensors,
    )
    return header, LENGTH_BYTES + length


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
    if start.startswith(b"GGUF"):
        return AdapterError(
            "is a GGUF file",
            path=file.path,
            expected="a safetensors file or folder",
            hint="Take the files that it was made from; `fuse` and `convert` take GGUF models, too",
        )
    if is_cut_safetensors(start, file.nbytes):
        return AdapterError(
            "is a safetensors file that ends within its header",
            path=file.path,
            got=f"{file.nbytes} bytes",
            expected=f"more than {LENGTH_BYTES + length}",
            hint=FETCH_AGAIN,
        )
    if start.startswith(ARCHIVE_START):
        return AdapterError(
            "is a zip archive",
            path=file.path,
            expected="a safetensors file",
            hint="Give it the ending .bin if torch saved it; unpack it if not",
        )
    try:
        refuse_other_file(start, file.nbytes, file.path)
    except AdapterError as error:
        return error
    return AdapterError(
        "is not a safetensors file",
        path=file.path,
        got=f"a header length of {length} in a file of {file.nbytes} bytes",
        hint=FETCH_AGAIN,
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
        check_name(key, path, limits)
    return value


def check_name(name: str, path: Path | None, limits: Limits) -> None:
    """Raise `AdapterError` if a name is too long or holds what breaks terminals."""
    if not name.isprintable():
        raise AdapterError("name has control or invisible characters", path=path, tensor=name)
    if len(name if name.isascii() else name.encode()) > limits.name_bytes:
        raise AdapterError(
            "name is too long",
            path=path,
            tensor=name,
            expected=f"at most {limits.name_bytes} bytes",
        )


def _entry(
    name: str, entry: Any, path: Path, limits: Limits
) -> tuple[int, int, DType, tuple[int, ...]]:
    check_name(name, path, limits)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise AdapterError(
            "header entry has the wrong fields",
            path=path,
            tensor=name,
            got=sorted(entry) if isinstance(entry, dict) else None,
            expected=sorted(_FIELDS),
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
    # A 0 among the sizes does not excuse a product of the others that no library can count.
    span = offsets[1] - offsets[0]
    uncountable = 0 in shape and math.prod(filter(None, shape)) > 1 << 62
    if uncountable or nbytes != span or span > 1 << 60:
        raise AdapterError(
            "shape and dtype do not fit the data",
            path=path,
            tensor=name,
            got=f"{span} bytes",
            expected=f"{nbytes} for {code} {shape}",
        )
    return offsets[0], offsets[1], dtype, tuple(shape)


def _is_counts(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for each in value:  # noqa: SIM110 - a generator takes most of the time for a large header
        if type(each) is not int or each < 0:
            return False
    return True


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
            f"safetensors data: {kind}",
            path=path,
            got=f"{data_nbytes} bytes",
            expected=position,
            hint=FETCH_AGAIN if position > data_nbytes else None,
        )


def header_of(file: SafetensorsFile) -> bytes:
    """Return the header's bytes, the length in front included."""
    (length,) = struct.unpack("<Q", file.file.read_at(0, LENGTH_BYTES))
    return bytes(file.file.read_at(0, LENGTH_BYTES + length))


def header_digest(file: SafetensorsFile) -> dict[str, str]:
    """Return a digest of a file's header alone, and its size.

    For checkpoints: digesting all their bytes takes longer than changing them.
    """
    digest = hashlib.sha256(header_of(file)).hexdigest()
    return {"headerSha256": digest, "bytes": str(file.file.nbytes)}
