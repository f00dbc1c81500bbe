"""Adapters in one safetensors file, in any of the dialects of the diffusion world.

Four formats share one grammar and one reader. They differ in how modules are named, which is all
that matters to who loads them: `kohya` flattens paths, `diffusers` puts a pipeline's component
before a dotted path, `comfyui` puts `diffusion_model.` there, and `safetensors` is whatever mixes
these or does otherwise; it is written as it was read, and has no names of its own.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from loratools_formats.contract.registry import Context, Format, Loss
from loratools_formats.formats.statedicts.peft_weights import is_bare

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.formats.singlefile.grammar import Class

NAMES: tuple[Class, ...] = ("kohya", "diffusers", "comfyui", "safetensors")

_SNIFFED_BYTES = 60_000
_MOST_HEADER_BYTES = 100_000_000
_ENTRY = re.compile(rb'"((?:[^"\\]|\\.)+)":\s*\{\s*"(?:dtype|shape|data_offsets)"')
_CONFIG = "adapter_config.json"
_WEIGHTS_OF_FOLDERS = ("adapter_model.safetensors", "adapters.safetensors")


def _sniff(naming: Class, path: Path) -> bool:
    return _sniffed(path) == naming


def _sniffed(path: Path) -> Class | None:
    """Return the naming of the adapter keys in the last 60 kB of a header, None if it has none."""
    if not path.is_file():
        return None
    if path.name in _WEIGHTS_OF_FOLDERS and (path.parent / _CONFIG).is_file():
        return None
    try:
        tail = _end_of_header(path)
    except OSError:
        return None
    names = [found[1] for found in _ENTRY.finditer(tail)]
    return None if is_bare(path, names) else _naming(names)


def _end_of_header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
            return b""
        if file.read(1) != b"{":
            return b""
        file.seek(8 + max(0, length - _SNIFFED_BYTES))
        return file.read(min(length, _SNIFFED_BYTES))


def _naming(names: list[bytes]) -> Class | None:
    from loratools_formats.formats.singlefile.grammar import parse
    from loratools_formats.formats.singlefile.read import CONTROL_MARK, naming_class

    control = CONTROL_MARK.encode() in names
    keys = [parse(name.decode("utf-8", "replace"), control=control) for name in names]
    known = [key for key in keys if key is not None]
    # Checkpoints may have an alpha of their own.
    telling = any(key.role not in ("alpha", "learned_embedding", "refused") for key in known)
    return naming_class(known) if telling else None


def _read(naming: Class, path: Path, *, carry_unknown: bool = False) -> Adapter:
    from loratools_formats.disk.errors import AdapterError
    from loratools_formats.formats.singlefile.read import read

    adapter = read(path, carry_unknown=carry_unknown)
    if naming != "safetensors" and adapter.format not in (naming, "safetensors"):
        raise AdapterError(f"is not a {naming} file", path=path, got=adapter.format)
    return adapter


def _losses(naming: Class, adapter: Adapter) -> list[Loss]:
    from loratools_formats.formats.singlefile.write import losses

    return losses(adapter, naming)


def _write(naming: Class, adapter: Adapter, path: Path) -> None:
    from loratools_formats.formats.singlefile.write import write

    write(adapter, path, naming)


def _from_model(naming: Class, adapter: Adapter, context: Context) -> Adapter:
    from dataclasses import replace

    from loratools_formats.core.factors import stored_as
    from loratools_formats.formats.singlefile.spelling import respelled

    modules = {name: stored_as(delta, context.dtype) for name, delta in adapter.modules.items()}
    stored = replace(adapter, modules=modules)
    # Files of no one naming have no spelling of their own.
    return (
        stored if naming == "safetensors" and adapter.format in NAMES else respelled(stored, naming)
    )


def _weights_nbytes(naming: Class, adapter: Adapter) -> int:
    from loratools_formats.formats.singlefile.write import weights_nbytes

    return weights_nbytes(adapter, naming)


def _format(naming: Class, description: str) -> Format:
    return Format(
        name=naming,
        description=description,
        suffixes=(".safetensors",),
        is_folder=False,
        sniff=functools.partial(_sniff, naming),
        read=functools.partial(_read, naming),
        read_with_unknown=functools.partial(_read, naming, carry_unknown=True),
        losses=functools.partial(_losses, naming),
        write=functools.partial(_write, naming),
        weights_nbytes=functools.partial(_weights_nbytes, naming),
        from_model=functools.partial(_from_model, naming),
        dtypes=("f32", "f16", "bf16"),
    )


KOHYA = _format("kohya", "One file, flattened paths: sd-scripts, LyCORIS, OneTrainer, musubi-tuner")
DIFFUSERS = _format("diffusers", "One file, component and dotted path: diffusers, ai-toolkit")
COMFYUI = _format("comfyui", "One file, diffusion_model. before dotted paths: ComfyUI")
SAFETENSORS = _format("safetensors", "One file of any other spelling, or of several")
