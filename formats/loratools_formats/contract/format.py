"""What a format is: how to recognise, read and write it, and what operations ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.file_names import WRITTEN_ENDINGS
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import UnsupportedError

if TYPE_CHECKING:
    from loratools_formats.core.single_file_keys import Naming


@dataclass(frozen=True)
class Loss:
    """Something of an adapter that a format cannot hold.

    Attributes:
        name: the module or tensor.
        reason: why the format cannot hold it, to be read after the name.
        remedy: what the user can do instead of leaving it out; empty for nothing.
    """

    name: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Context:
    """What translating between a format's module names and the base model's may need.

    Attributes:
        base: folder or file of the base model; only headers and configuration are read.
        dtype: type to store factors in, one of the format's `dtypes`; None for its own choice.
    """

    base: Path | None = None
    dtype: str | None = None


class Format:
    """A format. A subclass says what its files hold; plugins register an instance of it.

    A format is readable if its class defines `read`, and writable if its class defines `write`;
    every other method has a default. Importing a format's module must import nothing heavy, so
    methods import what they need.

    Readers hand out modules under the names and in the layout of the file, and writers expect
    them in that form: squeezing or merging files of one format needs no names of the base model.
    Converting to another format goes through the base model's names: `to_model` of the first
    format, then `from_model` of the second.

    Attributes:
        name: what users type, such as `peft`; also `Adapter.format` of what `read` returns.
        description: one line for `loratools formats`.
        suffixes: endings of its files' names, or of its folders' if they have one of their own.
        is_folder: whether an adapter is a folder rather than a file.
        dtypes: types that a context may ask `from_model` to store factors in.
        caveats_kept: codes of findings that hinder operations on ΔW, but no conversion to this
            format, since it can say what they say.
        naming: how its files name the modules of a diffusion pipeline; None for other formats.
        uses_base: whether `to_model` or `from_model` can use the context's base model.
        one_kind: whether its configuration names one kind of adapter for the whole file.
    """

    name: str
    description: str
    suffixes: tuple[str, ...] = ()
    is_folder: bool = False
    dtypes: tuple[str, ...] = ()
    caveats_kept: tuple[str, ...] = ()
    naming: Naming | None = None
    uses_base: bool = False
    one_kind: bool = False

    @property
    def ending(self) -> str:
        """What the name of an output ends in; empty for folders."""
        return "" if self.is_folder else (*self.suffixes, WRITTEN_ENDINGS[0])[0]

    def fits(self, name: str) -> bool:
        """Return whether a name ends as those of the format's files do, in any case of letters."""
        return name.lower().endswith(self.suffixes)

    @property
    def is_readable(self) -> bool:
        """Whether the class defines `read`."""
        return type(self).read is not Format.read

    @property
    def is_writable(self) -> bool:
        """Whether the class defines `write`."""
        return type(self).write is not Format.write

    def sniff(self, path: Path) -> bool:
        """Return whether a path looks like this format; reads at most 64 KiB and never raises.

        By default nothing does, and users name the format with `--from`.
        """
        del path
        return False

    def read(self, path: Path) -> Adapter:
        """Read an adapter's headers; its tensors load on demand.

        Raises:
            LoratoolsError: not a sound adapter of this format.
        """
        raise UnsupportedError(f"format {self.name} can be written but not read", path=path)

    def read_with_unknown(self, path: Path) -> Adapter:
        """Read, and carry the tensors that `read` refuses because it does not know them."""
        return self.read(path)

    def loading_findings(self, adapter: Adapter) -> list[Finding]:
        """Return what the format's own loader would leave out, or read otherwise, of a file.

        By default nothing is known of a loader.

        Args:
            adapter: as `read` returned it.
        """
        del adapter
        return []

    def writing_findings(self, adapter: Adapter) -> list[Finding]:
        """Return findings about the form in which `write` would store an adapter.

        By default there is one form.

        Args:
            adapter: to be written.

        Raises:
            UnsupportedError: the format cannot hold it.
        """
        del adapter
        return []

    def losses(self, adapter: Adapter) -> list[Loss]:
        """Return what the format cannot hold of an adapter in the base model's names.

        By default it holds what it read itself, and the modules of adapters of other formats.
        """
        if adapter.format == self.name:
            return []
        others = [*adapter.additions, *adapter.replacements, *adapter.carried]
        return [Loss(key, f"has no place in an adapter of format {self.name}") for key in others]

    def without_place(self, adapter: Adapter, context: Context) -> list[Loss]:
        """Return the modules, in the base model's names, that the format has no place for.

        By default it has one for every module.

        Args:
            adapter: of another format.
            context: the base model, if it is known.
        """
        del adapter, context
        return []

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write to a path that does not exist yet, or into an empty folder if `is_folder`.

        `write_adapter` calls it, and makes the result appear whole.

        Raises:
            UnsupportedError: the format cannot hold the adapter.
        """
        del adapter
        raise UnsupportedError(f"format {self.name} can be read but not written", path=path)

    def weights_nbytes(self, adapter: Adapter) -> int:
        """Return the size of the weight file that `write` would make.

        By default that of the tensors alone, without a header.

        Raises:
            UnsupportedError: the format cannot hold the adapter.
        """
        return sum(tensor.nbytes for tensor in adapter.tensors())

    def to_model(self, adapter: Adapter, context: Context) -> Adapter:
        """Give an adapter of this format the base model's module names and layout.

        By default it has them as read.
        """
        del context
        return adapter

    def from_model(self, adapter: Adapter, context: Context) -> Adapter:
        """Give an adapter the names, layout and configuration that `write` wants.

        What `losses` lists is left out. No ΔW changes, unless the context asks for a type that
        cannot hold the factors. By default any adapter can be written without a change.

        Args:
            adapter: of this format, or in the base model's names and layout.
            context: the type to store; the base model, against which modules are checked.
        """
        del context
        return replace(adapter, format=self.name)

    def rows_in_base(self, base: Path) -> Callable[[str], Mapping[str, list[int]]]:
        """Return what tells how a base model that is stored in this format keeps a module's rows.

        Args:
            base: the model.

        Returns:
            A function from a module's path to the names of the tensors it became, each with the
            module's outputs that the tensor holds, in its order. It raises `UnsupportedError` or
            `AdapterError` if the model has no such matrix.
        """
        raise UnsupportedError(f"format {self.name} stores no base models", path=base)

    def left_to_loader(self, adapter: Adapter) -> str:
        """Name what a file leaves to be computed from the base model; empty if nothing."""
        del adapter
        return ""

    def with_factors(self, adapter: Adapter, modules: Mapping[str, ModuleChange]) -> Adapter:
        """Return an adapter with modules that are plain factors or DoRAs of them.

        Args:
            adapter: of this format, or of one that is only read.
            modules: what its modules have become.

        Returns:
            One of this format whose configuration says so; ranks and scales are left to `write`.
        """
        return replace(adapter, modules=dict(modules), shared={})

    def merged_config(self, adapters: Sequence[Adapter]) -> Mapping[str, Any]:
        """Return the configuration of an adapter made from several.

        Ranks and scales are left to `write`. By default it is the first adapter's.

        Args:
            adapters: the first is of this format; others may be of one whose modules have the same
                names, and whose configurations say nothing here.

        Raises:
            AdapterError: settings that cannot both hold.
        """
        return adapters[0].config

    def narrowed_config(self, adapter: Adapter) -> Mapping[str, Any]:
        """Return the configuration of an adapter of this format that lost some of its modules.

        By default it is what the adapter has.
        """
        return adapter.config
