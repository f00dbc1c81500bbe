"""Give adapters of different formats the names of the base model, so that their modules match."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.folding.base_layout import in_base_layout
from loratools.naming.rename import NamingOptions, renamed
from loratools.naming.together import in_one_spelling
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.format import Context
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import LoratoolsError


def in_one_naming(
    adapters: Sequence[Adapter], base: Checkpoint | None
) -> tuple[list[Adapter], list[Finding]]:
    """Return adapters whose modules are named alike, and findings on those that keep their names.

    Single files whose modules a table has are spelled as the first spells them. Other adapters of
    one format keep their names; of several, each goes to the base model's names where a way leads
    there.
    """
    found: list[Finding] = []
    if all(get_format(adapter.format).naming is not None for adapter in adapters):
        try:
            alike = in_one_spelling(adapters)
        except LoratoolsError as error:
            alike = None
            message = f"the files keep their own spellings of modules: {error.message}"
            found.append(Finding("names-kept", "warning", None, message))
        if alike is not None:
            return alike, []
    if len({adapter.format for adapter in adapters}) == 1:
        return [in_base_layout(adapter, base) for adapter in adapters], found
    named: list[Adapter] = []
    for adapter in adapters:
        try:
            named.append(in_model_names(adapter, base))
        except LoratoolsError as error:
            named.append(adapter)
            message = f"{adapter.source} keeps its own names: {error.message}"
            found.append(Finding("names-kept", "warning", None, message))
    return named, found


def in_model_names(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return an adapter whose modules are named as the base model names them.

    Raises:
        LoratoolsError: no way leads there.
    """
    found = get_format(adapter.format)
    adapter = found.to_model(adapter, Context(base=None if base is None else base.path))
    if found.naming is not None:
        adapter = renamed(adapter, "bare", NamingOptions()).adapter
    return adapter
