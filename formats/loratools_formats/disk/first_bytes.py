"""What a file is that holds no weights, by its first bytes, and the next step.

A file of weights never starts like one of these: the check for safetensors comes first, since the
length of its header may begin with any two bytes.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from loratools_formats.disk.errors import AdapterError

FETCH_AGAIN = "Fetch the file again"
NAME_ANOTHER = "Name the folder or the file of an adapter"
ARCHIVE_START = b"PK\x03\x04"
_IN_PYTHON = "Make an adapter of its arrays in Python, with loratools.from_factors"
_BEFORE_GGUF = (
    "Convert the adapter that it was made from: loratools convert ADAPTER -o adapter.gguf "
    "--base MODEL"
)
_ALL_ZERO_BYTES = 512
_SHOWN_CHARACTERS = 60
_HEADER_AT = 8  # behind the length of a safetensors header
_LONGEST_HEADER = 1 << 32


class Kind(NamedTuple):
    """What a path is, and the next step; an empty hint for none."""

    what: str
    hint: str = ""


_PIECES = (
    (
        0,
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself",
        "Run: git lfs pull",
    ),
    (
        0,
        b"\x00\x05\x16\x07",
        "holds what macOS notes about another file",
        "Name the file that is called so without the ._ in front",
    ),
    (0, b"\x00\x00\x00\x01Bud1", "holds what macOS notes about a folder", NAME_ANOTHER),
    (0, b"\x93NUMPY", "is a NumPy array", _IN_PYTHON),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras saves weights", NAME_ANOTHER),
    (0, b"lmgg", "is a model of GGML, from before GGUF", NAME_ANOTHER),
    (0, b"fmgg", "is a model of GGML, from before GGUF", NAME_ANOTHER),
    (0, b"tjgg", "is a model of GGML, from before GGUF", NAME_ANOTHER),
    (0, b"algg", "is an adapter of llama.cpp from before GGUF", _BEFORE_GGUF),
    (0, b"%PDF-", "is a PDF document", NAME_ANOTHER),
    (0, b"\x89PNG\r\n", "is an image", NAME_ANOTHER),
    (0, b"\xff\xd8\xff", "is an image", NAME_ANOTHER),
    (0, b"GIF8", "is an image", NAME_ANOTHER),
    (0, b"<svg", "is an image", NAME_ANOTHER),
    (0, b"ID3", "is a sound file", NAME_ANOTHER),
    (0, b"OggS", "is a sound file", NAME_ANOTHER),
    (0, b"PAR1", "is a table of data (Parquet)", NAME_ANOTHER),
    (0, b"ARROW1", "is a table of data (Arrow)", NAME_ANOTHER),
    (0, b"SQLite format 3\x00", "is an SQLite database", NAME_ANOTHER),
    (0, b"\x7fELF", "is a program or a library", NAME_ANOTHER),
    (0, b"MZ", "is a program or a library", NAME_ANOTHER),
    (4, b"TFL3", "is a model of TensorFlow Lite", NAME_ANOTHER),
    (4, b"ftyp", "is a video or an image", NAME_ANOTHER),
    (8, b"WEBP", "is an image", NAME_ANOTHER),
    (8, b"WAVE", "is a sound file", NAME_ANOTHER),
)
_ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
_TAR = slice(257, 262)
_OF_NUMPY = re.compile(rb"PK\x03\x04.{22}.{4}[^\x00/]{1,100}\.npy", re.DOTALL)
_WEB_PAGE = re.compile(rb"\s*<(?:!doctype html|html)", re.IGNORECASE)


def kind_by_first_bytes(start: bytes, nbytes: int) -> Kind | None:
    """Return what a file is that is no text and no weights; None if it may be either.

    A zip archive may hold torch's weights: `None`, except for one of NumPy.

    Args:
        start: its first bytes; 512 tell everything.
        nbytes: size of the whole file.
    """
    if nbytes == 0:
        return Kind("is an empty file", FETCH_AGAIN)
    if _is_safetensors(start, nbytes):
        return None
    found = _by_table(start)
    if found is not None:
        return found
    if _WEB_PAGE.match(start):
        return Kind("is a web page", "Fetch the file itself instead of the page that shows it")
    if _OF_NUMPY.match(start):
        return Kind("is an archive of NumPy arrays", _IN_PYTHON)
    if start.startswith(_ARCHIVES) or start[_TAR] == b"ustar":
        return Kind("is an archive", "Unpack it, and name what is inside")
    if len(start) >= _ALL_ZERO_BYTES and not any(start):
        return Kind("holds zeros where a file begins, as after a broken download", FETCH_AGAIN)
    return None


def _by_table(start: bytes) -> Kind | None:
    for at, piece, what, hint in _PIECES:
        if start[at : at + len(piece)] == piece:
            return Kind(what, hint)
    return None


def is_cut_safetensors(start: bytes, nbytes: int) -> bool:
    """Return whether a file begins as safetensors and ends before its header does."""
    return _is_header(start) and _length(start) > nbytes - _HEADER_AT


def kind_of_text(start: bytes) -> Kind | None:
    """Return what a text is that lies where weights are expected; None for what is no text.

    Servers send a page or a sentence in place of a file that they do not give.
    """
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # not in the last character, which may be cut
            return None
        text = start[: error.start].decode("utf-8")
    if any(ord(c) < 32 and c not in "\t\n\r\f\x1b" for c in text):
        return None
    shown = " ".join(text[: 4 * _SHOWN_CHARACTERS].split())
    if len(shown) > _SHOWN_CHARACTERS:
        shown = f"{shown[: _SHOWN_CHARACTERS - 1]}…"
    return Kind(f"is a text and holds no weights: {shown!r}", FETCH_AGAIN)


def refuse_other_file(
    start: bytes, nbytes: int, path: str | os.PathLike[str], *, is_text: bool = False
) -> None:
    """Raise `AdapterError` if a file that is to be read is plainly something else.

    Args:
        start: its first bytes.
        nbytes: size of the whole file.
        path: where it lies.
        is_text: whether a text is expected.
    """
    kind = kind_by_first_bytes(start, nbytes)
    if kind is None and not is_text:
        kind = None if _is_safetensors(start, nbytes) else kind_of_text(start)
    if kind is not None:
        raise AdapterError(kind.what, path=path, hint=kind.hint)


def _is_safetensors(start: bytes, nbytes: int) -> bool:
    return _is_header(start) and _length(start) <= nbytes - _HEADER_AT


def _is_header(start: bytes) -> bool:
    return start[_HEADER_AT : _HEADER_AT + 1] == b"{" and 2 <= _length(start) < _LONGEST_HEADER


def _length(start: bytes) -> int:
    return int.from_bytes(start[:_HEADER_AT], "little")
