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

from loratools_formats.contract.format import Context, Format, Loss

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.single_file_keys import Key, Naming

_SNIFFED_BYTES = 60_000
_METADATA_BYTES = 5_000
_MOST_HEADER_BYTES = 100_000_000


class SingleFile(Format):
    """The single files of one naming.

    Args:
        naming: how modules are named; also the format's name.
        description: one line for `loratools formats`.
    """

    suffixes = (".safetensors",)
    dtypes = ("f32", "f16", "bf16")
    uses_base = True
    naming: Naming

    def __init__(self, naming: Naming, description: str) -> None:
        self.name = self.naming = naming
        self.description = description

    def sniff(self, path: Path) -> bool:
        """Return whether the last 60 kB of a header have adapter keys of this naming."""
        return sniffed_naming(path) == self.naming

    def read(self, path: Path) -> Adapter:
        """Read a file; a mixture of namings can be read as any of them."""
        return self._read(path, carry_unknown=False)

    def read_with_unknown(self, path: Path) -> Adapter:
        """Read, and carry the tensors whose keys no rule claims."""
        return self._read(path, carry_unknown=True)

    def _read(self, path: Path, *, carry_unknown: bool) -> Adapter:
        from loratools_formats.disk.errors import AdapterError
        from loratools_formats.formats.singlefile.read import read

        adapter = read(path, carry_unknown=carry_unknown)
        if self.naming != "safetensors" and adapter.format not in (self.naming, "safetensors"):
            raise AdapterError(f"is not a {self.naming} file", path=path, got=adapter.format)
        return adapter

    def losses(self, adapter: Adapter) -> list[Loss]:
        """Return what a file of this naming cannot hold."""
        from loratools_formats.formats.singlefile.write import losses

        return losses(adapter, self.naming)

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write a file, with the keys that it had where they are of this naming."""
        from loratools_formats.formats.singlefile.write import write

        write(adapter, path, self.naming)

    def weights_nbytes(self, adapter: Adapter) -> int:
        """Return the size of the file that `write` would make."""
        from loratools_formats.formats.singlefile.write import weights_nbytes

        return weights_nbytes(adapter, self.naming)

    def from_model(self, adapter: Adapter, context: Context) -> Adapter:
        """Give every tensor a key of this naming; modules must already be named by it."""
        from dataclasses import replace

        from loratools_formats.core.factors import stored_as
        from loratools_formats.core.single_file_keys import NAMINGS
        from loratools_formats.formats.singlefile.spelling import respelled

        modules = {name: stored_as(delta, context.dtype) for name, delta in adapter.modules.items()}
        stored = replace(adapter, modules=modules)
        # Files of no one naming have no spelling of their own.
        as_it_is = self.naming == "safetensors" and adapter.format in NAMINGS
        return stored if as_it_is else respelled(stored, self.naming)


def sniffed_naming(path: Path) -> Naming | None:
    """Return the naming of the adapter keys in the end of a header, None if it has none."""
    from loratools_formats.containers.sniffing import is_part_of_folder, tensor_names

    if not path.is_file() or is_part_of_folder(path):
        return None
    try:
        start, end = _ends_of_header(path)
    except OSError:
        return None
    names = tensor_names(end)
    return _naming(tuple(names), scaled=_states_scale(start)) if names else None


def _states_scale(start: bytes) -> bool:
    from loratools_formats.disk.provenance import OPERATION_KEY
    from loratools_formats.formats.singlefile.scale import METADATA_KEY

    return METADATA_KEY.encode() in start or OPERATION_KEY.encode() in start


@functools.lru_cache(maxsize=4)  # every naming is asked for the same names
def _naming(names: tuple[bytes, ...], *, scaled: bool) -> Naming | None:
    from loratools_formats.core.peft_facts import OF_LANGUAGE_MODEL
    from loratools_formats.core.peft_facts import PREFIX as PEFT_PREFIX
    from loratools_formats.core.single_file_keys import parse
    from loratools_formats.formats.singlefile.left_in_names import cleaned
    from loratools_formats.formats.singlefile.read import CONTROL_MARK, OF_DIFFUSION, naming_class

    of_language_model = re.compile(OF_LANGUAGE_MODEL)
    control = CONTROL_MARK.encode() in names
    texts = [cleaned(name.decode("utf-8", "replace")) for name in names]
    keys = [parse(text, control=control) for text in texts]
    known = [key for key in keys if key is not None]
    of_diffusion = any(
        key.prefix == PEFT_PREFIX and OF_DIFFUSION.match(key.module) is not None for key in known
    )

    def is_bare(key: Key) -> bool:
        if key.role in ("alpha", "learned_embedding"):
            return False
        if key.prefix == PEFT_PREFIX:
            return not of_diffusion
        return key.style == "peft" and of_language_model.match(key.prefix + key.path) is not None

    # PEFT's weights without their configuration are another format: their scale is not 1.
    # Those of diffusion models are loaded without one everywhere, with a scale of 1 (fal), and what
    # loratools writes without one has that scale.
    scaled = scaled or any(key.role == "alpha" for key in known)
    if not scaled and any(map(is_bare, known)):
        return None
    # Checkpoints may have an alpha of their own.
    telling = any(key.role not in ("alpha", "learned_embedding", "refused") for key in known)
    return naming_class(known) if telling else None


def _ends_of_header(path: Path) -> tuple[bytes, bytes]:
    """Return the start of a header, where its metadata is, and its end; empty if there is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
            return b"", b""
        start = file.read(min(length, _METADATA_BYTES))
        if not start.startswith(b"{"):
            return b"", b""
        file.seek(8 + max(0, length - _SNIFFED_BYTES))
        return start, file.read(min(length, _SNIFFED_BYTES))


KOHYA = SingleFile(
    "kohya", "One file, flattened paths: sd-scripts, LyCORIS, OneTrainer, musubi-tuner"
)
DIFFUSERS = SingleFile("diffusers", "One file, component and dotted path: diffusers, ai-toolkit")
COMFYUI = SingleFile("comfyui", "One file, diffusion_model. before dotted paths: ComfyUI")
SAFETENSORS = SingleFile("safetensors", "One file of any other spelling, or of several")
