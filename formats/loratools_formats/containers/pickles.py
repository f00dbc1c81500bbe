"""Pickled weights (`adapter_model.bin`, `.pt`) opened without trusting them, and without torch.

A child process finds out where each tensor lies (`torch_states`). It is given the open file and
nothing else: its memory and time are bounded, and it can open no file and no connection
(`confined`). The tensors are then read from the file itself, as those of any other container are.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools_formats.containers.safetensors_read import (
    DEFAULT_LIMITS,
    SafetensorsFile,
    check_name,
)
from loratools_formats.containers.torch_globals import SAVE_AGAIN
from loratools_formats.containers.torch_states import ARCHIVE_START, PICKLE_START
from loratools_formats.core.dtypes import DTYPES, DType
from loratools_formats.core.tensors import Buffer, TensorRef, in_file
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile
from loratools_formats.disk.first_bytes import refuse_other_file

_MEMORY_BYTES = 1 << 30
_CPU_SECONDS = 30
_TIMEOUT_SECONDS = 120.0  # of the clock, on a busy machine
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


def read_bin(path: Path, part: tuple[int, int] | None = None) -> SafetensorsFile:
    """Read a pickled state dict.

    Args:
        path: the file.
        part: where its bytes begin in the file and how many there are, if it is part of one.

    Raises:
        MissingFileError: nothing is at `path`.
        AdapterError: not a plain map of names to tensors, compressed, too large, or hostile.
    """
    file = RegularFile(path)
    try:
        begin, nbytes = part or (0, file.nbytes)
        _check_start(file, begin, nbytes)
        found = _found(file, begin, nbytes)
        return SafetensorsFile(file, {}, _tensors(file, begin, found))
    except AdapterError:
        file.close()
        raise


def _check_start(file: RegularFile, begin: int, nbytes: int) -> None:
    """Refuse what is neither of torch's containers before a process is started for it."""
    start = bytes(file.read_at(begin, min(nbytes, _TAR_MAGIC_AT + len(_TAR_MAGIC))))
    if start[_TAR_MAGIC_AT:] == _TAR_MAGIC:
        raise AdapterError(
            "is a tar archive, as torch saved before 2017, or not pickled weights",
            path=file.path,
            hint=SAVE_AGAIN,
        )
    refuse_other_file(start, nbytes, file.path)
    if not start.startswith((ARCHIVE_START, PICKLE_START)):
        raise AdapterError("is not a file of pickled weights", path=file.path, got=start[:24])


def _found(file: RegularFile, begin: int, nbytes: int) -> list[list[Any]]:
    """Return what the child found in a file.

    Raises:
        AdapterError: it refused the file, or was stopped.
    """
    # -P: no module is imported from the current folder, which may be the adapter's.
    command = [sys.executable, "-P", "-m", "loratools_formats.containers.pickle_child"]
    command += [str(begin), str(nbytes), str(_MEMORY_BYTES), str(_CPU_SECONDS)]
    try:
        child = subprocess.run(
            command, stdin=file.fileno(), capture_output=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterError("pickled weights take too long to read", path=file.path) from error
    try:
        told = json.loads(child.stdout) if child.returncode == 0 else None
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise AdapterError(
            "pickled weights could not be read within the limits of memory and time",
            path=file.path,
            got=_failure(child),
            hint=SAVE_AGAIN,
        )
    if "error" in told:
        fields: dict[str, Any] = told["error"]
        raise AdapterError(fields.pop("message"), path=file.path, **fields)
    tensors: list[list[Any]] = told["tensors"]
    return tensors


def _failure(child: subprocess.CompletedProcess[bytes]) -> str:
    if child.returncode < 0:
        return f"a reader stopped by {signal.Signals(-child.returncode).name}"
    lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {child.returncode}"


def _tensors(file: RegularFile, begin: int, found: list[list[Any]]) -> Mapping[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for name, code, shape, offset, steps in found:
        check_name(name, file.path, DEFAULT_LIMITS)
        place = (name, DTYPES[code], tuple(shape), file, begin + offset)
        tensors[name] = in_file(*place) if steps is None else _strided(*place, tuple(steps))
    return tensors


def _strided(
    key: str,
    dtype: DType,
    shape: tuple[int, ...],
    file: RegularFile,
    offset: int,
    steps: tuple[int, ...],
) -> TensorRef:
    """Return a tensor whose elements lie `steps` elements apart; put in order when it is read."""
    width = dtype.bits // 8
    extent = sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) + 1

    def read() -> Buffer:
        import numpy as np

        stored = np.frombuffer(file.read_at(offset, extent * width), np.dtype(f"V{width}"))
        apart = tuple(step * width for step in steps)
        view = np.lib.stride_tricks.as_strided(stored, shape, apart, writeable=False)
        return np.ascontiguousarray(view).tobytes()

    return TensorRef(key, dtype, shape, read)
