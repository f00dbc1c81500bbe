"""Single files of bare tensors: state dicts, pickled or as safetensors, that training code saves.

`StateDictFormat` recognises them by the names in them; `StateDict` opens them safely. Pickles are
opened in a bounded child process. Files that are part of a PEFT or MLX folder are left to those
formats.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from loratools_formats.contract.format import Format
from loratools_formats.core.file_names import PICKLE_ENDINGS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools_formats.core.adapter import Adapter, Replacement
    from loratools_formats.core.change import KindDelta, ModuleChange
    from loratools_formats.core.tensors import TensorRef
    from loratools_formats.disk.errors import AdapterError
    from loratools_formats.disk.files import RegularFile

_SAFETENSORS = ".safetensors"
_SNIFFED_BYTES = 1 << 16
_STRING_IN_PICKLE = re.compile(rb"X(.)\x00\x00\x00", re.DOTALL)  # opcode and length


class StateDictFormat(Format):
    """State dicts that are only read; a subclass says which names and which changes.

    Attributes:
        telling: regular expression; a file that has a name which matches it whole is of the format.
        parts: what the declaration of the kind calls each tensor of a module, by the end of its
            name after the module's path and a dot.
        expected: the names, for messages.
    """

    suffixes = PICKLE_ENDINGS
    telling: bytes
    parts: Mapping[str, str]
    expected: str

    def sniff(self, path: Path) -> bool:
        """Return whether a name in the first 64 KiB is telling."""
        return any(map(re.compile(self.telling).fullmatch, names_in(path)))

    def read(self, path: Path) -> Adapter:
        """Read a file."""
        return self.adapter(StateDict(path))

    def adapter(self, state: StateDict) -> Adapter:
        """Return the adapter that a state dict holds: a change for each module.

        Raises:
            AdapterError: an unknown name, or tensors that do not belong together.
        """
        from loratools_formats.core.change import ModuleChange

        own = self.by_module(state)
        modules = {name: ModuleChange(self.delta(state, name, own[name])) for name in own}
        return state.adapter(self.name, modules)

    def by_module(self, state: StateDict) -> dict[str, dict[str, TensorRef]]:
        """Return all tensors by module and part.

        Raises:
            AdapterError: a name that is not the format's, or two tensors for one part.
        """
        ends = "|".join(map(re.escape, self.parts))
        key = re.compile(rf"{re.escape(self.prefix_of(state))}(?P<module>.+)\.(?P<part>{ends})")
        own: dict[str, dict[str, TensorRef]] = {}
        for name, tensor in state.tensors.items():
            match = key.fullmatch(name)
            if match is None or self.parts[match["part"]] in own.get(match["module"], {}):
                raise state.unknown(name, self.expected)
            own.setdefault(match["module"], {})[self.parts[match["part"]]] = tensor
        return own

    def prefix_of(self, state: StateDict) -> str:  # noqa: ARG002 - for those that need it
        """Return what names have before the module's path."""
        return ""

    def delta(self, state: StateDict, module: str, parts: dict[str, TensorRef]) -> KindDelta:
        """Return the change of one module.

        Raises:
            AdapterError: its tensors are not those of its kind.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither delta nor adapter")


def names_in(path: Path) -> list[bytes]:
    """Return the names of tensors in the first 64 KiB of a state dict; none of other files."""
    from loratools_formats.containers.sniffing import is_part_of_folder, tensor_names

    if path.suffix not in (*PICKLE_ENDINGS, _SAFETENSORS) or not path.is_file():
        return []
    if is_part_of_folder(path):
        return []
    with path.open("rb") as file:
        start = file.read(_SNIFFED_BYTES)
    if path.suffix == _SAFETENSORS:
        return tensor_names(start)
    if not start.startswith((b"PK", b"\x80")):
        return []
    strings = _STRING_IN_PICKLE.finditer(start)
    return [start[match.end() : match.end() + match[1][0]] for match in strings]


class StateDict:
    """An opened state dict.

    Args:
        path: the file.
        part: where its weights begin and how many bytes they have, if other things are in it.

    Attributes:
        path: the file.
        tensors: by name.

    Raises:
        AdapterError: not a map of names to tensors, or malformed.
    """

    tensors: dict[str, TensorRef]

    def __init__(self, path: Path, part: tuple[int, int] | None = None) -> None:
        from loratools_formats.containers.pickles import read_bin
        from loratools_formats.containers.safetensors_read import read_safetensors

        self.path = path
        is_pickled = path.suffix != _SAFETENSORS
        weights = read_bin(path, part) if is_pickled else read_safetensors(path)
        self._original = weights.file
        self.tensors = dict(weights.tensors)
        self._metadata = weights.metadata

    def unknown(self, name: str, expected: str) -> AdapterError:
        """Return the error that a tensor is not understood."""
        from loratools_formats.disk.errors import AdapterError

        return AdapterError(
            "unknown tensor; it may change the weights",
            path=self.path,
            tensor=name,
            expected=expected,
            hint="Save the tensors of the adapter alone",
        )

    def lacking(self, module: str, parts: dict[str, TensorRef], expected: str) -> AdapterError:
        """Return the error that a module's tensors are not those of its kind."""
        from loratools_formats.disk.errors import AdapterError

        return AdapterError(
            "module lacks a factor",
            path=self.path,
            tensor=module,
            got=", ".join(tensor.key for tensor in parts.values()),
            expected=expected,
        )

    def check_factors(self, tensors: Mapping[str, TensorRef], axes: int = 2) -> None:
        """Refuse tensors that cannot be factors.

        Args:
            tensors: by part.
            axes: how many each must have.

        Raises:
            AdapterError: one has others, is empty, or does not hold floating-point numbers.
        """
        from loratools_formats.core.factors import check_factor

        for tensor in tensors.values():
            check_factor(tensor, self.path)
        self.check_axes(tensors, axes)

    def check_axes(self, tensors: Mapping[str, TensorRef], axes: int) -> None:
        """Refuse tensors of other numbers of axes, and empty ones.

        Raises:
            AdapterError: there is one.
        """
        from loratools_formats.disk.errors import AdapterError

        for tensor in tensors.values():
            if len(tensor.shape) != axes or not tensor.numel:
                raise AdapterError(
                    "tensor has another shape than its kind's",
                    path=self.path,
                    tensor=tensor.key,
                    got=list(tensor.shape),
                    expected=f"{axes} axes, none of them empty",
                )

    def check_number(self, tensor: TensorRef) -> None:
        """Refuse a tensor that is not one number.

        Raises:
            AdapterError: it is none, or several.
        """
        from loratools_formats.disk.errors import AdapterError

        if tensor.numel != 1:
            raise AdapterError(
                "tensor is not one number",
                path=self.path,
                tensor=tensor.key,
                got=list(tensor.shape),
            )

    def check_same(self, tensors: Sequence[TensorRef]) -> None:
        """Refuse copies of a tensor that modules share if they differ: the code would keep one.

        Raises:
            AdapterError: there are two that differ.
        """
        from loratools_formats.disk.errors import AdapterError

        for tensor in tensors[1:]:
            first = tensors[0]
            is_first = tensor.file is first.file is not None and tensor.offset == first.offset
            same = tensor.dtype == first.dtype and tensor.shape == first.shape
            if not same or not (is_first or tensor.raw() == first.raw()):
                raise AdapterError(
                    "two modules have different values of a tensor that all share",
                    path=self.path,
                    tensor=tensor.key,
                    expected=f"the values of {first.key}",
                )

    def with_one_bank(
        self, own: dict[str, dict[str, TensorRef]], names: Mapping[str, str]
    ) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
        """Return the parts of modules that share a bank, and the bank if it is stored once.

        Args:
            own: the tensors of every module, by part; that of the bank is `bank`.
            names: all parts that a module must have, by the tensors' names.

        Raises:
            AdapterError: a module lacks a part, or modules have banks of other values.
        """
        banks = [parts["bank"] for parts in own.values() if "bank" in parts]
        self.check_same(banks)
        shared = {"bank": banks[0]} if len(banks) == 1 else {}
        found = {}
        for module, parts in own.items():
            found[module] = {part: ref for part, ref in parts.items() if part not in shared}
            if {*found[module], *shared} != set(names.values()):
                raise self.lacking(module, parts, ", ".join(names))
        return found, shared

    def adapter(
        self,
        format_name: str,
        modules: Mapping[str, ModuleChange],
        *,
        shared: dict[str, TensorRef] | None = None,
        replacements: dict[str, Replacement] | None = None,
        beside: tuple[RegularFile, ...] = (),
    ) -> Adapter:
        """Return the adapter that its tensors make.

        Args:
            format_name: of the format that reads it.
            modules: by path.
            shared: tensors that several modules are made of, by key.
            replacements: tensors that replace base tensors, by key.
            beside: other files that were read.
        """
        from loratools_formats.core.adapter import Adapter
        from loratools_formats.core.findings import Finding

        name = os.path.basename(self.path)
        pickled = Finding("pickled-weights", "warning", name, f"weights are pickled ({name})")
        return Adapter(
            format=format_name,
            source=self.path,
            modules={name: modules[name] for name in sorted(modules)},
            shared=shared or {},
            replacements=replacements or {},
            metadata=self._metadata,
            findings=() if self.path.suffix == _SAFETENSORS else (pickled,),
            inputs=(self._original, *beside),
        )
