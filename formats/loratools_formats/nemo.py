"""NeMo 1's `.nemo` archives of adapters: a tar with a state dict in Megatron's names; read only.

The weights are copied out and opened as any pickled state dict is. Archives that are compressed, or
hold the shards of several ranks, are refused. What the names mean is in `megatron`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratools_formats.megatron import adapter_of
from loratools_formats.registry import Format
from loratools_formats.statedict import StateDict

if TYPE_CHECKING:
    from loratools_formats.adapter import Adapter

_SUFFIX = ".nemo"
_WEIGHTS = "model_weights.ckpt"
_MAX_MEMBERS = 10_000
_MAGIC, _MAGIC_AT = b"ustar", 257
_GZIP = b"\x1f\x8b"
_PIECE = 1 << 24


def _sniff(path: Path) -> bool:
    if path.suffix != _SUFFIX or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_MAGIC_AT + len(_MAGIC))
    return start.startswith(_GZIP) or start[_MAGIC_AT:] == _MAGIC


def _read(path: Path) -> Adapter:
    import tarfile
    import tempfile

    from loratools_formats.errors import AdapterError

    with tempfile.TemporaryDirectory(prefix="loratools-") as folder:
        content = Path(folder) / _WEIGHTS
        try:
            _copy_weights(path, content)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(
                f"cannot be read as an archive: {error}",
                path=path,
                hint="If it is compressed, unpack it and name its model_weights.ckpt",
            ) from error
        return adapter_of(StateDict(path, content), FORMAT.name, path)


def _copy_weights(path: Path, target: Path) -> None:
    """Copy the one file of weights out of an archive that is not compressed.

    Raises:
        AdapterError: there is none, or one for each of several ranks.
    """
    import tarfile

    from loratools_formats.errors import AdapterError

    with tarfile.open(path, "r:") as archive:
        found = []
        for count, member in enumerate(archive):
            if count >= _MAX_MEMBERS:
                raise AdapterError("archive has too many members", path=path)
            if member.isreg() and member.name.rpartition("/")[2] == _WEIGHTS:
                found.append(member)
            if member.issparse():
                raise AdapterError("archive has a sparse member", path=path, got=member.name)
        if len(found) != 1:
            raise AdapterError(
                f"archive has not one {_WEIGHTS}",
                path=path,
                got=", ".join(member.name for member in found) or "none",
                hint="Merge the ranks of tensor parallelism first",
            )
        source = archive.extractfile(found[0])
        assert source is not None
        with source, target.open("wb") as copy:
            while piece := source.read(_PIECE):
                copy.write(piece)


FORMAT = Format(
    name="nemo",
    description="NeMo 1 archive of an adapter (.nemo)",
    suffixes=(_SUFFIX,),
    is_folder=False,
    sniff=_sniff,
    read=_read,
)
