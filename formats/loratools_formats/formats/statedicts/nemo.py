"""NeMo 1's `.nemo` archives of adapters: a tar with a state dict in Megatron's names; read only.

The weights are copied out and opened as any pickled state dict is. Alpha is taken from
`peft.lora_tuning` of the `model_config.yaml` beside them, if it is a number there, and asked for
otherwise; nothing else of that file is used. Archives that are compressed, or hold the shards of
several ranks, are refused. What the names mean is in `megatron`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.contract.format import Format
from loratools_formats.formats.statedicts.megatron import adapter_of
from loratools_formats.formats.statedicts.statedict import StateDict

if TYPE_CHECKING:
    import tarfile

    from loratools_formats.core.adapter import Adapter

_SUFFIX = ".nemo"
_WEIGHTS = "model_weights.ckpt"
_CONFIG = "model_config.yaml"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_MEMBERS = 10_000
_MAGIC, _MAGIC_AT = b"ustar", 257
_GZIP = b"\x1f\x8b"
_PIECE = 1 << 24
_FACTOR = ".linear_in.weight"


class Nemo(Format):
    """Archives of NeMo 1."""

    name = "nemo"
    description = "NeMo 1 archive of an adapter (.nemo)"
    suffixes = (_SUFFIX,)

    def sniff(self, path: Path) -> bool:
        """Return whether a file has the suffix, and begins as an archive does."""
        if path.suffix != _SUFFIX or not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(_MAGIC_AT + len(_MAGIC))
        return start.startswith(_GZIP) or start[_MAGIC_AT:] == _MAGIC

    def read(self, path: Path) -> Adapter:
        """Read the one file of weights in an archive, and its alpha."""
        import tarfile
        import tempfile

        from loratools_formats.disk.errors import AdapterError

        with tempfile.TemporaryDirectory(prefix="loratools-") as folder:
            content = Path(folder) / _WEIGHTS
            try:
                tuning = _tuning(_opened(path, content), path)
            except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                if isinstance(error, AdapterError):
                    raise
                raise AdapterError(
                    f"cannot be read as an archive: {error}",
                    path=path,
                    hint="If it is compressed, unpack it and name its model_weights.ckpt",
                ) from error
            state = StateDict(path, content)
            ranks = {ref.shape[-2] for key, ref in state.tensors.items() if key.endswith(_FACTOR)}
            return adapter_of(state, self.name, _alpha(tuning, ranks, path))


def _opened(path: Path, target: Path) -> bytes:
    """Copy the one file of weights out of an archive, and return its configuration, or nothing.

    Raises:
        AdapterError: there are no weights, or some for each of several ranks; several
            configurations, or one that is too large.
    """
    import tarfile

    from loratools_formats.disk.errors import AdapterError

    with tarfile.open(path, "r:") as archive:
        found: list[tarfile.TarInfo] = []
        configs: list[tarfile.TarInfo] = []
        for count, member in enumerate(archive):
            if count >= _MAX_MEMBERS:
                raise AdapterError("archive has too many members", path=path)
            if member.isreg() and member.name.rpartition("/")[2] == _WEIGHTS:
                found.append(member)
            if member.isreg() and member.name.rpartition("/")[2] == _CONFIG:
                configs.append(member)
            if member.issparse():
                raise AdapterError("archive has a sparse member", path=path, got=member.name)
        if len(found) != 1:
            raise AdapterError(
                f"archive has not one {_WEIGHTS}",
                path=path,
                got=", ".join(member.name for member in found) or "none",
                hint="Merge the ranks of tensor parallelism first",
            )
        if len(configs) > 1 or any(member.size > _MAX_CONFIG_BYTES for member in configs):
            raise AdapterError(
                f"archive has more than one {_CONFIG} of at most {_MAX_CONFIG_BYTES} bytes",
                path=path,
                got=", ".join(f"{member.size} bytes" for member in configs),
            )
        source = archive.extractfile(found[0])
        assert source is not None
        with source, target.open("wb") as copy:
            while piece := source.read(_PIECE):
                copy.write(piece)
        file = archive.extractfile(configs[0]) if configs else None
        return b"" if file is None else file.read(_MAX_CONFIG_BYTES)


def _tuning(config: bytes, path: Path) -> dict[str, Any]:
    """Return what a configuration says of LoRA.

    Raises:
        AdapterError: it is malformed.
    """
    from loratools_formats.disk import strict_yaml
    from loratools_formats.disk.errors import AdapterError

    try:
        tuning: Any = strict_yaml.loads(config)
    except strict_yaml.StrictYamlError as error:
        raise AdapterError(
            f"{_CONFIG} is not sound YAML: {error}",
            path=path,
            hint="Unpack the archive, and name its model_weights.ckpt",
        ) from error
    for key in ("peft", "lora_tuning"):
        tuning = tuning.get(key) if isinstance(tuning, dict) else None
    return tuning if isinstance(tuning, dict) else {}


def _alpha(tuning: dict[str, Any], ranks: set[int], path: Path) -> float | None:
    """Return alpha as the configuration states it, None if it does not.

    Raises:
        AdapterError: the configuration is of adapters of other ranks.
    """
    from loratools_formats.disk.errors import AdapterError

    alpha, rank = tuning.get("alpha"), tuning.get("adapter_dim")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        return None
    if isinstance(rank, int) and ranks != {rank}:
        raise AdapterError(
            f"{_CONFIG} is of adapters of another rank",
            path=path,
            got=f"adapter_dim {rank}",
            expected=", ".join(map(str, sorted(ranks))),
            hint="Unpack the archive, and give alpha with `set=alpha=VALUE`",
        )
    return float(alpha)


FORMAT = Nemo()
