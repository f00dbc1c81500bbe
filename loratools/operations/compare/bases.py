"""How far two bases differ where an adapter acts: may it be moved from one to the other?

ΔW writes to the space U of its columns and reads from the space V of its rows. What the other base
changes outside of both does not meet the adapter.
"""

from __future__ import annotations

import numpy as np

from loratools.algebra.thin import Thin
from loratools.folding.expert_sides import straight_beside
from loratools.folding.thin_modules import ThinModules
from loratools.folding.weights_beside import WeightsBeside
from loratools.operations.compare.result import BasesModule, BasesResult
from loratools.work.parallel import in_order
from loratools.work.selection import Selection
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.dtypes import Array
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, LoratoolsError


def compare_bases(
    adapter: Adapter,
    base: Checkpoint,
    other: Checkpoint,
    *,
    selection: Selection | None = None,
    workers: int = 2,
) -> BasesResult:
    """Compare two bases at every module of an adapter.

    Args:
        adapter: of any kind.
        base: W₀, which it was trained on.
        other: W₁.
        selection: modules to compare.
        workers: threads over modules.

    Raises:
        AdapterError: no module fits both bases.
        UnsupportedError: a change is not known.
    """
    opener = ThinModules(straight_beside(adapter, base), base, "compare")
    before, after = WeightsBeside(opener.adapter, base), WeightsBeside(opener.adapter, other)
    names = [name for name in opener.modules if name in (selection or Selection())]

    def one(name: str) -> list[BasesModule] | Finding:
        delta = opener.adapter.modules[name]
        try:
            weights = before.load(name, delta), after.load(name, delta)
        except LoratoolsError as error:
            return _left_out(name, error.message)
        module = opener.open(name)
        if any(w.shape != module.shape for pair in weights for w in pair):
            return _left_out(name, "its shapes differ")
        labels = [
            f"{name}[{i}]" if module.layer.kind == "experts" else name
            for i in range(len(module.matrices))
        ]
        groups = zip(labels, *weights, module.matrices, strict=True)
        return [_differ(label, w0, w1, thin) for label, w0, w1, thin in groups]

    done = list(in_order(one, names, workers))
    modules = tuple(each for one in done if not isinstance(one, Finding) for each in one)
    found = tuple(each for each in done if isinstance(each, Finding))
    if not modules:
        raise AdapterError(
            "no module of the adapter is in both bases",
            path=adapter.source,
            got=found[0].message if found else "no module is selected",
        )
    return BasesResult(None if adapter.source is None else str(adapter.source), modules, found)


def _left_out(name: str, reason: str) -> Finding:
    return Finding("not-in-both-bases", "warning", name, f"{name} is left out: {reason}")


def _differ(label: str, before: Array, after: Array, thin: Thin) -> BasesModule:
    u, v = thin.spaces()
    difference = after - before
    outputs, inputs = u.T @ difference, difference @ v
    size = float(np.sqrt(thin.squared_norm))
    return BasesModule(
        label,
        _ratio(difference, before),
        _ratio(outputs, u.T @ before),
        _ratio(inputs, before @ v),
        float(np.linalg.norm(outputs)),
        float(np.linalg.norm(outputs @ v)) / size if size else None,
    )


def _ratio(part: Array, whole: Array) -> float | None:
    size = float(np.linalg.norm(whole))
    return float(np.linalg.norm(part)) / size if size else None
