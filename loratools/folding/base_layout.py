"""Adapters of formats with a layout of their own, such as GGUF, in the layout of a base model."""

from __future__ import annotations

from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.format import Context
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter


def has_own_layout(adapter: Adapter) -> bool:
    """Return whether only the base model tells how the adapter's modules lie in it."""
    found = get_format(adapter.format)
    return found.uses_base and found.naming is None


def in_base_layout(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return an adapter whose modules fit a base model's weights; as it is if they do already.

    Raises:
        UnsupportedError: the layout is not known.
        AdapterError: the base model is another one.
    """
    if base is None or not has_own_layout(adapter):
        return adapter
    return get_format(adapter.format).to_model(adapter, Context(base=base.path))
