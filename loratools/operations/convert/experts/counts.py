"""How many experts a layer has, as the base or the file tells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loratools.operations.convert.experts.groups import Group, base_hint
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import UnsupportedError


def counted(
    adapter: Adapter, groups: Mapping[str, Group], base: Checkpoint | None
) -> dict[str, int]:
    """Return how many experts each layer has.

    Raises:
        UnsupportedError: some are missing and no base tells how many there are.
    """
    stated = {} if base is None else _stated(base.config)
    counts: dict[str, int] = {}
    highest = max(
        (expert for g in groups.values() for c in g.single.values() for expert in c), default=-1
    )
    for owner, group in groups.items():
        numbers = {expert for changes in group.single.values() for expert in changes}
        if not numbers:
            continue
        counts[owner] = stated.get("experts") or highest + 1
        complete = any(len(c) == counts[owner] for c in group.single.values())
        complete = complete and not _chooses_experts(adapter.config)
        if max(numbers) >= counts[owner] or (base is None and not complete):
            raise UnsupportedError(
                "the number of experts in the layer is not known"
                if base is None
                else "the base has fewer experts",
                path=adapter.source,
                tensor=owner,
                got=f"{len(numbers)} experts, the last of number {max(numbers)}",
                hint=base_hint(adapter) if base is None else None,
            )
    return counts


def _chooses_experts(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration targets experts by their numbers, so that some may lack."""
    for key in ("target_modules", "exclude_modules"):
        targets = config.get(key)
        named = [targets] if isinstance(targets, str) else targets or ()
        if any(_NUMBERED.search(str(name)) for name in named):
            return True
    return False


def told_count(counts: Mapping[str, int], base: Checkpoint | None) -> list[Finding]:
    """Return what to tell of numbers of experts that only the file tells."""
    if base is not None or not counts:
        return []
    owner, count = next(iter(counts.items()))
    text = (
        f"layers are taken to have as many experts as the file adapts, {count} in {owner}; for a "
        "model with more, `base` adds zeros for the others"
    )
    return [Finding("experts-laid-out", "note", owner, text)]


_NUMBERED = re.compile(r"experts\W*[\d\[(]")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _stated(config: Mapping[str, Any]) -> dict[str, int]:
    sections: Iterable[Any] = (config, *config.values())
    for section in sections:
        if isinstance(section, Mapping):
            for key in _COUNTS:
                if isinstance(section.get(key), int) and section[key] > 0:
                    return {"experts": section[key]}
    return {}
