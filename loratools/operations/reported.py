"""The numbers that a statement keeps of what an operation found: error, ranks, and sizes.

They are for whoever reads the statement, or a card made of it; `replay` does not compare them.
"""

from __future__ import annotations

import math
from typing import Any

from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter


def report(error: float | None, nbytes: int, nbytes_in: int | None = None) -> dict[str, Any]:
    """Return the report of an output.

    Args:
        error: relative, of what is stored against what was asked for; None if there is no measure.
        nbytes: size of its weights.
        nbytes_in: size of the weights that it was made from; None if that is not known.
    """
    return {
        # Last digits differ between machines, and say nothing.
        **({} if error is None else {"relativeError": float(f"{error:.3g}")}),
        **({} if nbytes_in is None else {"bytesIn": nbytes_in}),
        "bytes": nbytes,
    }


def adapter_report(
    adapter: Adapter,
    error: float | None,
    nbytes_in: int | None = None,
    nbytes: int | None = None,
) -> dict[str, Any]:
    """Return the report of an adapter, which tells its ranks as well.

    Args:
        adapter: the output.
        error: as in `report`.
        nbytes_in: as in `report`.
        nbytes: size of its weights; None if nobody has counted them yet.
    """
    nbytes = written_nbytes(adapter) if nbytes is None else nbytes
    ranks = sorted({each.rank for each in adapter.modules.values() if each.rank is not None})
    return {
        **report(error, nbytes, nbytes_in),
        "ranks": " to ".join(map(str, dict.fromkeys((*ranks[:1], *ranks[-1:])))),
    }


def written_nbytes(adapter: Adapter) -> int:
    """Return the exact size of the weight file that writing an adapter in its format would make."""
    return get_format(adapter.format).weights_nbytes(adapter)


def ratio(squared: float, squared_whole: float) -> float:
    """Return ‖error‖/‖whole‖ from the squared norms; of nothing the norm of the error itself.

    >>> ratio(4.0, 16.0), ratio(0.0, 0.0), ratio(4.0, 0.0)
    (0.5, 0.0, 2.0)
    """
    return math.sqrt(squared / squared_whole if squared_whole else squared)
