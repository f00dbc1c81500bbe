"""A merge that was done, as the text of a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from loratools.algebra.ranks import as_options
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.recipe import NOT_IN_RECIPES, SWITCHES, VERSION, Recipe
from loratools_formats.disk.hub_cache import cached_place
from loratools_formats.disk.provenance import MADE_HERE


def recipe_text(recipe: Recipe, digests: Sequence[str], folder: Path) -> bytes:
    """Return a recipe as YAML, with paths relative to the folder it will lie in.

    Args:
        recipe: what was done.
        digests: sha256 of each adapter's weight file.
        folder: of the file to write.
    """
    options = recipe.options
    content: dict[str, Any] = {"version": VERSION, "method": options.method}
    if options.parameters:
        content["parameters"] = _shown(options.parameters)
    if options.space != "full":
        content["space"] = options.space
    content["adapters"] = [
        {"path": _relative(item.path, folder), "weight": item.weight, "sha256": digest}
        for item, digest in zip(recipe.adapters, digests, strict=True)
    ]
    ranks = as_options(options.rule)
    if ranks:
        content["ranks"] = dict(ranks)
        share = options.rule.budget.share if options.rule.budget is not None else None
        if share is not None:
            content["ranks"]["budget"] = f"{share * 100:.12f}".rstrip("0").rstrip(".") + "%"
    defaults = asdict(ComputeOptions())
    compute = {
        name: value
        for name, value in asdict(options.compute).items()
        if name not in NOT_IN_RECIPES and value != defaults[name]
    }
    if compute:
        content["compute"] = compute
    if options.overrides:
        content["overrides"] = [
            {k: _shown(v) if k == "parameters" else v for k, v in override.record().items()}
            for override in options.overrides
        ]
    if options.replacements is not None:
        content["replacements"] = options.replacements
    content |= options.dropping.record()
    if recipe.base is not None:
        content["base"] = _relative(recipe.base, folder)
    switches = {name: getattr(options, name) for name in SWITCHES}
    content |= {name: True for name, on in switches.items() if on}
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return MADE_HERE + b"\n" + text.encode()


def _shown(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters by the names that users type."""
    return {name.rstrip("_"): value for name, value in parameters.items()}


def _relative(path: Path, folder: Path) -> str:
    place = cached_place(path)
    return Path(os.path.relpath(path, folder)).as_posix() if place is None else place.reference
