"""Adapters of several formats, brought into that of the first as `convert` does it.

GGUF has tensors of its own, and mlx-lm names of its own. Those of PEFT and others meet them by a
translation that the base tells; without one, nothing in the files says which modules are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.folding.base_layout import has_own_layout
from loratools.operations.convert.class_names import named_otherwise, uses_names
from loratools.operations.convert.operation import WouldLoseError, prepare
from loratools.operations.merge.align import MergeInput
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.commands import command_on
from loratools_formats.contract.format import Context
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import AdapterError, LoratoolsError


def in_one_format(inputs: Sequence[MergeInput], base: Checkpoint | None) -> list[MergeInput]:
    """Return inputs of which those that need a translation into the first's format have one.

    Adapters of MLX meet a first one of PEFT by the names of the base's class, and need none here.

    Raises:
        AdapterError: one does, and there is no base.
        LoratoolsError: the first's format cannot hold another.
    """
    if not inputs:
        return []
    first = inputs[0].adapter
    if get_format(first.format).naming is not None:
        return list(inputs)
    return [
        item if _meets(item.adapter, first, base) else _of(first, item, base) for item in inputs
    ]


def _meets(adapter: Adapter, first: Adapter, base: Checkpoint | None) -> bool:
    """Return whether an adapter's names, as they are, meet those of the first or of the class."""
    if adapter.format == first.format:
        return True
    if has_own_layout(adapter) or has_own_layout(first):
        return False
    if base is not None:
        return first.format != "mlx"
    return not uses_names(adapter.format, first.format) or named_otherwise(adapter) is None


def _of(first: Adapter, item: MergeInput, base: Checkpoint | None) -> MergeInput:
    adapter, target = item.adapter, first.format
    if base is None:
        hint = command_on(adapter, "convert", f"--to {target} --base BASE", output="converted")
        raise AdapterError(
            f"an adapter of format {adapter.format} has other modules than one of {target}",
            path=adapter.source,
            got=next(iter(adapter.modules), None),
            expected=f"such as {next(iter(first.modules), None)}, as the first adapter has them",
            hint=f"Pass `base`, or convert it first: {hint}",
        )
    try:
        made = prepare(adapter, target, Context(base=base.path)).adapter
    except LoratoolsError as error:
        remedy = error.remedy if isinstance(error, WouldLoseError) else error.hint
        error.hint = f"{remedy.rstrip('.')}. " if remedy else ""
        error.hint += f"All become {target}, the format of the first; name this adapter first, "
        error.hint += f"and all become {adapter.format}"
        if isinstance(error, WouldLoseError):
            error.hint += ". To leave such things out, convert it first: " + command_on(
                adapter, "convert", f"--to {target} --base BASE --allow-lossy", output="converted"
            )
        raise
    kept = replace(made, provenance=adapter.provenance, metadata=adapter.metadata)
    return replace(item, adapter=kept)
