"""NeMo 1's `.nemo` archives of adapters: a tar with a state dict in Megatron's names; read only.

The weights are opened where they lie, as any pickled state dict is. Alpha is taken from
`peft.lora_tuning` of the `model_config.yaml` beside them, if it is a number there, and asked for
otherwise; nothing else of that file is used. Archives that are compressed, or hold the shards of
several ranks, are refused. What the names mean is in `megatron`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loratools_formats.contract.format import Format
from loratools_formats.formats.statedicts.megatron import adapter_of
from loratools_formats.formats.statedicts.statedict import StateDict

if TYPE_CHECKING:
    from pathlib import Path

    from loratools_formats.containers.tar_members import Member
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.disk.files import RegularFile

_SUFFIX = ".nemo"
_WEIGHTS = "model_weights.ckpt"
_CONFIG = "model_config.yaml"
_MAX_CONFIG_BYTES = 1 << 18
_MAGIC, _MAGIC_AT = b"ustar", 257
_GZIP = b"\x1f\x8b"
_AXES = 2
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
        from loratools_formats.disk.files import RegularFile

        file = RegularFile(path)
        try:
            weights, config = _found(file)
            state = StateDict(path, (weights.offset, weights.nbytes))
        finally:
            file.close()
        tuning = _tuning(config, path)
        ranks = {
            ref.shape[-2]
            for key, ref in state.tensors.items()
            if key.endswith(_FACTOR) and len(ref.shape) >= _AXES
        }
        return adapter_of(state, self.name, _alpha(tuning, ranks, path))


def _found(file: RegularFile) -> tuple[Member, bytes]:
    """Return where the one file of weights in an archive is, and its configuration, or nothing.

    Raises:
        AdapterError: there are no weights, or some for each of several ranks; several
            configurations, or one that is too large.
    """
    from loratools_formats.containers.tar_members import tar_members
    from loratools_formats.disk.errors import AdapterError

    members = tar_members(file)
    found = [member for member in members if member.name.rpartition("/")[2] == _WEIGHTS]
    configs = [member for member in members if member.name.rpartition("/")[2] == _CONFIG]
    if len(found) != 1:
        raise AdapterError(
            f"archive does not have exactly one {_WEIGHTS}",
            path=file.path,
            got=", ".join(member.name for member in found) or "none",
            hint="Merge the ranks of tensor parallelism first",
        )
    if len(configs) > 1 or any(member.nbytes > _MAX_CONFIG_BYTES for member in configs):
        raise AdapterError(
            f"archive has more than one {_CONFIG} of at most {_MAX_CONFIG_BYTES} bytes",
            path=file.path,
            got=", ".join(f"{member.nbytes} bytes" for member in configs),
        )
    config = file.read_at(configs[0].offset, configs[0].nbytes) if configs else b""
    return found[0], config


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
