"""Give adapters of different formats and spellings one name for each module, so that they match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from loratools.folding.base_layout import in_base_layout
from loratools.folding.expert_sides import straightened, with_sides
from loratools.folding.without_base import folded_exactly
from loratools.naming.rename import NamingOptions, renamed
from loratools.naming.together import in_one_spelling
from loratools.operations.in_class_names import in_class_names
from loratools.operations.name_clash import (
    as_first_spells,
    called,
    loosely_named,
    name_clash,
)
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.format import Context
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import LoratoolsError, UnsupportedError

_DENOISER = re.compile(r"^(?:unet|transformer)\.")


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
        return in_one_spelling([_cuttable(each) for each in adapters])


def _cuttable(adapter: Adapter) -> Adapter:
    """Return an adapter whose changes can be cut and put together: factors, and full differences.

    Raises:
        LoratoolsError: a change does not fold exactly, or not without the base.
    """
    return folded_exactly(adapter, "compare", None, keeps=lambda change: change.kind == "full")


def _as_classed(
    adapters: list[Adapter], base: Checkpoint | None, found: list[Finding]
) -> list[Adapter]:
    """Return adapters with the modules of the base's class where theirs differ, A on the inputs."""
    adapters = [straightened(with_sides(adapter, base)) for adapter in adapters]
    modules = {frozenset((n, c.layer.parameters) for n, c in a.modules.items()) for a in adapters}
    other = any(get_format(adapter.format).naming is not None for adapter in adapters)
    if len(modules) < 2 or other:
        return adapters
    if base is None:
        return _as_told_without_base(adapters, found)
    try:
        return in_class_names(adapters, base)
    except LoratoolsError as error:
        message = f"the adapters' modules differ, and their names are kept: {error.message}"
        found.append(Finding("names-kept", "warning", None, message))
        return adapters


def _as_told_without_base(adapters: list[Adapter], found: list[Finding]) -> list[Adapter]:
    """Return adapters whose names differ by more than wrappers, and say of which that is doubtful.

    Spellings that only the base can bring together have a finding.
    """
    named = as_first_spells(adapters)
    clash = name_clash(named)
    if clash is not None:
        (first, one), (second, other) = clash
        message = (
            f"{called(named[second], other, one)} and {called(named[first], one, other)} may be "
            "one module, whole or in parts, and are compared as two"
        )
        hint = "Pass `base`, whose class tells the names"
        found.append(Finding("names-kept", "warning", one, message, hint))
    return named


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


def in_common_names(adapter: Adapter) -> Adapter:
    """Return an adapter under names to which its other spellings lead as well.

    Single files whose modules a table has get diffusers' names, without the denoiser's component;
    other adapters those of the model, without leading parts that wrappers add. A of stacked experts
    is on the inputs. No base is asked.

    Raises:
        LoratoolsError: no way leads there.
    """
    if get_format(adapter.format).naming is None:
        own = straightened(adapter) if adapter.format == "peft" else in_model_names(adapter, None)
        return loosely_named(own)
    try:
        named = renamed(adapter, "diffusers").adapter
    except UnsupportedError:
        named = renamed(_cuttable(adapter), "diffusers").adapter
    names = {name: _DENOISER.sub("", name) for name in named.modules}
    if len(set(names.values())) < len(names):
        return named
    return replace(named, modules={names[name]: c for name, c in named.modules.items()})
