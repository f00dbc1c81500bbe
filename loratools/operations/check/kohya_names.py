"""What a program makes of kohya's names: alphas that it gives to the wrong modules, and losses."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from loratools.naming.choice import chosen_tables
from loratools.naming.kohya_unets import component, is_of_a_unet
from loratools.naming.named_modules import NamedModules
from loratools.operations.check.remedy import Remedy
from loratools.operations.check.rule import Found
from loratools.operations.check.subject import Subject
from loratools.operations.check.targets import Target
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank
from loratools_formats.core.single_file_keys import is_first_factor
from loratools_formats.disk.errors import LoratoolsError, and_more


def scales_by_commonest(adapter: Adapter, target: Target) -> dict[str, float]:
    """Return the scales that a program uses for modules whose own alphas it ignores.

    It takes the alpha that most modules of the component have, for lack of their own. Modules
    whose scale comes out right are left out.

    Args:
        adapter: of any format; others than kohya's UNets and their text encoders have no such.
        target: the program.
    """
    patterns = [re.compile(text) for text in target.kohya.commonest]
    if not patterns or adapter.format != "kohya" or not is_of_a_unet(adapter.modules):
        return {}
    parts = adapter.factors()
    alphas: dict[str, Counter[float]] = {}
    for name, part in parts.items():
        if _states_alpha(name, part):
            counts = alphas.setdefault(component(name), Counter())
            counts[round(part.scale * part.rank, 9)] += 1
    taken = {}
    for name, part in parts.items():
        found = alphas.get(component(name))
        passed_over = not _states_alpha(name, part) or any(p.fullmatch(name) for p in patterns)
        if found and passed_over:
            scale = found.most_common(1)[0][0] / part.rank
            if not math.isclose(scale, part.scale, rel_tol=1e-6):
                taken[name] = scale
    return taken


def _states_alpha(name: str, part: LowRank) -> bool:
    """Return whether a kohya file has an alpha of a module, or will have one when it is written."""
    new = not is_first_factor(part.a.key, name)
    return part.alpha_tensor is not None or part.scale != 1.0 or new


def about_alphas(adapter: Adapter, target: Target) -> Found | None:
    """Return the finding that a program gives modules the alphas of others; None if it does not.

    Args:
        adapter: read, or to be written.
        target: the program.
    """
    taken = scales_by_commonest(adapter, target)
    if not taken:
        return None
    parts = adapter.factors()
    first = next(iter(taken))
    text = (
        f"{target.label} ignores the alphas of {len(taken)} of {len(parts)} modules and takes "
        f"the one that most have: {first} is multiplied by {taken[first]:g} instead of "
        f"{parts[first].scale:g}"
    )
    own = target.scales == "own"
    highest = max(part.rank for part in parts.values())
    remedy = Remedy("format", "diffusers") if own else Remedy("uniform", highest)
    hint = f"Without loss: {remedy.command(adapter)}"
    return Found(text, first, hint=hint, remedy=remedy, target=target.name)


def lost_modules(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    """Find modules of kohya's names that a program loads nothing of, and says nothing."""
    facts = target.kohya
    if adapter.format != "kohya" or not (facts.ignored or facts.lost):
        return
    file = NamedModules.of(adapter)
    try:
        tables = chosen_tables([file], "diffusers")
    except LoratoolsError:
        return
    remedy = Remedy("format", "diffusers")
    hint = f"Convert it: {remedy.command(adapter)}"
    if tables and all(table.name in facts.ignored for table in tables):
        titles = " or ".join(table.title for table in tables)
        text = f"{target.label} loads nothing of a file with kohya's names of {titles}"
        yield Found(text, hint=hint, remedy=remedy, target=target.name)
        return
    patterns = [dict(facts.lost).get(table.name) for table in tables]
    told = [re.compile(pattern) for pattern in patterns if pattern is not None]
    lost = [name for name in file.names if told and all(p.fullmatch(name) for p in told)]
    if lost and len(told) == len(tables):
        text = f"{target.label} silently leaves out modules of kohya's names: {and_more(lost)}"
        yield Found(text, lost[0], hint=hint, remedy=remedy, target=target.name)
