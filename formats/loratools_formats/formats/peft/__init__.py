"""PEFT adapter folders: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

Source: the peft package, versions 0.2 to 0.21, read and run. `config` validates and resolves the
configuration, `keys` is the grammar of tensor names, `read` and `write` are the two halves,
`targets` says which modules a configuration adapts, and `from_model` makes a configuration for
adapters of other formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.contract.format import Context, Format, Loss
from loratools_formats.disk.distant import is_there

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import ModuleChange
    from loratools_formats.core.findings import Finding

_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class Peft(Format):
    """Folders as PEFT saves and loads them."""

    name = "peft"
    description = "PEFT adapter folder (adapter_config.json + adapter_model.safetensors or .bin)"
    is_folder = True
    dtypes = ("f32", "f16", "bf16")
    caveats_kept = ("activated-lora",)
    one_kind = True

    def sniff(self, path: Path) -> bool:
        """Return whether a folder has PEFT's configuration, and is not one of MLX.

        A weight file with PEFT's names that lies beside such a configuration counts too, whatever
        it is called.
        """
        from loratools_formats.containers.sniffing import is_beside_peft_config

        if path.name not in _WEIGHT_FILES and is_beside_peft_config(path):
            return True
        folder = path.parent if path.name in _WEIGHT_FILES else path
        if not (folder / "adapter_config.json").is_file():
            return False
        # MLX adapters have a file of that name too, and weights of another.
        is_mlx = is_there(folder / "adapters.safetensors")
        return not is_mlx or any(is_there(folder / name) for name in _WEIGHT_FILES)

    def read(self, path: Path) -> Adapter:
        """Read a folder, or one named by its weight file."""
        from loratools_formats.formats.peft.read import read

        return read(path)

    def loading_findings(self, adapter: Adapter) -> list[Finding]:
        """Return the modules that PEFT makes no layer for, and the patterns that match none."""
        from loratools_formats.formats.peft.loading import loading_findings

        return loading_findings(adapter)

    def losses(self, adapter: Adapter) -> list[Loss]:
        """Return what PEFT cannot hold."""
        from loratools_formats.formats.peft.write import losses

        return losses(adapter)

    def without_place(self, adapter: Adapter, context: Context) -> list[Loss]:
        """Return the modules that PEFT refuses to adapt in a model of the base's type."""
        from loratools_formats.formats.peft.loading import refused_in

        return [] if context.base is None else refused_in(context.base, adapter.modules)

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write configuration, weights and attachments."""
        from loratools_formats.formats.peft.write import write

        write(adapter, path)

    def weights_nbytes(self, adapter: Adapter) -> int:
        """Return the size of the weight file that `write` would make."""
        from loratools_formats.formats.peft.write import weights_nbytes

        return weights_nbytes(adapter)

    def writing_findings(self, adapter: Adapter) -> list[Finding]:
        """Return findings about what PEFT stores otherwise, or loses of experts as it loads."""
        from loratools_formats.formats.peft.experts.packed import about_heads
        from loratools_formats.formats.peft.write import about_experts
        from loratools_formats.formats.peft.written_sides import writing_findings

        return [*writing_findings(adapter), *about_heads(adapter), *about_experts(adapter)]

    def from_model(self, adapter: Adapter, context: Context) -> Adapter:
        """Make the configuration that the modules of another format's adapter ask for."""
        from loratools_formats.formats.peft.from_model import from_model

        return from_model(adapter, context)

    def left_to_loader(self, adapter: Adapter) -> str:
        """Name what PEFT computes from the base model where its file does not hold it."""
        from loratools_formats.formats.peft.kinds.read import left_to_loader

        return left_to_loader(adapter.config.get("peft_type"), adapter.modules)

    def with_factors(self, adapter: Adapter, modules: Mapping[str, ModuleChange]) -> Adapter:
        """Return a LoRA; biases that a format which is only read replaces are kept."""
        from loratools_formats.formats.peft.targets import with_factors

        return with_factors(adapter, modules)

    def merged_config(self, adapters: Sequence[Adapter]) -> Mapping[str, Any]:
        """Return the first configuration, widened to cover what all the adapters hold."""
        from loratools_formats.formats.peft.targets import merged_config

        return merged_config(adapters)

    def narrowed_config(self, adapter: Adapter) -> Mapping[str, Any]:
        """Return the configuration without what names only modules that are there no more."""
        from loratools_formats.formats.peft.targets import narrowed_config

        return narrowed_config(adapter)


FORMAT = Peft()
