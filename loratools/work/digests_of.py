"""Digests of files in the terms in which a statement gives them, to compare with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools_formats.containers.safetensors_read import header_digest, read_safetensors
from loratools_formats.disk.distant import open_file
from loratools_formats.disk.provenance import start_digest


def digest_like(path: Path, known: Mapping[str, str]) -> dict[str, str] | None:
    """Return the digest of a file under the names that a known one has; None if nobody knows them.

    Raises:
        MissingFileError: no such file.
        AdapterError: it is no file, or not of the kind that has such a digest.
    """
    found = {"sha256": _sha256_of(path)} if "sha256" in known else {}
    if known.keys() >= _OF_HEADER:
        found |= _of_header(path)
    return found if found and found.keys() == known.keys() else None


def _sha256_of(path: Path) -> str:
    file = open_file(path)
    try:
        return file.sha256()
    finally:
        file.close()


_OF_HEADER = {"headerSha256", "bytes"}


def _of_header(path: Path) -> dict[str, str]:
    from loratools_formats.containers.gguf.container import is_gguf
    from loratools_formats.containers.gguf.splits import read_model

    if not is_gguf(path):
        return header_digest(read_safetensors(path))
    part = read_model(path).parts[0]
    return start_digest(path, part.data_start)


def shown(digest: Mapping[str, str]) -> tuple[str, str]:
    """Return what a digest is of, `header ` or nothing, and the digest; empty if there is none."""
    if "sha256" in digest:
        return "", digest["sha256"]
    return "header " if "headerSha256" in digest else "", digest.get("headerSha256", "")
