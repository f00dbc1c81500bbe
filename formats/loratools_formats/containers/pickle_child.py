"""The process that looks into pickled weights: standard input is the file, standard output JSON.

It is started by `pickles`, never imported by anything else.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass

from loratools_formats.containers.confined import confine
from loratools_formats.containers.torch_states import tensors_in
from loratools_formats.disk.errors import AdapterError


@dataclass(frozen=True)
class _Part:
    """A part of standard input."""

    begin: int
    nbytes: int

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from `offset`."""
        if offset + nbytes > self.nbytes:
            raise AdapterError("pickled weights end early", got=f"{self.nbytes} bytes")
        os.lseek(0, self.begin + offset, os.SEEK_SET)
        data = bytearray()
        while len(data) < nbytes:
            piece = os.read(0, nbytes - len(data))
            if not piece:
                raise AdapterError("file ended while it was being read")
            data += piece
        return bytes(data)


def main() -> None:
    """Print where the tensors are, or why they are not read."""
    begin, nbytes, memory, seconds = map(int, sys.argv[1:])
    json.dumps("", ensure_ascii=True)
    "".encode("utf-8", "replace")
    confine(memory, seconds)
    try:
        found = tensors_in(_Part(begin, nbytes))
        told: dict[str, object] = {
            "tensors": [[t.name, t.code, t.shape, t.begin, t.steps] for t in found]
        }
    except AdapterError as error:
        fields = {key: getattr(error, key) for key in ("message", "tensor", "hint")}
        for key in ("got", "expected"):
            value = getattr(error, key)
            fields[key] = None if value is None else str(value)
        told = {"error": fields}
    except (MemoryError, RecursionError) as error:
        told = {"error": {"message": f"pickled weights take too much memory ({error!r})"}}
    sys.stdout.write(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
