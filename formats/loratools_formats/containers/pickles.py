"""Pickled weights (`adapter_model.bin`) opened without trusting them.

A child process with bounded memory and time loads the file with `torch.load(weights_only=True)`,
checks that its tensors claim no more than the file holds, and writes a temporary safetensors file,
which is then read like any other. The temporary is unlinked as soon as it is open. What is one
tensor under several names, such as a bank that all modules share, is written once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools_formats.containers.safetensors_read import SafetensorsFile, read_safetensors
from loratools_formats.disk.errors import AdapterError, MissingDependencyError
from loratools_formats.disk.files import RegularFile, refuse_lfs_pointer

_ARCHIVE_START = b"PK\x03\x04"
_PICKLE_START = b"\x80"
_EXTRA_BYTES = 1 << 30
_MEMORY_PER_BYTE = 4
_MAX_SHARING = 2  # tied embeddings are stored once under two names
_CPU_SECONDS = 3
_BYTES_PER_CPU_SECOND = 50_000_000
_TIMEOUT_SECONDS = 120.0  # of the clock, to import torch on a busy machine
_NO_TORCH = 3
_SAME = "same"  # metadata of the temporary: names of tensors, by others that name the same
_MAX_SAME = 4096

if TYPE_CHECKING:
    import torch


def read_bin(path: Path) -> tuple[SafetensorsFile, RegularFile]:
    """Read a pickled state dict; returns its tensors and the original file.

    Raises:
        MissingDependencyError: torch is not installed.
        AdapterError: not a plain map of names to tensors, compressed, too large, or hostile.
    """
    original = RegularFile(path)
    _check_container(original)
    with tempfile.TemporaryDirectory(prefix="loratools-") as folder:
        out = Path(folder) / "weights.safetensors"
        # -P: no module is imported from the current folder, which may be the adapter's.
        command = [sys.executable, "-P", "-m", __name__, os.fspath(path), os.fspath(out)]
        try:
            child = subprocess.run(
                command,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise AdapterError("pickled weights take too long to load", path=path) from error
        if child.returncode == _NO_TORCH:
            raise MissingDependencyError(
                "torch is needed to read pickled weights", path=path, hint="pip install torch"
            )
        if child.returncode != 0:
            raise AdapterError(
                "pickled weights are not a plain map of names to tensors",
                path=path,
                got=_failure(child),
                hint="Save the adapter again as safetensors",
            )
        return _with_all_names(read_safetensors(out)), original


def _with_all_names(weights: SafetensorsFile) -> SafetensorsFile:
    """Return what the child wrote with the names of tensors that it wrote under others."""
    same = json.loads(weights.metadata[_SAME])
    others = {name: replace(weights.tensors[first], key=name) for name, first in same.items()}
    return replace(weights, metadata={}, tensors={**weights.tensors, **others})


def _failure(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode < 0:
        return f"a loader stopped by {signal.Signals(-child.returncode).name}"
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {child.returncode}"


def _check_container(file: RegularFile) -> None:
    """Refuse files that are no pickles before torch is imported, and archives that could expand."""
    start = bytes(file.read_at(0, min(file.nbytes, 64)))
    refuse_lfs_pointer(start, file.path)
    if start.startswith(_ARCHIVE_START):
        _check_archive(file)
    elif not start.startswith(_PICKLE_START):  # the format before torch 1.6 is a plain pickle
        raise AdapterError("is not a file of pickled weights", path=file.path, got=start[:24])


def _check_archive(file: RegularFile) -> None:
    """Refuse compressed members, which can expand without bound; torch writes none."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise AdapterError(f"cannot be read as an archive: {error}", path=file.path) from error
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise AdapterError(
                "pickled weights hold a compressed member", path=file.path, got=member.filename
            )


def _limit_resources(file_nbytes: int) -> None:
    """Bound what loading may cost from here on; the bounds outlive a parent that is killed."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + _CPU_SECONDS
        for limit, value in (
            (resource.RLIMIT_DATA, _EXTRA_BYTES + _MEMORY_PER_BYTE * file_nbytes),
            (resource.RLIMIT_CPU, seconds + file_nbytes // _BYTES_PER_CPU_SECOND),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(limit)
            ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (ceiling, hard))


def _checked_nbytes(name: object, value: object, file_nbytes: int) -> int:
    """Return the size of a tensor that the file can hold.

    Raises:
        TypeError: not a plain tensor with a name.
        ValueError: it claims more bytes than its storage or the file has.
    """
    import torch

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise TypeError(f"entry {name!r} is a {type(value).__name__}, not a tensor")
    if value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"tensor {name} is sparse or quantised")
    claimed = value.numel() * value.element_size()
    if claimed > value.untyped_storage().nbytes() or claimed > file_nbytes:
        raise ValueError(f"tensor {name} claims {claimed} bytes, more than the file stores")
    return claimed


def convert(source: str, target: str) -> None:
    """Load `source` with torch, check it and write `target`; runs in the child process."""
    import torch
    from safetensors.torch import save_file

    file_nbytes = os.path.getsize(source)
    torch.set_num_threads(1)  # the stacks of more would count as memory
    _limit_resources(file_nbytes)
    state = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError(f"content is a {type(state).__name__}, not a map")
    if list(state) == ["model_state_dict"] and isinstance(state["model_state_dict"], dict):
        state = state["model_state_dict"]  # as the examples of loralib save theirs
    sizes = {name: _checked_nbytes(name, value, file_nbytes) for name, value in state.items()}
    same = _same(state)
    if len(same) > _MAX_SAME:
        raise ValueError(f"{len(same)} names are of tensors that have others")
    total = sum(nbytes for name, nbytes in sizes.items() if name not in same)
    if total > _MAX_SHARING * file_nbytes:
        raise ValueError(f"tensors share storage and claim {total} bytes, many times the file")
    save_file(
        {name: v.detach().clone().contiguous() for name, v in state.items() if name not in same},
        target,
        metadata={_SAME: json.dumps(same)},
    )


def _same(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the first name of each tensor that is the same as one before it, by its own."""
    first: dict[object, str] = {}
    same = {}
    for name, value in state.items():
        memory = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and first.setdefault(memory, name) != name:
            same[name] = first[memory]
    return same


def _reason_of(error: Exception) -> str:
    """Return one line of an error, without torch's advice to load the file unprotected."""
    told = [line.partition("WeightsUnpickler error:")[2].strip() for line in f"{error}".split("\n")]
    lines = [line for line in told if line] or [line.strip() for line in f"{error}".split("\n")]
    reasons = [line for line in lines if line and not line.startswith("Weights only load failed")]
    return reasons[0].partition(" by default. Please")[0] if reasons else ""


def main() -> int:
    """Run the conversion; the last line on stderr is the reason if it fails."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return _NO_TORCH
    try:
        convert(sys.argv[1], sys.argv[2])
    except Exception as error:  # noqa: BLE001 - the parent turns any failure into one error
        print(f"{type(error).__name__}: {_reason_of(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
