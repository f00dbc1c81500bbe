"""A place for results too many to hold in memory: one anonymous file.

Workers append tensors from any thread and get back references that read from the file. The file
has no name, so it vanishes with the process however that ends.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from loratools_formats.core.tensors import TensorRef, in_file
from loratools_formats.disk.errors import OutputError
from loratools_formats.disk.files import read_some, write_at

if TYPE_CHECKING:
    from loratools_formats.core.dtypes import Array, DType


class AnonymousFile:
    """A file without a name, written and read at positions, from any thread.

    It has no buffer, which would be written, and could fail, when the file is closed.

    Args:
        folder: where to make it; the system's temporary folder by default.

    Raises:
        OutputError: no file can be made there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OutputError(
                f"no scratch file can be made: {error.strerror}", path=folder
            ) from error

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all bytes of a contiguous buffer at a position.

        Raises:
            OutputError: the disk is full.
        """
        try:
            write_at(self._file.fileno(), offset, data.cast("B"))
        except OSError as error:
            raise OutputError(
                f"scratch file: {os.strerror(error.errno or 0)}",
                path=tempfile.gettempdir() if self._folder is None else self._folder,
                hint="Nothing was changed; check free space",
            ) from error

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Return `nbytes` bytes from `offset`.

        Raises:
            OutputError: they cannot be read.
        """
        data = b""
        try:
            while len(data) < nbytes:
                piece = read_some(self._file.fileno(), offset + len(data), nbytes - len(data))
                if not piece:
                    break
                data = data + piece if data else piece
        except OSError as error:
            raise OutputError(f"scratch file: {os.strerror(error.errno or 0)}") from error
        return data

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class Scratch:
    """An anonymous file that holds tensors until they are written out.

    Args:
        folder: where to make it; the system's temporary folder by default.

    Raises:
        OutputError: no file can be made there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = AnonymousFile(folder)
        self._lock = threading.Lock()
        self._end = 0

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Return `nbytes` bytes from `offset`."""
        return self._file.read_at(offset, nbytes)

    def store(self, key: str, array: Array, dtype: DType) -> TensorRef:
        """Append an array already in the type `dtype`, and return a reference to it.

        Raises:
            OutputError: the disk is full.
        """
        import numpy as np

        data = np.ascontiguousarray(np.atleast_1d(array)).view(np.uint8).reshape(-1).data
        with self._lock:
            offset = self._end
            self._file.write_at(offset, data)
            self._end += data.nbytes
        return in_file(key, dtype, tuple(array.shape), self, offset)
