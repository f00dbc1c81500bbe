"""The election of TIES: which sign each entry of a merge gets, and what the winners add up to.

TIES, DARE-TIES, DELLA and breadcrumbs elect; what they trim or drop before is in `elementwise`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from loratools.operations.merge.tasks import RowReader
from loratools_formats.core.dtypes import Array

MajoritySign = Literal["total", "frequency"]
Flavor = Literal["peft", "paper", "mergekit"]


def elected(
    rows: RowReader,
    weights: Array,
    scale: float,
    majority_sign: MajoritySign,
    flavor: Flavor,
    normalize: bool = True,
) -> RowReader:
    """Elect a sign for each entry and average the tasks that agree with it."""
    factors = weights[:, None, None]

    def merged(start: int, stop: int) -> Array:
        entries = rows(start, stop).astype(np.float64)
        weighted = factors * entries
        voters = entries if flavor == "peft" else weighted
        votes = voters if majority_sign == "total" else np.sign(voters)
        sign = np.where(votes.sum(axis=0) >= 0.0, 1.0, -1.0)
        agree = np.sign(voters) == sign
        total = np.where(agree, weighted, 0.0).sum(axis=0)
        divisor: Array = np.ones_like(total)
        if normalize and flavor == "mergekit":
            divisor = np.where(agree, factors, 0.0).sum(axis=0)
            divisor[divisor == 0.0] = 1.0
        elif normalize:
            divisor = np.maximum(agree.sum(axis=0), 1)
        result: Array = scale * total / divisor
        return result

    return merged
