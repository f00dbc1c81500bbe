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
    stated: Mapping[str, float | None],
    rule: RankRule,
    options: ComputeOptions,
) -> Scaling | None:
    """Return the scale of each module's new factors; None if the options decide.

    Args:
        format_name: of the file to write.
        stated: the alpha of each module by its name, None where the input states none.
        rule: how ranks are chosen.
        options: how to compute and store.
    """
    if format_name != "kohya" or rule.uniform or options.keep_alpha or not is_of_a_unet(stated):
        return None
    counts: dict[str, Counter[float]] = {}
    for name, alpha in stated.items():
        if alpha is not None and alpha > 0:
            counts.setdefault(component(name), Counter())[alpha] += 1
    alphas = {part: found.most_common(1)[0][0] for part, found in counts.items()}

    def scale(like: LowRank | PlannedFactors, rank: int) -> float:
        alpha = alphas.get(component(like.a.key))
        return 1.0 if alpha is None else alpha / rank

    return scale
