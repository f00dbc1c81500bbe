"""Compute exact cosines of pairs of adapters, with the inner products that `compare` takes."""

from __future__ import annotations

import math

from loratools.folding.thin_modules import ThinModules
from loratools.operations.compare.products import Workspace, inner_products
from loratools.operations.index.sketching import Subject
from loratools_formats.core.adapter import Adapter


def exact_cosine(one: Adapter, other: Adapter) -> float | None:
    """Return ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖) over everything; a module that one lacks counts as zero.

    Modules are read one at a time. A module of another shape is none of the other's.

    Raises:
        LoratoolsError: a change is not known.
    """
    openers = [ThinModules(Subject.of("", each).adapter, None, "compare") for each in (one, other)]
    workspace = Workspace()
    product = ours = theirs = 0.0
    for name in sorted({*openers[0].modules, *openers[1].modules}):
        found = [each.open(name) if name in each.modules else None for each in openers]
        first, second = found
        if first is not None and second is not None and _fit(first.shape, second.shape):
            changes, _ = inner_products([first, second], workspace)
            product += float(changes[0, 1])
            ours, theirs = ours + float(changes[0, 0]), theirs + float(changes[1, 1])
            continue
        if first is not None:
            ours += sum(thin.squared_norm for thin in first.matrices)
        if second is not None:
            theirs += sum(thin.squared_norm for thin in second.matrices)
    norms = math.sqrt(ours) * math.sqrt(theirs)
    return max(-1.0, min(1.0, product / norms)) if norms > 0.0 else None


def _fit(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one == other
