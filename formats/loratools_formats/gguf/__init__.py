"""GGUF: LoRA adapters for llama.cpp, and the container that its models come in.

`container` reads headers, `ggml_types` decodes values, `architectures` is the table of layouts,
`base` finds a base model's facts, `read` and `write` are the two halves of the format,
`from_model` and `to_model` lead from the base model's names to the file's and back, and `model` is
for models that are to be changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.alora import INVOCATION_TOKENS
from loratools_formats.registry import Context, Format, Loss

if TYPE_CHECKING:
    from loratools_formats.adapter import Adapter


def _sniff(path: Path) -> bool:
    from loratools_formats.gguf.container import is_gguf

    return is_gguf(path)


def _read(path: Path) -> Adapter:
    from loratools_formats.gguf.read import read

    return read(path)


def _losses(adapter: Adapter) -> list[Loss]:
    from loratools_formats.gguf.write import losses

    return losses(adapter)


def _write(adapter: Adapter, path: Path) -> None:
    from loratools_formats.gguf.write import write

    write(adapter, path)


def _weights_nbytes(adapter: Adapter) -> int:
    from loratools_formats.gguf.write import weights_nbytes

    return weights_nbytes(adapter)


def _merged_config(adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    from loratools_formats.gguf.write import merged_config

    return merged_config(adapters)


def _to_model(adapter: Adapter, context: Context) -> Adapter:
    from loratools_formats.gguf.to_model import to_model

    return to_model(adapter, context)


def _from_model(adapter: Adapter, context: Context) -> Adapter:
    from loratools_formats.gguf.from_model import from_model

    return from_model(adapter, context)


FORMAT = Format(
    name="gguf",
    description="GGUF adapter file for llama.cpp",
    suffixes=(".gguf",),
    is_folder=False,
    sniff=_sniff,
    read=_read,
    losses=_losses,
    write=_write,
    weights_nbytes=_weights_nbytes,
    merged_config=_merged_config,
    to_model=_to_model,
    from_model=_from_model,
    dtypes=("f32", "f16", "bf16", "q8_0"),
    caveats_kept=(INVOCATION_TOKENS,),
)
