"""Give adapters of different formats and spellings one name for each module, so that they match."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.folding.base_layout import in_base_layout
from loratools.folding.expert_sides import straightened, with_sides
from loratools.folding.without_base import folded_exactly
from loratools.naming.rename import NamingOptions, renamed
from loratools.naming.together import in_one_spelling
from loratools.operations.in_class_names import in_class_names
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.format import Context
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import LoratoolsError, UnsupportedError


def in_one_naming(
    adapters: Sequence[Adapter], base: Checkpoint | None
) -> tuple[list[Adapter], list[Finding]]:
    """Return adapters whose modules are named alike, and findings on those that keep their names.

    Single files whose modules a table has are spelled as the first spells them. Other adapters of
    one format keep their names; of several, each goes to the base model's names where a way leads
    there. Where modules differ then, the base's class divides and names them.
    """
    found: list[Finding] = []
    if all(get_format(adapter.format).naming is not None for adapter in adapters):
        try:
            alike = _respelled(adapters)
        except LoratoolsError as error:
            alike = None
            message = f"the files keep their own spellings of modules: {error.message}"
            found.append(Finding("names-kept", "warning", None, message))
        if alike is not None:
            return alike, []
    if len({adapter.format for adapter in adapters}) == 1:
        named = [in_base_layout(adapter, base) for adapter in adapters]
        return _as_classed(named, base, found), found
    named = []
    for adapter in adapters:
        try:
            named.append(in_model_names(adapter, base))
        except LoratoolsError as error:
            named.append(adapter)
            message = f"{adapter.source} keeps its own names: {error.message}"
            found.append(Finding("names-kept", "warning", None, message))
    return _as_classed(named, base, found), found


def _respelled(adapters: Sequence[Adapter]) -> list[Adapter] | None:
    """Return single files in one spelling; kinds that cannot be cut are folded into factors first.

    Raises:
        LoratoolsError: no spelling is right for all, or a kind needs the base.
    """
    try:
        return in_one_spelling(adapters)
    except UnsupportedError:
        folded = [
            folded_exactly(each, "compare", None, keeps=lambda change: change.kind == "full")
            for each in adapters
        ]
        return in_one_spelling(folded)


def _as_classed(
    adapters: list[Adapter], base: Checkpoint | None, found: list[Finding]
) -> list[Adapter]:
    """Return adapters with the modules of the base's class where theirs differ, A on the inputs."""
    adapters = [straightened(with_sides(adapter, base)) for adapter in adapters]
    modules = {frozenset((n, c.layer.parameters) for n, c in a.modules.items()) for a in adapters}
    other = any(get_format(adapter.format).naming is not None for adapter in adapters)
    if base is None or len(modules) < 2 or other:
        return adapters
    try:
        return in_class_names(adapters, base)
    except LoratoolsError as error:
        message = f"the adapters' modules differ, and their names are kept: {error.message}"
        found.append(Finding("names-kept", "warning", None, message))
        return adapters


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
