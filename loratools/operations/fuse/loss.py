"""What rounding and quantising take from a fused change, and the refusal of a result without it.

The measures are summed over tensors here; `tensor` and `requantize` take them one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratools.operations.fuse.tensor import TensorReport
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import UnsupportedError

_SURVIVING = 0.5


def lost_to_rounding(reports: Sequence[TensorReport]) -> float:
    """Return the share of ΔW lost to rounding over some tensors."""
    delta = math.sqrt(math.fsum(t.delta_norm**2 for t in reports))
    return math.sqrt(math.fsum(t.rounding_norm**2 for t in reports)) / delta if delta else 0.0


def surviving(reports: Sequence[TensorReport]) -> float | None:
    """Return ⟨W' − W, ΔW⟩/‖ΔW‖² over the tensors where it was measured; None if there are none."""
    measured = [(r.surviving, r.delta_norm**2) for r in reports if r.surviving is not None]
    total = sum(weight for _, weight in measured)
    if not total:
        return None
    return sum(share * weight for share, weight in measured) / total


def refuse_erased(
    reports: Sequence[TensorReport], path: Path, *, what: str, hint: str, allow_lossy: bool
) -> None:
    """Refuse a result in which quantising erases most of the change.

    Args:
        reports: what was measured.
        path: the base.
        what: what erases it, in the plural.
        hint: the next step.
        allow_lossy: do not refuse.

    Raises:
        UnsupportedError: less than half of it survives, and that was not allowed.
    """
    share = surviving(reports)
    if share is not None and share < _SURVIVING and not allow_lossy:
        raise UnsupportedError(
            f"{what} erase most of the change",
            path=path,
            got=f"{100 * share:.1f} % of ΔW survives",
            expected=f"at least {100 * _SURVIVING:.0f} %",
            hint=hint,
        )


def refuse_rounded(reports: Sequence[TensorReport], path: Path, *, allow_lossy: bool) -> None:
    """Refuse a result in which rounding to floating types erases most of the change.

    Raises:
        UnsupportedError: less than half of it survives, and that was not allowed.
    """
    rounded = [replace(r, surviving=r.rounded) for r in reports if r.rounded is not None]
    refuse_erased(
        rounded,
        path,
        what=f"the steps of {' and '.join(sorted({r.dtype.lower() for r in rounded}))}",
        hint="Choose a wider `dtype` such as f32, or pass `allow_lossy=True`",
        allow_lossy=allow_lossy,
    )


def noise(reports: Sequence[TensorReport]) -> list[Finding]:
    """Return a warning if quantised weights are further from W + ΔW than W is."""
    error = lost_to_rounding([r for r in reports if r.surviving is not None])
    if error <= 1:
        return []
    message = (
        f"quantising adds an error of {100 * error:.0f} % of ΔW, so that the weights are no nearer "
        "to the fused ones than the base's are; leave out `requantize` to store 16 bits"
    )
    return [Finding("noisier-than-base", "warning", None, message)]
