"""One alpha for the new factors of a UNet's kohya file, which diffusers would misread otherwise.

Everywhere else alpha becomes the rank, and the scale is 1. There that gives attention of another
rank than most modules a wrong scale in diffusers; `naming/kohya_unets.py` says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from loratools.algebra.ranks import RankRule
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions, Scaling
from loratools.naming.kohya_unets import component, is_of_a_unet
from loratools_formats.core.change import LowRank

ALPHA_OF_TRAINERS = 1.0
"""The alpha that sd-scripts takes unless told otherwise; for modules that had no factors."""


def common_alpha(
    format_name: str,
    parts: Mapping[str, LowRank | PlannedFactors | None],
    rule: RankRule,
    options: ComputeOptions,
    *,
    kept: bool = False,
) -> Scaling | None:
    """Return the scale of each module's new factors; None if the options decide.

    Args:
        format_name: of the file to write.
        parts: the factors that modules have so far, by name; None for a module without factors.
        rule: how ranks are chosen.
        options: how to compute and store.
        kept: whether some modules stay as they are.
    """
    one_rank = rule.uniform or (not kept and _is_one_rank(rule, parts))
    if format_name != "kohya" or one_rank or options.keep_alpha or not is_of_a_unet(parts):
        return None
    counts: dict[str, Counter[float]] = {}
    for name, part in parts.items():
        alpha = ALPHA_OF_TRAINERS if part is None else part.alpha
        if alpha is not None and alpha > 0:
            counts.setdefault(component(name), Counter())[alpha] += 1
    alphas = {name: found.most_common(1)[0][0] for name, found in counts.items()}

    def scale(like: LowRank | PlannedFactors, rank: int) -> float:
        alpha = alphas.get(component(like.a.key))
        return 1.0 if alpha is None else alpha / rank

    return scale


def _is_one_rank(rule: RankRule, parts: Mapping[str, LowRank | PlannedFactors | None]) -> bool:
    """Return whether all modules get the same rank, which then is the alpha of all."""
    rank = rule.rank
    if rank is None or rule.patterns:
        return False
    return all(part is None or part.rank >= rank for part in parts.values())
