"""PEFT adapter folders: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

Source: the peft package, versions 0.2 to 0.21, read and run. `config` validates and resolves the
configuration, `keys` is the grammar of tensor names, `read` and `write` are the two halves,
`from_model` makes a configuration for adapters of other formats, and `legacy_bin` opens pickled
weights in a bounded child process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.alora import INVOCATION_TOKENS
from loratools_formats.registry import Context, Format, Loss

if TYPE_CHECKING:
    from loratools_formats.adapter import Adapter

_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def _sniff(path: Path) -> bool:
    folder = path.parent if path.name in _WEIGHT_FILES else path
    if not (folder / "adapter_config.json").is_file():
        return False
    # MLX adapters have a file of that name too, and weights of another.
    is_mlx = (folder / "adapters.safetensors").is_file()
    return not is_mlx or any((folder / name).is_file() for name in _WEIGHT_FILES)


def _read(path: Path) -> Adapter:
    from loratools_formats.peft.read import read

    return read(path)


def _losses(adapter: Adapter) -> list[Loss]:
    from loratools_formats.peft.write import losses

    return losses(adapter)


def _write(adapter: Adapter, path: Path) -> None:
    from loratools_formats.peft.write import write

    write(adapter, path)


def _weights_nbytes(adapter: Adapter) -> int:
    from loratools_formats.peft.write import weights_nbytes

    return weights_nbytes(adapter)


def _merged_config(adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    from loratools_formats.peft.targets import merged_config

    return merged_config(adapters)


def _from_model(adapter: Adapter, context: Context) -> Adapter:
    from loratools_formats.peft.from_model import from_model

    return from_model(adapter, context)


def _plain_config(adapter: Adapter) -> Mapping[str, Any]:
    from loratools_formats.peft.targets import plain_config

    return plain_config(adapter)


FORMAT = Format(
    name="peft",
    description="PEFT adapter folder (adapter_config.json + adapter_model.safetensors or .bin)",
    suffixes=(),
    is_folder=True,
    sniff=_sniff,
    read=_read,
    losses=_losses,
    write=_write,
    weights_nbytes=_weights_nbytes,
    merged_config=_merged_config,
    from_model=_from_model,
    dtypes=("f32", "f16", "bf16"),
    caveats_kept=(INVOCATION_TOKENS,),
    plain_config=_plain_config,
)
