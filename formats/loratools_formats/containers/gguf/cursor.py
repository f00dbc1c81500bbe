"""The values in a GGUF header, taken one after another from a file that may be hostile.

Lengths are checked against the rest of the file before anything is read or allocated.
"""

from __future__ import annotations

import struct
from typing import Any

from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile
from loratools_formats.disk.first_bytes import FETCH_AGAIN

_WINDOW_BYTES = 1 << 20

STRING, ARRAY = "string", "array"
_SCALARS = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"),
    5: ("i32", "<i"), 6: ("f32", "<f"), 7: ("bool", "<B"), 10: ("u64", "<Q"), 11: ("i64", "<q"),
    12: ("f64", "<d"),
}  # fmt: skip
VALUE_TYPES: dict[int, str] = {
    8: STRING, 9: ARRAY, **{code: name for code, (name, _) in _SCALARS.items()}
}  # fmt: skip
VALUE_CODES = {name: code for code, name in VALUE_TYPES.items()}
LAYOUTS = dict(_SCALARS.values())
"""How each type of number is stored, as `struct` spells it."""


class Cursor:
    """A position in a file, read through a window of bytes."""

    def __init__(self, file: RegularFile, position: int) -> None:
        self._file = file
        self._size = file.nbytes
        self._window = b""
        self._start = position
        self._at = 0

    @property
    def position(self) -> int:
        """Where the next value starts in the file."""
        return self._start + self._at

    @property
    def remaining(self) -> int:
        """Bytes that are left."""
        return self._size - self.position

    def seek(self, position: int) -> None:
        """Go to a position."""
        self._window, self._start, self._at = b"", position, 0

    def take(self, nbytes: int) -> bytes:
        """Take bytes; an `AdapterError` if the file has not so many."""
        end = self._at + nbytes
        if end > len(self._window):
            if nbytes > self.remaining:
                raise AdapterError(
                    "truncated GGUF header",
                    path=self._file.path,
                    got=f"{self.remaining} bytes left",
                    expected=nbytes,
                    hint=FETCH_AGAIN,
                )
            self._refill(nbytes)
            end = nbytes
        data = self._window[self._at : end]
        self._at = end
        return data

    def _refill(self, nbytes: int) -> None:
        start = self.position
        size = min(max(nbytes, _WINDOW_BYTES), self._size - start)
        self._window, self._start, self._at = bytes(self._file.read_at(start, size)), start, 0

    def scalar(self, kind: str) -> Any:
        """Take a number or truth value of a type."""
        layout = LAYOUTS[kind]
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        if kind != "bool":
            return value
        if value > 1:
            raise AdapterError("truth value is neither 0 nor 1", path=self._file.path, got=value)
        return bool(value)

    def length(self, limit: int) -> int:
        """Take the length of a string, which must fit the file and `limit`."""
        (length,) = struct.unpack("<Q", self.take(8))
        if length > min(self.remaining, limit):
            raise AdapterError(
                "string is longer than the file" if length > self.remaining else "string too long",
                path=self._file.path,
                got=f"{length} bytes",
                expected=f"at most {min(self.remaining, limit)}",
            )
        return int(length)

    def string(self, limit: int) -> str:
        """Take a string of at most `limit` bytes, its length first."""
        return self.text(self.length(limit), limit)

    def text(self, nbytes: int, limit: int) -> str:
        """Take `nbytes` bytes of UTF-8."""
        if nbytes > limit:
            raise AdapterError("string is too long to be loaded", path=self._file.path, got=nbytes)
        try:
            return self.take(nbytes).decode("utf-8")
        except UnicodeDecodeError as error:
            raise AdapterError(
                "string is not UTF-8", path=self._file.path, got=f"byte {error.start}"
            ) from error

    def skip_strings(self, count: int) -> None:
        """Step over strings; a vocabulary has hundreds of thousands."""
        unpack = struct.Struct("<Q").unpack_from
        while count:
            if self.remaining < 8:
                self.take(8)
            if len(self._window) - self._at < 8:
                self._refill(8)
            window, at, last = self._window, self._at, len(self._window) - 8
            room = self.remaining + at
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
                if at > room:
                    raise AdapterError(
                        "string is longer than the file", path=self._file.path, got=f"{at - room}"
                    )
            if at <= len(window):
                self._at = at
            else:
                self.seek(self._start + at)
