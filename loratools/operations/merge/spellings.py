"""Adapters that name one module in two ways, which a merge must bring together or refuse.

With the base, every adapter gets the names of the base's class, which is exact. Without it nobody
can tell which of two names is the right one; adding them would give a loader two modules of which
it finds one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.base.placement.tied_head import as_class_has_heads
from loratools.folding.expert_sides import on_side_of_peft, straightened, with_sides
from loratools.operations.in_class_names import in_class_names, renamed_to_class
from loratools.operations.merge.align import MergeInput
from loratools.operations.name_clash import called, name_clash
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, LoratoolsError


def in_one_spelling(inputs: Sequence[MergeInput], base: Checkpoint | None) -> list[MergeInput]:
    """Return inputs whose modules have one name each.

    Raises:
        AdapterError: two names of one module meet, and no base tells which the class has; or a
            module fits nothing in the base.
    """
    if any(get_format(item.adapter.format).naming is not None for item in inputs):
        return list(inputs)
    if base is not None:
        inputs = [replace(i, adapter=as_class_has_heads(i.adapter, base)) for i in inputs]
        sided = [replace(item, adapter=with_sides(item.adapter, base)) for item in inputs]
        inputs = [
            _as_peft_has(item, item.adapter, base) if item.adapter.format == "peft" else item
            for item in sided
        ]
    clash = name_clash([item.adapter for item in inputs])
    if clash is None:
        return _of_class(inputs, base)
    if base is None:
        (first, one), (second, other) = clash
        raise AdapterError(
            "two adapters name one module differently",
            path=inputs[second].adapter.source,
            got=called(inputs[second].adapter, other, one),
            expected=f"{called(inputs[first].adapter, one, other)}, as {inputs[first].name} has it",
            hint="Pass `base`, whose class tells the names; they are brought together exactly",
        )
    done = _renamed(inputs, base)
    left = name_clash([item.adapter for item in done])
    if left is not None:
        raise AdapterError(
            "two adapters name one module differently, and the base does not tell which is right",
            path=base.path,
            got=f"{left[0][1]} and {left[1][1]}",
        )
    return done


def _of_class(inputs: Sequence[MergeInput], base: Checkpoint | None) -> list[MergeInput]:
    """Return inputs under the names of the base's class, divided alike where modules differ.

    Names that no pattern here knows may still be two of one module. What the base does not have
    keeps its names, and the adapter whose names are kept has a finding that says so. MLX keeps its
    own names, which are not those of the class.
    """
    modules = {frozenset(item.adapter.modules) for item in inputs}
    if base is None or inputs[0].adapter.format == "mlx":
        return list(inputs)
    if len(modules) < 2:
        return [replace(item, adapter=renamed_to_class(item.adapter, base)) for item in inputs]
    try:
        return _renamed(inputs, base)
    except LoratoolsError as error:
        text = f"the adapters' modules differ, and their names are kept: {error}"
        told = Finding("names-kept", "warning", None, text)
        first, *rest = inputs
        adapter = replace(first.adapter, findings=(*first.adapter.findings, told))
        return [replace(first, adapter=adapter), *rest]


def _renamed(inputs: Sequence[MergeInput], base: Checkpoint) -> list[MergeInput]:
    """Return inputs under the names of the base's class; new stacks are as PEFT reads them now."""
    renamed = in_class_names([item.adapter for item in inputs], base)
    return [_as_peft_has(*each, base) for each in zip(inputs, renamed, strict=True)]


def _as_peft_has(item: MergeInput, adapter: Adapter, base: Checkpoint) -> MergeInput:
    """Return an input with an adapter, whose stacks are as PEFT reads them if its file has none.

    Stacks of a file stay on their side, but for square ones: no shape tells a loader theirs.
    """
    layout = item.adapter.expert_layout
    if layout is None or layout.name != "stacked":
        return replace(item, adapter=on_side_of_peft(adapter, base))
    shapes = {
        c.factors.shape for c in adapter.modules.values() if c.factors and c.layer.kind == "experts"
    }
    if any(out == in_ for out, in_ in shapes):
        adapter = on_side_of_peft(straightened(adapter), base)
    return replace(item, adapter=adapter)
