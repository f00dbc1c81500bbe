"""The median. `np.median` gives the same result, but imports `numpy.ma`, which takes 50 ms once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def median(values: ArrayLike) -> float:
    """Return the middle of finite values, the mean of the two middle ones of an even number.

    Args:
        values: of any shape, at least one.

    >>> median([3.0, 1.0, 2.0]), median([4.0, 1.0, 2.0, 3.0])
    (2.0, 2.5)
    """
    ordered = np.sort(np.asarray(values), axis=None)
    count = len(ordered)
    return float((ordered[(count - 1) // 2] + ordered[count // 2]) / 2)
