"""Values that stand out from their family, after a trend over depth is removed.

The trend is Theil and Sen's: the median of the slopes between all pairs; of a family of many
members, as of experts that are stored one by one, between those that lie half of it apart, which is
Theil's own short way (1950). Distances are counted in
robust standard deviations: 1.4826 times the median absolute deviation (Iglewicz, Hoaglin 1993, who
call values beyond 3.5 outliers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from loratools.algebra.median import median
from loratools_formats.core.dtypes import Array

OUTLIER = 3.5
"""Robust standard deviations beyond which a value stands out."""
DEAD = 1e-6
"""A module is dead if its norm is below this share of the median norm."""
ONE_SIDED = 1e3
"""Factors are one-sided if the norm of one is beyond this many times the other's."""
_LEAST_MEMBERS = 5
_ALL_PAIRS = 1000
"""Members of a family up to which all pairs are looked at: half a million."""
_LEAST_SPREAD = 0.01  # of log values: a family closer together than 1 % has no outliers


def family_of(name: str) -> str:
    """Return a module's path without its numbers.

    >>> family_of("model.layers.12.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    """
    return re.sub(r"\d+", "*", name)


def numbers_in(name: str) -> tuple[int, ...]:
    """Return the numbers in a module's path, by which a family is in order of depth."""
    return tuple(int(digits) for digits in re.findall(r"\d+", name))


def layer_of(name: str) -> str:
    """Return the first part of a module's path that is a number; "" if there is none.

    >>> layer_of("model.layers.12.mlp"), layer_of("lora_te1_text_model_encoder_layers_3_fc1")
    ('12', '3')
    """
    parts = name.split("." if "." in name else "_")
    return next((part for part in parts if part.isdigit()), "")


def theil_sen(y: Array) -> tuple[float, float]:
    """Return (slope, intercept) of the line through y over 0, 1, …: medians over pairs."""
    x = np.arange(len(y), dtype=np.float64)
    if len(y) <= _ALL_PAIRS:
        i, j = np.triu_indices(len(y), 1)
    else:
        i = np.arange(len(y) // 2)
        j = i + (len(y) - len(i))
    slope = median((y[j] - y[i]) / (x[j] - x[i])) if len(i) else 0.0
    return slope, median(y - slope * x)


def robust_z(values: Sequence[float]) -> Array:
    """Return each value's distance from the trend in robust standard deviations: (n,)."""
    y = np.asarray(values, dtype=np.float64)
    slope, intercept = theil_sen(y)
    residuals = y - intercept - slope * np.arange(len(y))
    spread = 1.4826 * median(np.abs(residuals - median(residuals)))
    scores: Array = (residuals - median(residuals)) / max(spread, _LEAST_SPREAD)
    return scores


def scores_in_families(norms: Mapping[str, float]) -> dict[str, float]:
    """Return how far the logarithm of each norm is from its family's trend over depth.

    Families of fewer than five members, and norms of zero, have no score.
    """
    families: dict[str, list[str]] = {}
    for name, norm in norms.items():
        if norm > 0.0:
            families.setdefault(family_of(name), []).append(name)
    found: dict[str, float] = {}
    for names in families.values():
        if len(names) >= _LEAST_MEMBERS:
            names.sort(key=numbers_in)
            scores = robust_z([float(np.log(norms[name])) for name in names])
            found |= {name: float(score) for name, score in zip(names, scores, strict=True)}
    return found
