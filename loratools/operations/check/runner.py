"""Runs rules over many adapters, and says what could not be checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loratools.base.dequantised import dequantised
from loratools.base.placement.names import Names
from loratools.operations.check.children import children_for, in_children
from loratools.operations.check.options import CheckOptions
from loratools.operations.check.outcome import (
    Asked,
    CheckedAdapter,
    CheckFinding,
    Outcome,
    Unchecked,
)
from loratools.work.parallel import in_order
from loratools.work.requests import Progress
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.distant import has_distant
from loratools_formats.disk.errors import UnsupportedError


@dataclass(frozen=True)
class CheckRun:
    """What all rules found in all adapters."""

    adapters: tuple[CheckedAdapter, ...]
    unchecked: tuple[Unchecked, ...]
    findings: tuple[CheckFinding, ...]
    rules: tuple[str, ...]


def check(
    sources: Sequence[Path | Adapter],
    options: CheckOptions,
    *,
    base: Checkpoint | None = None,
    format_name: str | None = None,
    carry_unknown: bool = False,
    accepted: frozenset[str] = frozenset(),
    named: Mapping[Path, str] = MappingProxyType({}),
    workers: int = 1,
    progress: Progress | None = None,
) -> CheckRun:
    """Check adapters.

    Args:
        sources: paths, or adapters that are read already.
        options: which rules, and for which programs.
        base: the base model.
        format_name: read paths as this format.
        carry_unknown: keep tensors that the format does not know.
        accepted: fingerprints of findings to leave out.
        named: what to call paths that stand for references.
        workers: cores to use: as threads for a few adapters, as processes for many.
        progress: called with (adapters done, adapters in all).
    """
    names = None if base is None else names_of(base)
    asked = Asked(options, names, format_name, carry_unknown, accepted, named)
    adapters: list[CheckedAdapter] = []
    unchecked: list[Unchecked] = []
    findings: list[CheckFinding] = []
    for outcome in _outcomes(sources, asked, workers):
        if isinstance(outcome, Unchecked):
            unchecked.append(outcome)
        else:
            adapters.append(outcome[0])
            findings += outcome[1]
        if progress is not None:
            progress(len(adapters) + len(unchecked), len(sources))
    rules = tuple(sorted(options.codes()))
    return CheckRun(tuple(adapters), tuple(unchecked), tuple(findings), rules)


def _outcomes(sources: Sequence[Path | Adapter], asked: Asked, workers: int) -> Iterable[Outcome]:
    paths = [source for source in sources if isinstance(source, Path)]
    count = children_for(len(paths), workers)
    if count and len(paths) == len(sources) and not any(map(has_distant, paths)):
        return in_children(paths, asked, count)
    return in_order(asked.outcome, list(sources), workers)


def names_of(base: Checkpoint) -> Names:
    """Return the names of a base model, those of dequantised weights where they can be read."""
    try:
        return Names(dequantised(base).checkpoint)
    except UnsupportedError:  # a quantisation that cannot be read: names are as they are
        return Names(base)
