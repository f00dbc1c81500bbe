"""Pickled weights (`adapter_model.bin`) opened without trusting them.

A child process with bounded memory and time loads the file with `torch.load(weights_only=True)`,
checks that no tensor claims more than the file holds, and writes a temporary safetensors file,
which is then read like any other. The temporary is unlinked as soon as it is open.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from loratools_formats.errors import AdapterError, MissingDependencyError
from loratools_formats.files import RegularFile
from loratools_formats.safetensors_io import SafetensorsFile, read_safetensors

if TYPE_CHECKING:
    import torch

_EXTRA_BYTES = 3 << 30
_TIMEOUT_SECONDS = 120.0
_NO_TORCH = 3


def read_bin(path: Path) -> tuple[SafetensorsFile, RegularFile]:
    """Read a pickled state dict; returns its tensors and the original file.

    Raises:
        MissingDependencyError: torch is not installed.
        AdapterError: not a plain map of names to tensors, compressed, too large, or hostile.
    """
    original = RegularFile(path)
    _check_archive(original)
    with tempfile.TemporaryDirectory(prefix="loratools-") as folder:
        out = Path(folder) / "weights.safetensors"
        command = [sys.executable, "-m", __name__, os.fspath(path), os.fspath(out)]
        try:
            child = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise AdapterError("pickled weights take too long to load", path=path) from error
        if child.returncode == _NO_TORCH:
            raise MissingDependencyError(
                "torch is needed to read pickled weights", path=path, hint="pip install torch"
            )
        if child.returncode != 0:
            lines = child.stderr.strip().splitlines()
            raise AdapterError(
                "pickled weights are not a plain map of names to tensors",
                path=path,
                got=lines[-1] if lines else f"exit status {child.returncode}",
                hint="Save the adapter again as safetensors",
            )
        return read_safetensors(out), original


def _check_archive(file: RegularFile) -> None:
    """Refuse compressed zip members, which can expand without bound; torch writes none."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise AdapterError(
                        "pickled weights hold a compressed member",
                        path=file.path,
                        got=member.filename,
                    )
    except zipfile.BadZipFile:
        return  # the format before torch 1.6 is a plain pickle; torch decides
    except (OSError, ValueError, EOFError) as error:
        raise AdapterError(f"cannot be read as an archive: {error}", path=file.path) from error


def _limit_memory(nbytes: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        ceiling = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, hard))


def _check_tensor(name: object, value: object, file_nbytes: int) -> torch.Tensor:
    import torch

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise TypeError(f"entry {name!r} is a {type(value).__name__}, not a tensor")
    if value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"tensor {name} is sparse or quantised")
    claimed = value.numel() * value.element_size()
    if claimed > value.untyped_storage().nbytes() or claimed > file_nbytes:
        raise ValueError(f"tensor {name} claims {claimed} bytes, more than the file stores")
    return value


def convert(source: str, target: str) -> None:
    """Load `source` with torch, check it and write `target`; runs in the child process."""
    import torch
    from safetensors.torch import save_file

    file_nbytes = os.path.getsize(source)
    _limit_memory(_EXTRA_BYTES + 4 * file_nbytes)
    state = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError(f"content is a {type(state).__name__}, not a map")
    tensors = {
        name: _check_tensor(name, value, file_nbytes).detach().clone().contiguous()
        for name, value in state.items()
    }
    save_file(tensors, target)


def main() -> int:
    """Run the conversion; the last line on stderr is the reason if it fails."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return _NO_TORCH
    try:
        convert(sys.argv[1], sys.argv[2])
    except Exception as error:  # noqa: BLE001 - the parent turns any failure into one error
        reason = str(error).strip().splitlines() or [""]
        print(f"{type(error).__name__}: {reason[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
