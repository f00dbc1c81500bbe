"""GGUF: LoRA adapters for llama.cpp.

`architectures` is the table of layouts, `base` finds a base model's facts, `read` and `write` are
the two halves of the format, `from_model` and `to_model` lead from the base model's names to the
file's and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.contract.format import Context, Format, Loss

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter


class Gguf(Format):
    """Adapter files for llama.cpp."""

    name = "gguf"
    description = "GGUF adapter file for llama.cpp"
    suffixes = (".gguf",)
    dtypes = ("f32", "f16", "bf16", "q8_0")
    caveats_kept = ("activated-lora",)
    uses_base = True

    def sniff(self, path: Path) -> bool:
        """Return whether a file begins as GGUF does."""
        from loratools_formats.containers.gguf.container import is_gguf

        return is_gguf(path)

    def read(self, path: Path) -> Adapter:
        """Read an adapter file."""
        from loratools_formats.formats.gguf.read import read

        return read(path)

    def losses(self, adapter: Adapter) -> list[Loss]:
        """Return what llama.cpp's adapters cannot hold."""
        from loratools_formats.formats.gguf.write import losses

        return losses(adapter)

    def without_place(self, adapter: Adapter, context: Context) -> list[Loss]:
        """Return the modules that llama.cpp would ignore for a base model."""
        if context.base is None:
            return []
        from loratools_formats.formats.gguf.base import read_base
        from loratools_formats.formats.gguf.from_model import without_place

        return without_place(adapter, read_base(context.base))

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write a file."""
        from loratools_formats.formats.gguf.write import write

        write(adapter, path)

    def weights_nbytes(self, adapter: Adapter) -> int:
        """Return the size of the file that `write` would make."""
        from loratools_formats.formats.gguf.write import weights_nbytes

        return weights_nbytes(adapter)

    def to_model(self, adapter: Adapter, context: Context) -> Adapter:
        """Put fused and permuted tensors back in the base model's layout."""
        from loratools_formats.formats.gguf.to_model import to_model

        return to_model(adapter, context)

    def from_model(self, adapter: Adapter, context: Context) -> Adapter:
        """Give modules GGUF's names and layout, checked against the base model."""
        from loratools_formats.formats.gguf.from_model import from_model

        return from_model(adapter, context)

    def rows_in_base(self, base: Path) -> Callable[[str], Mapping[str, list[int]]]:
        """Return what tells how a GGUF model keeps a module's rows."""
        from functools import partial

        from loratools_formats.formats.gguf.base import read_base
        from loratools_formats.formats.gguf.from_model import rows_in_gguf

        return partial(rows_in_gguf, read_base(base))

    def merged_config(self, adapters: Sequence[Adapter]) -> Mapping[str, Any]:
        """Return the first configuration if all are for one architecture."""
        from loratools_formats.formats.gguf.write import merged_config

        return merged_config(adapters)


FORMAT = Gguf()
