"""Digests of files in the terms in which a statement gives them, to compare with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools_formats.containers.safetensors_read import header_digest, read_safetensors
from loratools_formats.disk.provenance import sha256_of, start_digest


def digest_like(path: Path, known: Mapping[str, str]) -> dict[str, str] | None:
    """Return the digest of a file under the names that a known one has; None if nobody knows them.

    Raises:
        MissingFileError: no such file.
        AdapterError: it is no file, or not of the kind that has such a digest.
    """
    if set(known) == {"sha256"}:
        return {"sha256": sha256_of(path)}
    if set(known) == {"headerSha256", "bytes"}:
        from loratools_formats.containers.gguf.container import is_gguf
        from loratools_formats.containers.gguf.splits import read_model

        if not is_gguf(path):
            return header_digest(read_safetensors(path))
        part = read_model(path).parts[0]
        return start_digest(path, part.data_start)
    return None
