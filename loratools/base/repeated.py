"""Tensors of an adapter that repeat the base's.

PEFT stores the base's own embeddings beside a LoRA of them, bit for bit. They replace nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from loratools.base.placement.names import Names
from loratools_formats.checkpoints.checkpoint import CONFIG_FILE, read_checkpoint
from loratools_formats.containers.gguf.container import is_gguf
from loratools_formats.containers.gguf.model import decoded
from loratools_formats.containers.gguf.splits import read_model
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef, equal_values
from loratools_formats.disk.errors import LoratoolsError, MissingFileError


def without_repeated(adapter: Adapter, stored: Callable[[str], TensorRef | None]) -> Adapter:
    """Return an adapter without replacements that equal the base's tensors, with a note of them.

    Args:
        adapter: the adapter.
        stored: returns the base's tensor for a target, None if it is not known.
    """
    repeated = {}
    for key, replacement in adapter.replacements.items():
        there = None if replacement.rows else stored(replacement.target)
        if there is not None and equal_values(replacement.tensor, there):
            repeated[key] = replacement.target
    if not repeated:
        return adapter
    kept = {key: r for key, r in adapter.replacements.items() if key not in repeated}
    text = f"left out, since they are the base's own values: {', '.join(repeated.values())}"
    finding = Finding("base-values", "note", None, text)
    return replace(adapter, replacements=kept, findings=(*adapter.findings, finding))


def stored_in(base: Path) -> Callable[[str], TensorRef | None]:
    """Return what finds a tensor of a base model of any store by its name in transformers.

    Args:
        base: a folder, a safetensors file or a GGUF model. A folder without weights holds none.

    Raises:
        AdapterError: malformed.
    """
    if is_gguf(base):
        return _in_gguf(base)
    try:
        names = Names(read_checkpoint(base.parent if base.name == CONFIG_FILE else base))
    except MissingFileError:
        return lambda _: None

    def found(target: str) -> TensorRef | None:
        key = names.find(target)
        return None if key is None else names.tensors[key]

    return found


def _in_gguf(base: Path) -> Callable[[str], TensorRef | None]:
    model, rows_of = read_model(base), get_format("gguf").rows_in_base(base)

    def found(target: str) -> TensorRef | None:
        try:
            (name, order), *others = rows_of(target.removesuffix(".weight")).items()
        except LoratoolsError:  # not a matrix of this model, so nothing to compare with
            return None
        moved = others or order != list(range(len(order)))
        return None if moved else decoded(model.tensors[f"{name}.weight"])

    return found
