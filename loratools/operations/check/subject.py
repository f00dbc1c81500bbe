"""One adapter under check: what was read of it, or why it could not be read."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.base.placement.names import Names
from loratools.operations.check.targets import Target
from loratools_formats.containers.safetensors_read import read_safetensors
from loratools_formats.contract.files import read_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.file_names import (
    ADAPTER_CONFIG,
    CARD,
    MLX_WEIGHTS,
    PEFT_WEIGHTS,
    WEIGHTS_OF_ADAPTERS,
)
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.distant import is_there
from loratools_formats.disk.errors import LoratoolsError
from loratools_formats.disk.files import inside, read_small_file
from loratools_formats.disk.strict_json import read_object
from loratools_formats.disk.strict_yaml import StrictYamlError
from loratools_formats.disk.strict_yaml import loads as load_yaml

if TYPE_CHECKING:
    from loratools.operations.check.numbers import ModuleNumbers

_MAX_CONFIG_BYTES = 1 << 20
_MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Card:
    """The model card beside an adapter.

    Attributes:
        values: its front matter, empty if there is none.
        fault: why the front matter could not be read; empty if it could.
    """

    values: Mapping[str, Any]
    fault: str = ""


@dataclass(frozen=True)
class Subject:
    """One adapter under check.

    Attributes:
        path: as it was given.
        adapter: as it was read; None if its reader refused it.
        refusal: why it refused.
        base: the base model's tensors by name; None if none was given.
        targets: the serving programs that it is meant for.
        doubts: what its format's loader would leave out.
        name: the reference that it was given as; None if that is the path.
    """

    path: Path | None
    adapter: Adapter | None
    refusal: LoratoolsError | None = None
    base: Names | None = None
    targets: tuple[Target, ...] = ()
    doubts: tuple[Finding, ...] = field(default=())
    name: str | None = None

    @functools.cached_property
    def folder(self) -> Path | None:
        """The folder that the adapter is; None if it is a single file, or was made in memory."""
        if self.path is None:
            return None
        if self.path.is_dir():
            return self.path
        return self.path.parent if self.path.name in WEIGHTS_OF_ADAPTERS else None

    @functools.cached_property
    def entries(self) -> tuple[os.DirEntry[str], ...]:
        """What lies in the folder, sorted by name."""
        if self.folder is None:
            return ()
        with os.scandir(self.folder) as found:
            return tuple(sorted(found, key=lambda entry: entry.name))

    @functools.cached_property
    def is_peft(self) -> bool:
        """Whether it is a PEFT folder, read or not."""
        if self.adapter is not None:
            return self.adapter.format == "peft"
        names = {entry.name for entry in self.entries}
        return ADAPTER_CONFIG in names and MLX_WEIGHTS not in names

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration; of an adapter that was refused as far as it is sound JSON."""
        if self.adapter is not None:
            return self.adapter.config
        if self.folder is None or not (self.folder / ADAPTER_CONFIG).is_file():
            return {}
        try:
            return read_object(inside(self.folder, ADAPTER_CONFIG), _MAX_CONFIG_BYTES)
        except LoratoolsError:  # then this, or worse, is why the reader refused the adapter
            return {}

    @functools.cached_property
    def header(self) -> Mapping[str, TensorRef] | None:
        """Tensors by their key in the file; None if there is no header that can be read.

        Those of a refused PEFT folder are read from its weights once more.
        """
        if self.adapter is not None:
            return {tensor.key: tensor for tensor in self.adapter.tensors()}
        if self.folder is None or not is_there(self.folder / PEFT_WEIGHTS):
            return None
        try:
            return read_safetensors(inside(self.folder, PEFT_WEIGHTS)).tensors
        except LoratoolsError:  # then this is why the reader refused the adapter
            return None

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Tensors by their key in the file, as far as they are known."""
        return self.header or {}

    @functools.cached_property
    def card(self) -> Card | None:
        """The model card; None if there is none."""
        if self.folder is None or not (self.folder / CARD).is_file():
            return None
        try:
            text = read_small_file(inside(self.folder, CARD), _MAX_CARD_BYTES)
        except LoratoolsError as error:
            return Card({}, error.message)
        return card_of(text)

    @functools.cached_property
    def numbers(self) -> Mapping[str, ModuleNumbers]:
        """What the values of each module are; reads every tensor, once."""
        from loratools.operations.check.numbers import scanned

        return {} if self.adapter is None else scanned(self.adapter)


def card_of(text: bytes) -> Card:
    r"""Return a model card's front matter.

    >>> card_of(b"---\nlicense: mit\n---\n# Title").values
    {'license': 'mit'}
    """
    lines = text.replace(b"\r\n", b"\n")
    if not lines.startswith(b"---\n"):
        return Card({})
    front, closed, _ = lines[4:].partition(b"\n---")
    if not closed:
        return Card({}, "its front matter does not end")
    try:
        values = load_yaml(front)
    except StrictYamlError as error:
        return Card({}, str(error))
    if values is None:
        return Card({})
    return Card(values) if isinstance(values, dict) else Card({}, "its front matter is no mapping")


def subject_of(
    path: Path,
    format_name: str | None,
    *,
    carry_unknown: bool,
    base: Names | None,
    targets: tuple[Target, ...],
) -> Subject:
    """Read an adapter, or remember why it cannot be read."""
    from loratools_formats.contract.registry import get_format

    try:
        adapter = read_adapter(path, format_name, carry_unknown=carry_unknown)
        doubts = tuple(get_format(adapter.format).loading_findings(adapter))
    except LoratoolsError as error:
        return Subject(path, None, error, base, targets)
    return Subject(path, adapter, None, base, targets, doubts)
