"""PEFT adapter folders: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

Source: the peft package, versions 0.2 to 0.21, read and run. `config` validates and resolves the
configuration, `keys` is the grammar of tensor names, `read` and `write` are the two halves,
`from_model` makes a configuration for adapters of other formats, and `legacy_bin` opens pickled
weights in a bounded child process.
"""

from __future__ import annotations

from pathlib import Path

from loratools_formats.contract.plugins import deferred
from loratools_formats.contract.registry import Format
from loratools_formats.core.alora import INVOCATION_TOKENS

_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def _sniff(path: Path) -> bool:
    folder = path.parent if path.name in _WEIGHT_FILES else path
    if not (folder / "adapter_config.json").is_file():
        return False
    # MLX adapters have a file of that name too, and weights of another.
    is_mlx = (folder / "adapters.safetensors").is_file()
    return not is_mlx or any((folder / name).is_file() for name in _WEIGHT_FILES)


FORMAT = Format(
    name="peft",
    description="PEFT adapter folder (adapter_config.json + adapter_model.safetensors or .bin)",
    suffixes=(),
    is_folder=True,
    sniff=_sniff,
    read=deferred(f"{__name__}.read", "read"),
    losses=deferred(f"{__name__}.write", "losses"),
    write=deferred(f"{__name__}.write", "write"),
    weights_nbytes=deferred(f"{__name__}.write", "weights_nbytes"),
    merged_config=deferred(f"{__name__}.targets", "merged_config"),
    from_model=deferred(f"{__name__}.from_model", "from_model"),
    dtypes=("f32", "f16", "bf16"),
    caveats_kept=(INVOCATION_TOKENS,),
    plain_config=deferred(f"{__name__}.targets", "plain_config"),
)
