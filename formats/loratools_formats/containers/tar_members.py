"""Finding the members of a plain tar archive; their bytes stay where they are.

The headers that people's archives have are read: the first one of 1988, GNU's for long names and
large sizes, and those of POSIX 2001 (pax), of which the path and the size are used. Every header is
looked at once, whatever it says of the next; none is longer than a few names. Archives that are
compressed, and sparse members, whose bytes are not all there, are refused.

Source: POSIX.1-2017, `pax`, sections “ustar” and “pax Header Block”; GNU tar's manual, “Basic Tar
Format”.
"""

from __future__ import annotations

from dataclasses import dataclass

from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile

_BLOCK = 512
_MOST_HEADERS = 30_000
_LONGEST_EXTENSION = 1 << 16
_MAGIC = slice(257, 262)
_REGULAR, _LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL = b"0\0 7", b"L", b"K", b"x", b"g"
_SPARSE = b"S"
_GNU_NUMBER = 0x80


@dataclass(frozen=True)
class Member:
    """A regular file in an archive: its name, its first byte in the archive, and its size."""

    name: str
    offset: int
    nbytes: int


def is_tar(start: bytes) -> bool:
    """Return whether a file that starts so is a plain tar archive."""
    return start[_MAGIC] == b"ustar"


def tar_members(file: RegularFile) -> list[Member]:
    """Return the regular files of an archive, in its order.

    Raises:
        AdapterError: malformed, cut short, too many headers, or with a sparse member.
    """
    members: list[Member] = []
    at, extended = 0, dict[str, str]()
    for _ in range(_MOST_HEADERS):
        header = file.read_at(at, _BLOCK) if at + _BLOCK <= file.nbytes else b""
        if not header.strip(b"\0"):
            if not header and at != file.nbytes:
                raise _broken(file, "it ends in a header")
            return members
        _check_sum(file, header)
        kind, at = header[156:157], at + _BLOCK
        nbytes = _number(file, header[124:136])
        if kind not in (_LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL):
            nbytes = _size(file, extended.get("size"), nbytes)
        if at + nbytes > file.nbytes:
            raise _broken(file, f"it is cut short: {at + nbytes} bytes were expected")
        if kind in (_LONG_NAME, _EXTENDED):
            extended |= _extension(file, at, nbytes, kind)
        elif kind not in (_LONG_LINK, _GLOBAL):
            if kind == _SPARSE or any(key.startswith("GNU.sparse") for key in extended):
                raise AdapterError("archive has a sparse member", path=file.path)
            if kind in (bytes([code]) for code in _REGULAR):
                members.append(Member(extended.get("path", _name(header)), at, nbytes))
            extended = {}
        at += -(-nbytes // _BLOCK) * _BLOCK
    raise AdapterError(
        "archive has too many members", path=file.path, expected=f"at most {_MOST_HEADERS} headers"
    )


def _check_sum(file: RegularFile, header: bytes) -> None:
    stated = _number(file, header[148:156])
    if stated != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise _broken(file, "a header has another sum than it states")


def _number(file: RegularFile, field: bytes) -> int:
    """Return a number in octal digits, or GNU's binary one."""
    if field[0] == _GNU_NUMBER:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if digits.strip(b"01234567"):
        raise _broken(file, f"a number in a header is {digits!r}")
    return int(digits or b"0", 8)


def _size(file: RegularFile, stated: str | None, nbytes: int) -> int:
    if stated is None:
        return nbytes
    if not stated.isdecimal() or not stated.isascii() or len(stated) > 20:
        raise _broken(file, "a size that is no number")
    return int(stated)


def _name(header: bytes) -> str:
    prefix = (
        header[345:500].partition(b"\0")[0] if is_tar(header) and header[262:263] == b"\0" else b""
    )
    name = header[:100].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _extension(file: RegularFile, at: int, nbytes: int, kind: bytes) -> dict[str, str]:
    """Return what a header says of the next member."""
    if nbytes > _LONGEST_EXTENSION:
        raise AdapterError(
            "a header of the archive is too long",
            path=file.path,
            got=f"{nbytes} bytes",
            expected=f"at most {_LONGEST_EXTENSION}",
        )
    data = file.read_at(at, nbytes)
    if kind == _LONG_NAME:
        return {"path": data.partition(b"\0")[0].decode("utf-8", "replace")}
    found: dict[str, str] = {}
    place = 0
    while place < len(data):
        space = data.find(b" ", place, place + 8)
        digits = data[place:space] if space > 0 else b""
        end = place + (int(digits) if digits.isdigit() else 0)
        key, equals, value = data[space + 1 : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise _broken(file, "a pax header is malformed")
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
        place = end
    return found


def _broken(file: RegularFile, why: str) -> AdapterError:
    return AdapterError(
        f"cannot be read as an archive: {why}",
        path=file.path,
        hint="If it is compressed, unpack it and name its model_weights.ckpt",
    )
