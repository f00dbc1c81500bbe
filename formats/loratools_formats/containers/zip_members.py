"""Finding the members of a zip archive that `torch.save` made; their bytes stay where they are.

Not a general reader: members are stored and never compressed, so that nothing can expand, and every
count and length is checked before anything is made from it. What two readers could understand
differently (names that stand twice, a local header that disagrees) is refused.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to
4.3.16 (its end) and 4.5.3 (64-bit sizes).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from loratools_formats.disk.errors import AdapterError

MOST_MEMBERS = 500_000
LARGEST_DIRECTORY = 64 << 20
_LOCAL, _ENTRY, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
_END_FORM = struct.Struct("<4s4H2LH")
_END64_FORM = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_FORM = struct.Struct("<4sLQL")
_ENTRY_FORM = struct.Struct("<4s6H3L5H2L")
_LOCAL_FORM = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_IN_64, _IS_64 = 0xFFFFFFFF, 0x0001
_ENCRYPTED = 1


class Bytes(Protocol):
    """A file, or a part of one, that is read at positions."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from `offset`."""


@dataclass(frozen=True)
class Member:
    """A stored member.

    Attributes:
        name: its whole name.
        header: where its local header begins.
        nbytes: its size.
    """

    name: bytes
    header: int
    nbytes: int


def zip_members(file: Bytes) -> dict[bytes, Member]:
    """Return the members of an archive by name.

    Raises:
        AdapterError: not such an archive, or too many members.
    """
    start, nbytes, count = _directory(file)
    data = file.read_at(start, nbytes)
    members: dict[bytes, Member] = {}
    at = 0
    for _ in range(count):
        if at + _ENTRY_FORM.size > nbytes:
            raise _broken("its directory ends early")
        fields = _ENTRY_FORM.unpack_from(data, at)
        name_end = at + _ENTRY_FORM.size + fields[10]
        at = name_end + fields[11] + fields[12]
        if fields[0] != _ENTRY or at > nbytes:
            raise _broken("its directory is malformed")
        name = data[name_end - fields[10] : name_end]
        member = _member(name, fields, data[name_end : name_end + fields[11]])
        if name in members:
            raise _broken("two members have one name", name)
        members[name] = member
    if at != nbytes:
        raise _broken("its directory is longer than its members")
    return members


def data_offset(file: Bytes, member: Member) -> int:
    """Return where the bytes of a member begin.

    Raises:
        AdapterError: its local header disagrees with the directory, or it goes beyond the file.
    """
    if member.header + _LOCAL_FORM.size > file.nbytes:
        raise _broken("a member lies beyond the end", member.name)
    fields = _LOCAL_FORM.unpack(file.read_at(member.header, _LOCAL_FORM.size))
    begin = member.header + _LOCAL_FORM.size + int(fields[9] + fields[10])
    if fields[0] != _LOCAL or begin + member.nbytes > file.nbytes:
        raise _broken("a member lies beyond the end", member.name)
    if file.read_at(member.header + _LOCAL_FORM.size, fields[9]) != member.name:
        raise _broken("a member has two names", member.name)
    return begin


def _directory(file: Bytes) -> tuple[int, int, int]:
    """Return where the directory begins, its size, and how many members it has."""
    tail_start = max(0, file.nbytes - _END_FORM.size - _LONGEST_COMMENT)
    tail = file.read_at(tail_start, file.nbytes - tail_start)
    at = tail.rfind(_END)
    if at < 0 or at + _END_FORM.size > len(tail):
        raise _broken("it has no directory: it is truncated, or no archive")
    fields = _END_FORM.unpack_from(tail, at)
    end = tail_start + at
    if end + _END_FORM.size + fields[7] != file.nbytes:
        raise _broken("bytes follow its end")
    disks, counts, nbytes, start = fields[1:3], fields[3:5], fields[5], fields[6]
    if end >= _LOCATOR_FORM.size:
        locator = _LOCATOR_FORM.unpack(file.read_at(end - _LOCATOR_FORM.size, _LOCATOR_FORM.size))
        if locator[0] == _LOCATOR64:
            end = int(locator[2])
            if end + _END64_FORM.size > file.nbytes:
                raise _broken("its directory lies beyond the end")
            fields = _END64_FORM.unpack(file.read_at(end, _END64_FORM.size))
            if fields[0] != _END64:
                raise _broken("its directory is malformed")
            disks, counts, nbytes, start = fields[4:6], fields[6:8], fields[8], fields[9]
    if any(disks) or counts[0] != counts[1]:
        raise _broken("it spans several files")
    if counts[0] > MOST_MEMBERS or nbytes > LARGEST_DIRECTORY:
        raise AdapterError(
            "archive has too many members",
            got=f"{counts[0]} in a directory of {nbytes} bytes",
            expected=f"at most {MOST_MEMBERS} in {LARGEST_DIRECTORY}",
        )
    if start + nbytes > end:
        raise _broken("its directory lies beyond the end")
    return int(start), int(nbytes), int(counts[0])


def _member(name: bytes, fields: tuple[int, ...], extra: bytes) -> Member:
    flags, method, packed, nbytes, header = fields[3], fields[4], fields[8], fields[9], fields[16]
    if method or flags & _ENCRYPTED:
        raise AdapterError(
            "pickled weights hold a compressed or encrypted member",
            got=name.decode("utf-8", "replace"),
            hint="Load them with torch where you trust them, and save them again",
        )
    wide = _wide(extra)
    sizes = [wide.pop(0) if v == _IN_64 and wide else v for v in (nbytes, packed, header)]
    if sizes[0] != sizes[1]:
        raise _broken("a stored member has two sizes", name)
    return Member(name, sizes[2], sizes[0])


def _wide(extra: bytes) -> list[int]:
    """Return the 64-bit numbers of an entry, in the order in which they replace others."""
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<2H", extra, at)
        if kind == _IS_64:
            count = min(nbytes, len(extra) - at - 4) // 8
            return list(struct.unpack_from(f"<{count}Q", extra, at + 4))
        at += 4 + nbytes
    return []


def _broken(why: str, name: bytes | None = None) -> AdapterError:
    return AdapterError(
        f"cannot be read as an archive: {why}",
        got=None if name is None else name.decode("utf-8", "replace"),
    )
